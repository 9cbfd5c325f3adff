"""Pictures: the plots of dvc.yaml, the same bytes for the same table, all of it in view and no text on another."""

import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from pictures import check_layout, share, watched
from PIL import Image

from gpt2lora.evaluation import plots

LOSS = ("step", "tokens", "train_loss", "validation_loss", "learning_rate", "gradient_norm")
POSITIONS = ("position", "tokens", "base_loss", "tuned_loss", "base_accuracy", "tuned_accuracy")


def write(file: Path, columns: tuple[str, ...], rows: list[tuple]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return file


def curve(rows: int, step: int = 85, tokens: int = 8192) -> list[tuple]:
    """Rows of loss.csv as a run might leave them."""
    return [
        (n * step, n * step * tokens, 3 + 2 / n, 3.1 + 1.9 / n, 1e-3 * (1 - n / rows), 1 + math.sin(n))
        for n in range(1, rows + 1)
    ]


def places(rows: int, width: int = 32) -> list[tuple]:
    """Rows of positions.csv."""
    return [
        (1 + n * width, 900, 3.4 + 3 / (n + 1), 3.1 + 2 / (n + 1), 0.4 - 0.1 / (n + 1), 0.45 - 0.1 / (n + 1))
        for n in range(rows)
    ]


@pytest.fixture
def tables(tmp_path) -> dict[tuple, Path]:
    return {
        plots.TRAINING_PLOTS: write(tmp_path / "loss.csv", LOSS, curve(10)),
        plots.TEST_PLOTS: write(tmp_path / "positions.csv", POSITIONS, places(32)),
    }


def drawn(tables: dict[tuple, Path], folder: Path) -> dict[str, bytes]:
    for wanted, table in tables.items():
        plots.draw_plots(wanted, table, folder)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# What is drawn


def test_every_plot_of_dvc_yaml_is_a_picture_of_the_same_columns_and_words(tables, tmp_path):
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
        for wanted, table in tables.items()
        for plot in wanted
    } == expected

    declared = {name for stage in pipeline["stages"].values() for entry in stage.get("plots", []) for name in entry}
    assert {f"metrics/plots/{name}" for name in drawn(tables, tmp_path / "plots")} == {
        name for name in declared if name.endswith(".png")
    }


def test_base_and_tuned_have_their_colours_and_no_other_line_has_them(tables, tmp_path):
    drawn(tables, tmp_path / "plots")
    for plot in (*plots.TRAINING_PLOTS, *plots.TEST_PLOTS):
        with Image.open(tmp_path / "plots" / plot.file) as picture:
            assert picture.size == (800, 450)
            for colour in (plots.BASE_COLOR, plots.TUNED_COLOR):
                assert (share(picture, colour) > 0.001) == (plot in plots.TEST_PLOTS), (plot.name, colour)


@pytest.mark.parametrize(
    ("wanted", "columns", "rows"),
    [
        (plots.TRAINING_PLOTS, LOSS, curve(10)),
        (plots.TRAINING_PLOTS, LOSS, curve(1)),
        (plots.TRAINING_PLOTS, LOSS, curve(10, step=1, tokens=7)),
        (plots.TRAINING_PLOTS, LOSS, curve(200, step=5000, tokens=65536)),
        (plots.TRAINING_PLOTS, LOSS, [(5, 100, 1e-4, 1e-4, 1e-7, 1e-9), (10, 200, 1e5, 1e6, 1e-8, 1e7)]),
        (plots.TEST_PLOTS, POSITIONS, places(32)),
        (plots.TEST_PLOTS, POSITIONS, places(1)),
        (plots.TEST_PLOTS, POSITIONS, places(32, width=4096)),
    ],
)
def test_all_texts_are_in_view_and_none_covers_another(tmp_path, monkeypatch, wanted, columns, rows):
    seen: list = []
    with watched(monkeypatch, seen):
        plots.draw_plots(wanted, write(tmp_path / "table.csv", columns, rows), tmp_path)
    assert len(seen) == len(wanted)
    for axes in seen:
        check_layout(axes)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0"), (500, "500"), (1000, "1k"), (2500, "2.5k"), (20_000, "20k"), (1.5e6, "1.5M"), (2e9, "2G")],
)
def test_counts_on_an_axis_are_short(count, expected):
    assert plots.short_number(count) == expected


# The same bytes


def test_the_same_table_gives_the_same_bytes_whatever_the_user_set_up(tables, tmp_path):
    first = drawn(tables, tmp_path / "first")
    assert drawn(tables, tmp_path / "again") == first
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


def test_no_date_and_no_version_stands_in_a_picture(tables, tmp_path):
    drawn(tables, tmp_path / "plots")
    for file in (tmp_path / "plots").iterdir():
        with Image.open(file) as picture:
            picture.load()
            assert set(picture.info) == {"dpi"}


def test_matplotlib_s_settings_stay_the_caller_s(tables, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 5, "axes.spines.top": True}):
        drawn(tables, tmp_path / "plots")
        assert matplotlib.rcParams["font.size"] == 5
        assert matplotlib.rcParams["axes.spines.top"] is True


# What it costs, and what it says


def test_matplotlib_is_loaded_where_it_draws_and_nowhere_else():
    code = (
        "import sys; from stages import base, prepare, tokenize, train, evaluate\n"
        "from gpt2lora.commands import compare, dequantize, export, generate\n"
        "assert not {'matplotlib', 'PIL', 'torch'} & set(sys.modules)"
    )
    tiny.run(tiny.ROOT, sys.executable, "-c", code)


def test_matplotlib_says_nothing_of_its_caches(tables, tmp_path):
    code = (
        "from pathlib import Path; from gpt2lora.evaluation import plots; plots.import_matplotlib()\n"
        "plots.draw_plots(plots.TEST_PLOTS, Path('positions.csv'), Path('a'))"
    )
    # A folder that cannot be made: matplotlib warns that it makes its cache elsewhere.
    variables = os.environ | {"MPLCONFIGDIR": os.devnull, "PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
