"""compare: several experiments side by side, as a table and as a picture.

in   names of experiments, branches or commits, or `workspace`; without any, all experiments of the last commit
out  a table on stdout; dvc_plots/compare.png: perplexity against memory of the frozen base, area by adapter bytes
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.evaluation import plots
from gpt2lora.pipeline.cli import StageError, command, echo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CIRCLE_AREA = 900  # of the largest adapter, in square points
LABEL_HEIGHT = 0.24  # of a name, inches
FRAME_HEIGHT = 1.4  # of everything except the axes, inches
LABEL_LENGTH = 32  # characters of a name in the picture
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


@command
@click.argument("names", nargs=-1, metavar="[EXPERIMENT]...")
@click.option("--out", type=Path, default="dvc_plots/compare.png", show_default=True, help="File of the picture.")
def main(names: tuple[str, ...], out: Path) -> None:
    """Compare experiments of `dvc exp run`; without names, all of the last commit."""
    echo("compare: asking dvc exp show")
    revisions = find_revisions(names) if names else experiments_by_name(dvc_exp_show())
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
    revisions = [experiment["revs"][0] for commit in commits for experiment in commit["experiments"] or []]
    return {revision["name"] or revision["rev"][:7]: revision for revision in revisions}


def find_revisions(names: tuple[str, ...]) -> dict[str, dict]:
    """Return the revisions with these names, in their order; if need be, search all commits.

    Raises:
        StageError: a name is unknown.
    """
    known: dict[str, dict] = {}
    for options in ((), ("--all-commits",)):
        commits = dvc_exp_show(*options)
        known = experiments_by_name(commits) | {
            name: commit for commit in commits for name in (commit["name"], commit["rev"], commit["rev"][:7]) if name
        }
        if known.keys() >= set(names):
            return {name: known[name] for name in names}
    unknown = next(name for name in names if name not in known)
    others = ", ".join(experiments_by_name(commits)) or "none yet"
    raise StageError(f"compare: no experiment {unknown}: expected one of `dvc exp list --all-commits`: {others}")


def read_experiment(name: str, revision: dict) -> Experiment | None:
    """Return the results of a revision; None if it has no metrics, because it failed or has not run yet."""
    data = revision.get("data") or {}
    try:
        scores, training = (data["metrics"][f"metrics/{file}.json"]["data"] for file in ("eval", "train"))
        (params,) = (file["data"] for file in data["params"].values())
        bits = f", {params['methods']['qlora']['bits']} bits" if params["method"] == "qlora" else ""
        return Experiment(
            name=name,
            method=params["method"] + bits,
            scored=tuple(scores[count] for count in ("predicted_tokens", "words", "bytes", "windows")),
            base=scores["base"]["perplexity"],
            tuned=scores["tuned"]["perplexity"],
            frozen=training["frozen_base_bytes"],
            adapter=training["adapter_bytes"],
            trained=training["trainable_parameters"],
        )
    except (KeyError, TypeError, ValueError):  # DVC puts an error in the place of a file that is missing or unreadable
        return None


def format_table(experiments: list[Experiment]) -> str:
    """Return the table for the terminal."""
    width = max(10, *(len(experiment.name) for experiment in experiments))
    lines = [
        f"{'':{width}}  {'':14}test perplexity                 frozen base     adapter        trained",
        f"{'experiment':{width}}  {'method':14}"
        + "      base       tuned    change           MB          MB     parameters",
    ]
    lines += [
        f"{each.name:{width}}  {each.method:14}{each.base:10,.2f}{each.tuned:12,.2f}{each.tuned / each.base - 1:+10.1%}"
        f"{each.frozen / 1e6:13,.2f}{each.adapter / 1e6:12,.2f}{each.trained:15,}"
        for each in experiments
    ]
    return "\n".join(lines)


def draw_comparison(experiments: list[Experiment], file: Path) -> None:
    """Draw experiments, sorted by perplexity. The picture grows with their number.

    The scale is that of the tuned models. The base's perplexity is in the legend, and a line if it is in range.
    """
    height = max(plots.SIZE[1], FRAME_HEIGHT + LABEL_HEIGHT * len(experiments))
    memory, perplexity = [each.frozen / 1e6 for each in experiments], [each.tuned for each in experiments]
    largest = max(each.adapter for each in experiments)
    title = "Perplexity on the test split, by memory of the frozen base"
    with plots.new_picture(file, title, (plots.SIZE[0], height)) as axes:
        areas = [CIRCLE_AREA * each.adapter / largest for each in experiments]
        axes.scatter(memory, perplexity, areas, color=plots.TUNED_COLOR, alpha=0.3, linewidth=0, clip_on=False)
        label = f"tuned; area: bytes of the adapter, at most {largest / 1e6:,.1f} MB"
        axes.scatter(memory, perplexity, 14, color=plots.TUNED_COLOR, clip_on=False, label=label)
        if max(perplexity) > LOG_SCALE_RATIO * min(perplexity):
            axes.set_yscale("log", subs=[2, 5])
            axes.set_ylim(min(perplexity) / 1.5, max(perplexity) * 1.5)
            axes.yaxis.set_minor_formatter("{x:,g}")
        else:
            margin = 0.15 * (max(perplexity) - min(perplexity)) or 0.05 * perplexity[0]
            axes.set_ylim(min(perplexity) - margin, max(perplexity) + margin)
        bases = sorted({each.base for each in experiments})
        if bases[-1] < 1.01 * bases[0]:  # one base, up to the rounding of different precisions
            axes.axhline(bases[0], color=plots.BASE_COLOR, linestyle="--", label=f"base: {bases[0]:,.2f}")
        axes.yaxis.set_major_formatter("{x:,g}")
        right = max(memory) or 1
        axes.set_xlim(-0.08 * right, 1.12 * right)  # so that the largest circle at 0 covers no tick label
        axes.set(xlabel="frozen base in memory (MB)", ylabel="perplexity (of tokens)")
        label_points(axes, experiments, LABEL_HEIGHT / (height - FRAME_HEIGHT))
        plots.draw_legend(axes)


def label_points(axes: "Axes", experiments: list[Experiment], gap: float) -> None:
    """Write the names in a column on the right, each with a line to its point.

    Args:
        gap: the smallest distance of two names, as a share of the axes' height.
    """
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((0, each.tuned))[1] for each in experiments]  # increasing
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + gap)
    top = 0.97
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], top)
        top = heights[index] - gap
    for each, height in zip(experiments, heights, strict=True):
        axes.annotate(
            each.name if len(each.name) <= LABEL_LENGTH else f"{each.name[: LABEL_LENGTH - 1]}…",
            (each.frozen / 1e6, each.tuned),
            (1.03, height),
            textcoords="axes fraction",
            verticalalignment="center",
            zorder=1,
            arrowprops={"arrowstyle": "-", "color": "#adb5bd", "linewidth": 0.7, "relpos": (0, 0.5)},
        )
