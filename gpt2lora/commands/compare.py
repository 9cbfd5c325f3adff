"""compare: experiments side by side, as a table and as one picture. No stage of the pipeline: it reads what DVC knows.

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
from gpt2lora.pipeline.cli import Stop, say, stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes


AREA = 900  # of the largest adapter's circle, in square points
LINE = 0.24  # height of a name, inches
FRAME = 1.4  # height of all but the axes, inches
LONGEST = 32  # characters of a name in the picture
WIDE = 5  # ratio of perplexities from which their axis is logarithmic


@dataclass
class Run:
    name: str
    method: str
    scored: tuple[int, ...]  # what its figures were counted on
    base: float  # perplexity on the test split
    tuned: float
    frozen: int  # bytes of the base in memory while training
    adapter: int  # bytes on disk
    trained: int  # parameters


@stage
@click.argument("experiments", nargs=-1, metavar="[EXPERIMENT]...")
@click.option("--out", type=Path, default="dvc_plots/compare.png", show_default=True, help="File of the picture.")
def main(experiments: tuple[str, ...], out: Path) -> None:
    """Compare experiments of `dvc exp run`; without names, all of the last commit."""
    say("compare: asking dvc exp show")
    runs = []
    for name, revision in (named(experiments) if experiments else of_last_commit(show())).items():
        if run := read(name, revision):
            runs.append(run)
        else:
            say(f"compare: {name} is left out: it failed, waits in the queue, or has no figures")
    if not runs:
        raise Stop("compare: no experiment with figures: `dvc exp run` makes one, `dvc exp show` lists them")
    runs.sort(key=lambda run: run.tuned)
    say(table(runs))
    if len({run.scored for run in runs}) > 1:
        say("compare: warning: not all were scored on the same tokens; perplexities of different ones do not compare")
    draw(runs, out)
    say(f"compare: {out}")


def show(*options: str) -> list[dict]:
    """Return what `dvc exp show` knows: the workspace, then commits, each with its experiments."""
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", *options]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()[-1:]
        raise Stop(f"dvc exp show: {' '.join(lines).removeprefix('ERROR: ')}")
    return json.loads(done.stdout)


def of_last_commit(commits: list[dict]) -> dict[str, dict]:
    """Return the experiments of the commits in a table of `dvc exp show`, by name."""
    experiments = [found["revs"][0] for commit in commits for found in commit["experiments"] or []]
    return {revision["name"] or revision["rev"][:7]: revision for revision in experiments}


def named(names: tuple[str, ...]) -> dict[str, dict]:
    """Return the revisions with these names, in their order; all commits are looked through where it must be.

    Raises:
        Stop: a name that is none.
    """
    known: dict[str, dict] = {}
    for options in ((), ("--all-commits",)):
        commits = show(*options)
        known = of_last_commit(commits) | {
            name: commit for commit in commits for name in (commit["name"], commit["rev"], commit["rev"][:7]) if name
        }
        if known.keys() >= set(names):
            return {name: known[name] for name in names}
    unknown = next(name for name in names if name not in known)
    others = ", ".join(of_last_commit(commits)) or "none yet"
    raise Stop(f"compare: no experiment {unknown}: expected one of `dvc exp list --all-commits`: {others}")


def read(name: str, revision: dict) -> Run | None:
    """Return what came of a revision; None where there are no figures: it failed, say, or has not run yet."""
    data = revision.get("data") or {}
    try:
        scores, training = (data["metrics"][f"metrics/{file}.json"]["data"] for file in ("eval", "train"))
        (params,) = (file["data"] for file in data["params"].values())
        bits = f", {params['methods']['qlora']['bits']} bits" if params["method"] == "qlora" else ""
        return Run(
            name=name,
            method=params["method"] + bits,
            scored=tuple(scores[count] for count in ("predicted_tokens", "words", "bytes", "windows")),
            base=scores["base"]["perplexity"],
            tuned=scores["tuned"]["perplexity"],
            frozen=training["frozen_base_bytes"],
            adapter=training["adapter_bytes"],
            trained=training["trainable_parameters"],
        )
    except (KeyError, TypeError, ValueError):  # a file is missing or could not be read: DVC puts an error in its place
        return None


def table(runs: list[Run]) -> str:
    width = max(10, *(len(run.name) for run in runs))
    lines = [
        f"{'':{width}}  {'':14}test perplexity                 frozen base     adapter        trained",
        f"{'experiment':{width}}  {'method':14}"
        + "      base       tuned    change           MB          MB     parameters",
    ]
    lines += [
        f"{run.name:{width}}  {run.method:14}{run.base:10,.2f}{run.tuned:12,.2f}{run.tuned / run.base - 1:+10.1%}"
        f"{run.frozen / 1e6:13,.2f}{run.adapter / 1e6:12,.2f}{run.trained:15,}"
        for run in runs
    ]
    return "\n".join(lines)


def draw(runs: list[Run], file: Path) -> None:
    """Write the picture of some runs, sorted by perplexity; it grows with their number.

    The scale is that of the tuned models: the base's perplexity is named, and a line where it is near enough.
    """
    height = max(plots.SIZE[1], FRAME + LINE * len(runs))
    memory, perplexity = [run.frozen / 1e6 for run in runs], [run.tuned for run in runs]
    largest = max(run.adapter for run in runs)
    title = "Perplexity on the test split, by memory of the frozen base"
    with plots.picture(file, title, (plots.SIZE[0], height)) as axes:
        areas = [AREA * run.adapter / largest for run in runs]
        axes.scatter(memory, perplexity, areas, color=plots.TUNED, alpha=0.3, linewidth=0, clip_on=False)
        label = f"tuned; area: bytes of the adapter, at most {largest / 1e6:,.1f} MB"
        axes.scatter(memory, perplexity, 14, color=plots.TUNED, clip_on=False, label=label)
        if max(perplexity) > WIDE * min(perplexity):
            axes.set_yscale("log", subs=[2, 5])
            axes.set_ylim(min(perplexity) / 1.5, max(perplexity) * 1.5)
            axes.yaxis.set_minor_formatter("{x:,g}")
        else:
            margin = 0.15 * (max(perplexity) - min(perplexity)) or 0.05 * perplexity[0]
            axes.set_ylim(min(perplexity) - margin, max(perplexity) + margin)
        bases = sorted({run.base for run in runs})
        if bases[-1] < 1.01 * bases[0]:  # one base, up to the rounding of its precisions
            axes.axhline(bases[0], color=plots.BASE, linestyle="--", label=f"base: {bases[0]:,.2f}")
        axes.yaxis.set_major_formatter("{x:,g}")
        right = max(memory) or 1
        axes.set_xlim(-0.08 * right, 1.12 * right)  # the largest circle at 0 covers no number
        axes.set(xlabel="frozen base in memory (MB)", ylabel="perplexity (of tokens)")
        write_names(axes, runs, LINE / (height - FRAME))
        plots.legend(axes)


def write_names(axes: "Axes", runs: list[Run], gap: float) -> None:
    """Write the names in a column on the right, at least `gap` of the axes' height apart, each tied to its point."""
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((0, run.tuned))[1] for run in runs]  # rising
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    top = 0.97
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], top)
        top = heights[place] - gap
    for run, height in zip(runs, heights, strict=True):
        axes.annotate(
            run.name if len(run.name) <= LONGEST else f"{run.name[: LONGEST - 1]}…",
            (run.frozen / 1e6, run.tuned),
            (1.03, height),
            textcoords="axes fraction",
            verticalalignment="center",
            zorder=1,
            arrowprops={"arrowstyle": "-", "color": "#adb5bd", "linewidth": 0.7, "relpos": (0, 0.5)},
        )


if __name__ == "__main__":
    main()
