"""Draw the plots of dvc.yaml as PNG files, which need no network: DVC's own page loads its drawing library from a CDN.

The same table gives the same bytes: a file holds no date and no version, and a user's matplotlib settings are ignored.
"""

import contextlib
import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSAGE = "passage.png"  # drawn by gpt2lora/evaluation/passage.py
SIZE, DPI = (8.0, 4.5), 100  # inches, pixels per inch
PALETTE = 128  # colours of a picture: enough for smooth text, at a third of the bytes, which git keeps for every run
BASE_COLOR, TUNED_COLOR = "#6c757d", "#d9480f"
# For each column its label, colour, line style and marker.
LINES = {
    "train_loss": ("training", "#74a9cf", "-", "o"),
    "validation_loss": ("validation", "#08519c", "-", "s"),
    "learning_rate": ("", "#08519c", "-", "o"),
    "gradient_norm": ("", "#08519c", "-", "o"),
    "base_loss": ("base", BASE_COLOR, "--", "s"),
    "tuned_loss": ("tuned", TUNED_COLOR, "-", "o"),
    "base_accuracy": ("base", BASE_COLOR, "--", "s"),
    "tuned_accuracy": ("tuned", TUNED_COLOR, "-", "o"),
}


@dataclass(frozen=True)
class Plot:
    """A plot of dvc.yaml. In the name of its file, spaces are replaced by underscores."""

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
TRAINING_PLOTS = (
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
TEST_PLOTS = (
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


def import_matplotlib() -> None:
    """Import matplotlib, which takes half a second."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports building its font cache
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.PngImagePlugin"):
        import_module(name)


def draw_plots(plots: tuple[Plot, ...], table: Path, folder: Path) -> None:
    """Draw plots of the CSV file `table`, each as a PNG file in `folder`."""
    columns = read_columns(plots, table)
    for plot in plots:
        with new_picture(folder / plot.file, plot.title) as axes:
            for column in plot.y:
                label, color, line, marker = LINES[column]
                style = {"color": color, "marker": marker, "markersize": 4, "clip_on": False}
                axes.plot(columns[plot.x], columns[column], line, label=label, **style)
            if len(plot.y) > 1:
                draw_legend(axes)
            axes.set(xlabel=plot.x_label, ylabel=plot.y_label)
            axes.set_xlim(left=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter(short_number if plot.x == "tokens" else "{x:,.0f}")
            if plot.y[0] in ("learning_rate", "gradient_norm"):
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter("{x:g}")


def read_columns(plots: tuple[Plot, ...], table: Path) -> dict[str, list[float]]:
    """Return the columns of a CSV file that the plots show.

    Raises:
        StageError: a column is missing, or holds something else than numbers.
    """
    names = {name for plot in plots for name in (plot.x, *plot.y)}
    try:
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in names}
    except (KeyError, ValueError, TypeError) as error:
        raise StageError(f"{table} is damaged ({error}): run `dvc repro --force train`") from error


def short_number(count: float, position: int | None = None) -> str:
    """Return a round count for a tick label: 500, 20k, 1.5M. Matplotlib passes the tick's position as well."""
    size, sign = next((pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if count >= pair[0]), (1, ""))
    return f"{count / size:g}{sign}"


@contextlib.contextmanager
def new_picture(file: Path, title: str, size: tuple[float, float] = SIZE) -> "Iterator[Axes]":
    """Yield empty axes; at the end of the block the picture is written to `file` as PNG."""
    import_matplotlib()
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: it opens windows, keeps state, and takes twice as long to import
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
    with atomic_output(file) as new:
        pixels.quantize(PALETTE, dither=Image.Dither.NONE).save(new, "PNG", optimize=True, dpi=(DPI, DPI))


def draw_legend(axes: "Axes", **options) -> None:
    """Draw the legend in a row between title and axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, frameon=False, ncols=8, **options)
