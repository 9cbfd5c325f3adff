"""Pictures of the plots in dvc.yaml: columns, colors, layout, and the same bytes at every run."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from pictures import check_layout, color_share, record_axes
from PIL import Image

from gpt2lora.evaluation import passage, plots

LOSS = ("step", "tokens", "train_loss", "validation_loss", "learning_rate", "gradient_norm")
POSITIONS = ("position", "tokens", "base_loss", "tuned_loss", "base_accuracy", "tuned_accuracy")


def write_table(file: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


def loss_rows(rows: int, step: int = 85, tokens: int = 8192) -> list[tuple]:
    """Return rows of loss.csv, as of a run: the first one is before training."""
    return [(0, 0, math.nan, 5.0, math.nan, math.nan)] + [
        (n * step, n * step * tokens, 3 + 2 / n, 3.1 + 1.9 / n, 1e-3 * (1 - n / rows), 1 + math.sin(n))
        for n in range(1, rows + 1)
    ]


def position_rows(rows: int, width: int = 32) -> list[tuple]:
    """Return rows of positions.csv."""
    return [
        (1 + n * width, 900, 3.4 + 3 / (n + 1), 3.1 + 2 / (n + 1), 0.4 - 0.1 / (n + 1), 0.45 - 0.1 / (n + 1))
        for n in range(rows)
    ]


def write_tables(folder: Path) -> dict[tuple, Path]:
    """Write the table of each group of plots."""
    return {
        plots.TRAINING_PLOTS: write_table(folder / "loss.csv", LOSS, loss_rows(10)),
        plots.TEST_PLOTS: write_table(folder / "positions.csv", POSITIONS, position_rows(32)),
    }


@pytest.fixture
def tables(tmp_path) -> dict[tuple, Path]:
    return write_tables(tmp_path)


def draw_all(tables: dict[tuple, Path], folder: Path) -> dict[str, bytes]:
    """Draw all plots; return the bytes of each picture by name."""
    for group, table in tables.items():
        plots.draw_plots(group, table, folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder with all pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_all(write_tables(folder), folder / "plots")
    return folder / "plots"


# What is drawn


def test_pictures_show_the_columns_and_labels_of_dvc_yaml(tables, pictures):
    pipeline = yaml.safe_load((tiny.ROOT / "dvc.yaml").read_text())
    expected = {}
    for entry in pipeline["plots"]:
        ((name, plot),) = entry.items()
        ((x_file, x), (y_file, y)) = (*plot["x"].items(), *plot["y"].items())
        expected[name] = (x_file, x, tuple([y] if isinstance(y, str) else y), plot["title"])
        expected[name] += (plot["x_label"], plot["y_label"])
        assert x_file == y_file
    table = next(entry for entry in pipeline["stages"]["train"]["plots"] if "metrics/loss.csv" in entry)
    plot = table["metrics/loss.csv"]
    expected["gradient norm"] = ("metrics/loss.csv", plot["x"], (plot["y"],))
    expected["gradient norm"] += (plot["title"], plot["x_label"], plot["y_label"])
    assert {
        plot.name: (f"metrics/{table.name}", plot.x, plot.y, plot.title, plot.x_label, plot.y_label)
        for group, table in tables.items()
        for plot in group
    } == expected

    declared = {name for stage in pipeline["stages"].values() for entry in stage.get("plots", []) for name in entry}
    assert {f"metrics/plots/{name}" for name in os.listdir(pictures)} == {
        name for name in declared if name.endswith(".png") and name != f"metrics/plots/{passage.FILE}"
    }


def test_only_base_and_tuned_lines_have_their_colors(pictures):
    for plot in (*plots.TRAINING_PLOTS, *plots.TEST_PLOTS):
        with Image.open(pictures / plot.file) as picture:
            assert picture.size == (800, 450)
            for color in (plots.BASE_COLOR, plots.TUNED_COLOR):
                assert (color_share(picture, color) > 0.001) == (plot in plots.TEST_PLOTS), (plot.name, color)


@pytest.mark.parametrize(
    ("group", "columns", "rows"),
    [
        (plots.TRAINING_PLOTS, LOSS, loss_rows(10)),
        (plots.TRAINING_PLOTS, LOSS, loss_rows(1)),
        (plots.TRAINING_PLOTS, LOSS, loss_rows(10, step=1, tokens=7)),
        (plots.TRAINING_PLOTS, LOSS, loss_rows(200, step=5000, tokens=65536)),
        (plots.TRAINING_PLOTS, LOSS, [(5, 100, 1e-4, 1e-4, 1e-7, 1e-9), (10, 200, 1e5, 1e6, 1e-8, 1e7)]),
        (plots.TEST_PLOTS, POSITIONS, position_rows(32)),
        (plots.TEST_PLOTS, POSITIONS, position_rows(1)),
        (plots.TEST_PLOTS, POSITIONS, position_rows(32, width=4096)),
    ],
)
def test_all_texts_are_in_view_and_none_overlap(tmp_path, monkeypatch, group, columns, rows):
    with record_axes(monkeypatch) as drawn:
        plots.draw_plots(group, write_table(tmp_path / "table.csv", columns, rows), tmp_path)
    assert len(drawn) == len(group)
    for axes in drawn:
        check_layout(axes)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0"), (500, "500"), (1000, "1k"), (2500, "2.5k"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")],
)
def test_tick_labels_of_large_counts_are_short(count, expected):
    assert plots.short_number(count) == expected


def test_the_validation_loss_begins_at_step_0(tables, tmp_path, monkeypatch):
    table = tables[plots.TRAINING_PLOTS]
    with record_axes(monkeypatch) as drawn:
        plots.draw_plots(plots.TRAINING_PLOTS, table, tmp_path)
    training, validation = drawn[0].lines
    assert (validation.get_xdata()[0], validation.get_ydata()[0]) == (0, 5.0)
    assert math.isnan(training.get_ydata()[0])


# Reproducible


def test_pictures_do_not_depend_on_the_users_settings(tables, pictures, tmp_path):
    first = {file.name: file.read_bytes() for file in sorted(pictures.iterdir())}
    assert draw_all(tables, tmp_path / "again") == first
    rc = tmp_path / "matplotlibrc"
    rc.write_text("font.size: 30\naxes.facecolor: black\nlines.linewidth: 9\nsavefig.dpi: 300\n")
    code = (
        "from pathlib import Path; from gpt2lora.evaluation import plots\n"
        "plots.draw_plots(plots.TRAINING_PLOTS, Path('loss.csv'), Path('other'))\n"
        "plots.draw_plots(plots.TEST_PLOTS, Path('positions.csv'), Path('other'))"
    )
    settings = {"MATPLOTLIBRC": str(rc), "MPLBACKEND": "tkagg", "PYTHONPATH": str(tiny.ROOT), "TZ": "Asia/Tokyo"}
    tiny.run(tmp_path, sys.executable, "-c", code, **settings)
    assert {file.name: file.read_bytes() for file in sorted((tmp_path / "other").iterdir())} == first


def test_a_picture_holds_no_date_and_no_version(pictures):
    for file in pictures.iterdir():
        with Image.open(file) as picture:
            picture.load()
            assert set(picture.info) == {"dpi"}


def test_drawing_keeps_the_callers_matplotlib_settings(tables, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 5, "axes.spines.top": True}):
        draw_all(tables, tmp_path / "plots")
        assert matplotlib.rcParams["font.size"] == 5
        assert matplotlib.rcParams["axes.spines.top"] is True


# Importing matplotlib


def test_importing_stages_and_commands_loads_no_matplotlib():
    code = (
        "import sys; from stages import base, prepare, tokenize, train, evaluate\n"
        "from gpt2lora.commands import compare, dequantize, export, generate\n"
        "assert not {'matplotlib', 'PIL', 'torch'} & set(sys.modules)"
    )
    tiny.run(tiny.ROOT, sys.executable, "-c", code)


def test_matplotlib_prints_nothing_about_its_cache(tables, tmp_path):
    code = (
        "from pathlib import Path; from gpt2lora.evaluation import plots; plots.import_matplotlib()\n"
        "plots.draw_plots(plots.TEST_PLOTS, Path('positions.csv'), Path('a'))"
    )
    # A folder that cannot be created: by default matplotlib warns that its cache is elsewhere.
    variables = os.environ | {"MPLCONFIGDIR": os.devnull, "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
