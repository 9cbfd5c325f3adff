"""What a picture shows: its colours, and whether all its texts can be read."""

import contextlib
import itertools

import numpy as np
from matplotlib.text import Text
from PIL import Image

from gpt2lora.evaluation import plots


def share(picture: Image.Image, colour: str) -> float:
    """Return the share of a picture's pixels that have a colour, as the eye tells it."""
    wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
    return float((np.abs(np.asarray(picture.convert("RGB"), int) - wanted).max(2) < 12).mean())


@contextlib.contextmanager
def watched(monkeypatch, seen: list):
    """Keep the axes that are drawn on."""
    original = plots.new_picture

    @contextlib.contextmanager
    def watching(*given):
        with original(*given) as axes:
            yield axes
        seen.append(axes)

    monkeypatch.setattr(plots, "new_picture", watching)
    yield


def check_layout(axes) -> None:
    """Every text lies inside the picture, none on another, the legend not on the lines."""
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
    for (name, box), (other, second) in itertools.combinations(boxes, 2):
        assert not box.overlaps(second), (name, other)
    if legend:
        assert legend.get_window_extent(renderer).y0 >= axes.get_window_extent(renderer).y1
