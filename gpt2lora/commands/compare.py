"""compare: several experiments side by side, as a table and as a picture.

in   names of experiments, branches or commits, HEAD, or `workspace`; without any, all experiments of the last commit
out  a table on stdout, with a column for each parameter that differs, and below it the mean over train.seed;
     dvc_plots/compare.png: perplexity, memory of the frozen base and size of the adapter
"""

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import click

from gpt2lora.evaluation import plots
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.params import parse_yaml

ROW_HEIGHT, FRAME_HEIGHT, LOWEST = 0.28, 1.7, 2.8  # of an experiment, of all around the axes, of a picture; inches
LABEL_LENGTH = 32  # characters of a name in the picture
WORKSPACE = "workspace"
SHOWN_IN_METHOD = ("method", "methods.qlora.bits")  # parameters that have no column of their own
LOG_SCALE_RATIO = 5  # of the highest to the lowest perplexity, above which the axis is logarithmic


@dataclass
class Experiment:
    """The parameters and results of an experiment, or of another revision."""

    name: str
    method: str
    scored: tuple[int, ...]  # the counts behind its metrics
    base: float  # perplexity on the test split
    tuned: float
    frozen: int  # bytes of the base in memory while training
    adapter: int  # bytes on disk
    trained: int  # parameters
    params: dict[str, object] = field(default_factory=dict)  # by dotted name


@command
@click.argument("names", nargs=-1, metavar="[EXPERIMENT]...")
@click.option("--all-commits", is_flag=True, help="Without names: the experiments of all commits.")
@click.option("--out", type=Path, default="dvc_plots/compare.png", show_default=True, help="File of the picture.")
def main(names: tuple[str, ...], all_commits: bool, out: Path) -> None:
    """Compare experiments of `dvc exp run`; without names, all of the last commit."""
    echo("compare: asking dvc exp show" + ", which takes a minute for all commits of a long history" * all_commits)
    options = ("--all-commits",) if all_commits else ()
    revisions = find_revisions(names) if names else experiments_by_name(dvc_exp_show(*options))
    experiments = []
    for name, revision in revisions.items():
        if experiment := read_experiment(name, revision):
            experiments.append(experiment)
        else:
            echo(f"compare: {name} is left out: it failed, waits in the queue, or has no metrics")
    if not experiments:
        raise StageError("compare: no experiment with metrics: `dvc exp run` makes one, `dvc exp show` lists them")
    experiments.sort(key=lambda experiment: experiment.tuned)
    echo(format_table(experiments))
    for line in describe_seeds(experiments):
        echo(line)
    if len({experiment.scored for experiment in experiments}) > 1:
        echo("compare: warning: not all were scored on the same tokens; perplexities of different ones do not compare")
    draw_comparison(experiments, out)
    echo(f"compare: {out}")


def dvc_exp_show(*options: str) -> list[dict]:
    """Return the output of `dvc exp show`: the workspace, then commits, each with its experiments."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise StageError(f"dvc exp show: {' '.join(lines).removeprefix('ERROR: ')}, seen from {Path.cwd()}")
    return json.loads(done.stdout)


def experiments_by_name(commits: list[dict]) -> dict[str, dict]:
    """Return the experiments of the commits in the output of `dvc exp show`, by name."""
    found: dict[str, dict] = {}
    for commit in commits:
        for experiment in commit["experiments"] or []:
            revision = experiment["revs"][0]
            name = revision["name"] or revision["rev"][:7]
            if name in found:  # experiments of different commits may have the same name
                name = f"{name} ({revision['rev'][:7]})"
            found[name] = revision
    return found


def find_revisions(names: tuple[str, ...]) -> dict[str, dict]:
    """Return the revisions with these names, in their order; if need be, search all commits.

    Raises:
        StageError: a name is unknown.
    """
    for options in ((), ("--all-commits",)):
        commits = dvc_exp_show(*options)
        by_rev = {commit["rev"]: commit for commit in commits}
        known = {commit["name"]: commit for commit in commits if commit["name"]} | by_rev | experiments_by_name(commits)
        for name in names:
            if name not in known and (commit := by_rev.get(git_commit(name))):
                known[name] = commit
        if known.keys() >= set(names):
            return {name: known[name] for name in names}
        if not options:
            check_names([name for name in names if name not in known])
    raise unknown_name(next(name for name in names if name not in known), experiments_by_name(commits))


def check_names(names: list[str]) -> None:
    """Refuse a name that neither DVC nor git knows. `dvc exp show` of all commits takes a minute."""
    command = [sys.executable, "-m", "dvc", "exp", "list", "--all-commits", "--name-only"]
    listed = subprocess.run(command, capture_output=True, encoding="utf-8").stdout.split()
    for name in names:
        if name not in listed and not git_commit(name):
            raise unknown_name(name, listed)


def unknown_name(name: str, known: Iterable[str]) -> StageError:
    others = ", ".join(known) or "none yet"
    return StageError(f"compare: no experiment {name}: expected one of `dvc exp list --all-commits`: {others}")


def git_commit(name: str) -> str | None:
    """Return the hash of the commit that git knows by a name (HEAD, HEAD~1, a branch, a short hash), or None."""
    words = ["git", "rev-parse", "--quiet", "--verify", "--end-of-options", f"{name}^{{commit}}"]
    return subprocess.run(words, capture_output=True, encoding="utf-8").stdout.strip() or None


def read_experiment(name: str, revision: dict) -> Experiment | None:
    """Return the results of a revision; None if it has no metrics, because it failed or has not run yet."""
    data = revision.get("data") or {}
    try:
        scores, training = (data["metrics"][f"metrics/{file}.json"]["data"] for file in ("eval", "train"))
        (params,) = (file["data"] for file in data["params"].values())
        return Experiment(
            name=name,
            method=describe_method(training, params),
            scored=tuple(scores[count] for count in ("predicted_tokens", "words", "bytes", "windows")),
            base=scores["base"]["perplexity"],
            tuned=scores["tuned"]["perplexity"],
            frozen=training["frozen_base_bytes"],
            adapter=training["adapter_bytes"],
            trained=training["trainable_parameters"],
            params=flatten(params) | (locked_params(Path("dvc.lock")) if name == WORKSPACE else {}),
        )
    except (KeyError, TypeError, ValueError):  # DVC puts an error in the place of a file that is missing or unreadable
        return None


def describe_method(training: dict, params: dict) -> str:
    """Return the method that train.json names; a file of an earlier version names none, and params.yaml has to do."""
    method = training.get("trained_by") or params["method"]
    bits = training.get("base_bits") if "trained_by" in training else params["methods"]["qlora"]["bits"]
    return method + (f", {bits} bits" if method == "qlora" else "")


def locked_params(lock: Path) -> dict[str, object]:
    """Return what params.yaml held when the stages of the workspace last ran; it may have been put back since."""
    stages = parse_yaml(lock.read_bytes())["stages"] if lock.is_file() else {}
    found = (flatten(file) for stage in stages.values() for file in stage.get("params", {}).values())
    return {name: value for values in found for name, value in values.items()}


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested dicts by their dotted names."""
    leaves: dict[str, object] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return leaves


def differing_params(experiments: list[Experiment]) -> list[str]:
    """Return the names of the parameters that differ between experiments, in the order of params.yaml."""
    names = dict.fromkeys(name for each in experiments for name in each.params)
    shown = (name for name in names if name not in SHOWN_IN_METHOD)
    return [name for name in shown if len({repr(each.params.get(name)) for each in experiments}) > 1]


def format_table(experiments: list[Experiment]) -> str:
    """Return the table for the terminal, with a column for each parameter that differs."""
    names = differing_params(experiments)
    used = Counter(name.rpartition(".")[2] for name in {name for each in experiments for name in each.params})
    labels = [short if used[short := name.rpartition(".")[2]] == 1 else name for name in names]
    rows = [
        [*("" for _ in ("experiment", "method", *labels)), "base", "tuned", "", "frozen base", "adapter", "trained"],
        ["experiment", "method", *labels, "perplexity", "perplexity", "change", "MB", "MB", "parameters"],
    ]
    for each in experiments:
        values = [format_value(each.params.get(name)) for name in names]
        scores = [f"{each.base:,.2f}", f"{each.tuned:,.2f}", f"{each.tuned / each.base - 1:+.1%}"]
        sizes = [f"{each.frozen / 1e6:,.2f}", f"{each.adapter / 1e6:,.2f}", f"{each.trained:,}"]
        rows.append([each.name, each.method, *values, *scores, *sizes])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 2 + len(names)  # columns that are aligned to the left
    pads = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join(
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)) for row in rows
    )


def format_value(value: object) -> str:
    """Return a parameter as params.yaml has it."""
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def describe_seeds(experiments: list[Experiment]) -> list[str]:
    """Return a line for each group of experiments that differ in train.seed alone: the mean of their perplexities."""
    groups: dict[tuple, list[Experiment]] = {}
    for each in experiments:
        rest = tuple(sorted((name, repr(value)) for name, value in each.params.items() if name != "train.seed"))
        groups.setdefault((each.method, each.scored, rest), []).append(each)
    lines = []
    for group in groups.values():
        seeds = {repr(each.params.get("train.seed")) for each in group}
        if len(group) > 1 and len(seeds) == len(group):
            values = [each.tuned for each in group]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            names = ", ".join(each.name for each in group)
            lines.append(f"{mean:,.2f} ± {deviation:,.2f} (mean, sample standard deviation) over train.seed: {names}")
    return lines


def draw_comparison(experiments: list[Experiment], file: Path) -> None:
    """Draw experiments, sorted by perplexity, each in a row. The picture grows with their number.

    The scale is that of the tuned models. The base's perplexity is in the legend, and a line if it is in range.
    """
    height = max(LOWEST, FRAME_HEIGHT + ROW_HEIGHT * len(experiments))
    perplexity, rows = [each.tuned for each in experiments], range(len(experiments))
    with plots.new_picture(file, "Perplexity on the test split", (plots.SIZE[0], height)) as axes:
        axes.scatter(perplexity, rows, 40, color=plots.TUNED_COLOR, clip_on=False, label="tuned", zorder=3)
        if max(perplexity) > LOG_SCALE_RATIO * min(perplexity):
            axes.set_xscale("log", subs=[2, 5])
            axes.set_xlim(min(perplexity) / 1.5, max(perplexity) * 1.5)
            axes.xaxis.set_minor_formatter("{x:,g}")
        else:
            margin = 0.15 * (max(perplexity) - min(perplexity)) or 0.05 * perplexity[0]
            axes.set_xlim(min(perplexity) - margin, max(perplexity) + margin)
            axes.xaxis.get_major_locator().set_params(nbins=5)  # so that long labels do not touch
        bases = sorted({each.base for each in experiments})
        if bases[-1] < 1.01 * bases[0]:  # one base, up to the rounding of different precisions
            low, high = axes.get_xlim()
            # Beside the scale, the base has a place in the legend alone, without a line.
            style = "--" if low <= bases[0] <= high else ""
            axes.axvline(bases[0], color=plots.BASE_COLOR, linestyle=style, label=f"base: {bases[0]:,.2f}")
            axes.set_xlim(low, high)
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_yticks(rows, [shorten(each.name) for each in experiments])
        axes.set_ylim(len(experiments) - 0.5, -0.5)
        axes.set_xlabel("perplexity (of tokens)")
        side = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "verticalalignment": "center"}
        axes.annotate("MB: base + adapter", (1.02, 1.0), xycoords="axes fraction", verticalalignment="bottom")
        for row, each in enumerate(experiments):
            axes.annotate(f"{each.frozen / 1e6:,.1f} + {each.adapter / 1e6:,.1f}", (1.02, row), **side)
        plots.draw_legend(axes)


def shorten(name: str) -> str:
    """Return a name that fits beside the picture's axes."""
    return name if len(name) <= LABEL_LENGTH else f"{name[: LABEL_LENGTH - 1]}…"
