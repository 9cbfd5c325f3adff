"""Check pictures: their colors, and whether all their texts can be read."""

import contextlib
import itertools
from collections.abc import Iterator

import numpy as np
from matplotlib.text import Text
from PIL import Image

from gpt2lora.evaluation import plots


def color_share(picture: Image.Image, color: str) -> float:
    """Return the share of a picture's pixels that have nearly this color, which is given as #rrggbb."""
    expected = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    return float((np.abs(np.asarray(picture.convert("RGB"), int) - expected).max(2) < 12).mean())


@contextlib.contextmanager
def record_axes(monkeypatch) -> Iterator[list]:
    """Yield a list to which the axes of each picture are appended once it is drawn."""
    original, drawn = plots.new_picture, []

    @contextlib.contextmanager
    def recording_new_picture(*arguments):
        with original(*arguments) as axes:
            yield axes
        drawn.append(axes)

    monkeypatch.setattr(plots, "new_picture", recording_new_picture)
    yield drawn


def check_layout(axes) -> None:
    """Check that every text is inside the picture, that no two overlap, and that the legend covers no line."""
    figure = axes.figure
    renderer = figure.canvas.get_renderer()
    legend = axes.get_legend()
    labels = [axes.xaxis.label, axes.yaxis.label, *(legend.get_texts() if legend else []), *axes.texts]
    ticks = [tick.label1 for axis in (axes.xaxis, axes.yaxis) for tick in axis._update_ticks()]
    assert len(ticks) >= 4
    texts = [text for text in (*ticks, *labels, axes._left_title) if text.get_text()]
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer)) for text in texts]
    assert len(boxes) > 5
    for name, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0, name
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, name
    for (name, box), (other_name, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (name, other_name)
    if legend:
        assert legend.get_window_extent(renderer).y0 >= axes.get_window_extent(renderer).y1
