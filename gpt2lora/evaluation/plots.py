"""Pictures of what dvc.yaml plots, as PNG files: DVC's own page loads the library that draws it from the network.

The same table gives the same bytes: neither a date nor a version is written into a file, and nothing that a user has
set up for matplotlib counts.
"""

import contextlib
import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.artifacts import whole
from gpt2lora.pipeline.cli import Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes


SIZE, DPI = (8.0, 4.5), 100  # inches, pixels to the inch
COLOURS = 128  # to a picture: enough for smooth letters, at a third of the bytes, which git keeps for every run
BASE, TUNED = "#6c757d", "#d9480f"
# What a column is called and drawn like: colour, line, marker.
LINES = {
    "train_loss": ("training", "#74a9cf", "-", "o"),
    "validation_loss": ("validation", "#08519c", "-", "s"),
    "learning_rate": ("", "#08519c", "-", "o"),
    "gradient_norm": ("", "#08519c", "-", "o"),
    "base_loss": ("base", BASE, "--", "s"),
    "tuned_loss": ("tuned", TUNED, "-", "o"),
    "base_accuracy": ("base", BASE, "--", "s"),
    "tuned_accuracy": ("tuned", TUNED, "-", "o"),
}


@dataclass(frozen=True)
class Plot:
    """One of dvc.yaml's plots; blanks in the name are underscores in the file's."""

    name: str
    x: str
    y: tuple[str, ...]
    title: str
    x_label: str
    y_label: str

    @property
    def file(self) -> str:
        return f"{self.name.replace(' ', '_')}.png"


LOSSES = ("train_loss", "validation_loss")
TRAINING = (
    Plot("loss by step", "step", LOSSES, "Loss while training", "step", "loss (nats/token)"),
    Plot("loss by tokens", "tokens", LOSSES, "Loss while training", "tokens seen", "loss (nats/token)"),
    Plot("learning rate", "step", ("learning_rate",), "Learning rate", "step", "learning rate (per step)"),
    Plot(
        "gradient norm",
        "step",
        ("gradient_norm",),
        "Norm of the gradient, before clipping",
        "step",
        "norm (nats/token)",
    ),
)
TEST = (
    Plot(
        "loss by position",
        "position",
        ("base_loss", "tuned_loss"),
        "Loss on the test split, by the tokens before in the window",
        "tokens of context",
        "loss (nats/token)",
    ),
    Plot(
        "accuracy by position",
        "position",
        ("base_accuracy", "tuned_accuracy"),
        "Accuracy on the test split, by the tokens before in the window",
        "tokens of context",
        "share of tokens",
    ),
)


def load() -> None:
    """Import what draws: half a second's work, that need not wait until there is something to draw."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache, once for each user
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.PngImagePlugin"):
        import_module(name)


def draw(plots: tuple[Plot, ...], table: Path, folder: Path) -> None:
    """Draw some plots of a CSV file, each into a PNG file of `folder`."""
    columns = read_table(table, {name for plot in plots for name in (plot.x, *plot.y)})
    for plot in plots:
        with picture(folder / plot.file, plot.title) as axes:
            for column in plot.y:
                label, colour, line, marker = LINES[column]
                axes.plot(
                    columns[plot.x],
                    columns[column],
                    line,
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=label,
                    clip_on=False,
                )
            if len(plot.y) > 1:
                legend(axes)
            axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
            axes.set_xlim(left=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter(short if plot.x == "tokens" else "{x:,.0f}")
            if plot.y[0] in ("learning_rate", "gradient_norm"):
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter("{x:g}")


def read_table(table: Path, names: set[str]) -> dict[str, list[float]]:
    """Return the named columns of a CSV file; stop at one that is missing or holds no number."""
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise Stop(f"{table} is damaged ({error}): run `dvc repro --force train`") from error


def short(count: float, place: int | None = None) -> str:
    """Return a round count as a tick shows it: 500, 20k, 1.5M. Matplotlib says at which `place`, too."""
    size, sign = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= pair[0]), (1, ""))
    return f"{count / size:g}{sign}"


@contextlib.contextmanager
def picture(file: Path, title: str, size: tuple[float, float] = SIZE) -> "Iterator[Axes]":
    """Yield empty axes of a picture; it is written to `file`, a PNG, at the end."""
    load()
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no state, and half the time to import
    from PIL import Image

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams |= {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
        figure = Figure(size, dpi=DPI, layout="constrained")
        axes = figure.subplots()
        axes.grid(color="#e9ecef")
        axes.set_axisbelow(True)
        axes.set_title(title, loc="left", pad=30)
        yield axes
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    with whole(file) as new:
        pixels.quantize(COLOURS, dither=Image.Dither.NONE).save(new, "PNG", optimize=True, dpi=(DPI, DPI))


def legend(axes: "Axes", **options) -> None:
    """Name the lines in a row between title and axes, where they cover nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, frameon=False, ncols=8, **options)
