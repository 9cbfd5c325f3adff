"""The committed metrics of a project, and what git reports as changed in it."""

from pathlib import Path

from tiny import run

TABLES = ("eval.json", "loss.csv", "positions.csv", "train.json", "train_timings.json")
PLOTS = (
    *("accuracy_by_position", "gradient_norm", "learning_rate", "loss_by_position", "loss_by_step", "loss_by_tokens"),
    "passage",
)
METRICS = {*(f"metrics/{name}" for name in TABLES), *(f"metrics/plots/{name}.png" for name in PLOTS)}


def changed_files(project: Path) -> set[str]:
    """Return the files that are changed or new since the last commit."""
    return {line[3:] for line in run(project, "git", "status", "--short", "--untracked-files=all").splitlines()}
