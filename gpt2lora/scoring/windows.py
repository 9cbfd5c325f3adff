"""Windows: which tokens of a text a model reads at once when it is evaluated, and which of them it is asked for.

A text of n ids has n - 1 tokens to predict: all but the first. Where it is longer than the model's context, it is
cut into windows that may overlap, and every token is predicted by one of them.
"""

from dataclasses import dataclass

import numpy as np

from gpt2lora.dataset.blocks import Rows


@dataclass
class Windows:
    """Windows over one array of ids.

    Window w reads `ids[start : start + length - 1]` and predicts `ids[start + 1 : start + length]`; the first `skip`
    of its predictions are not scored: they are there as context, and an earlier window has scored them.
    """

    ids: np.ndarray  # (tokens,) uint16 or uint32
    starts: np.ndarray  # (windows,) int64
    lengths: np.ndarray  # (windows,) int64, each at least 2
    skips: np.ndarray  # (windows,) int64, each below length - 1

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def counts(self) -> np.ndarray:
        """Number of scored predictions of each window, (windows,) int64."""
        return self.lengths - 1 - self.skips

    @property
    def contexts(self) -> np.ndarray:
        """For each scored token, in the order of the windows: how many tokens it is predicted from, at least 1."""
        return spans(self.skips, self.counts) + 1

    @property
    def targets(self) -> np.ndarray:
        """The scored tokens' ids, in the order of the windows."""
        return self.ids[spans(self.starts + self.skips, self.counts) + 1]


def slide(texts: list[np.ndarray], context: int, stride: int) -> Windows:
    """Lay windows over each text by itself: `context` tokens are read, and each window starts `stride` after the last.

    A text's first window is scored as a whole, a later one where the window before has not been. So every token but
    a text's first is predicted once, from at least `context - stride + 1` tokens where the text has as many.
    """

    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = 1 + max(0, -(-(length - 1 - context) // stride))
        starts = np.arange(count) * stride
        ends = np.minimum(starts + context + 1, length)
        skips = np.where(starts > 0, context - stride, 0)
        return starts, ends - starts, skips

    return _lay(texts, places)


def roll(texts: list[np.ndarray], context: int) -> Windows:
    """Lay windows as `slide` does at a stride of `context`, but start each text's last one earlier, so that it is full.

    These are lm-evaluation-harness's rolling windows, with a text's first id in the place of its prefix token.
    """

    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = -(-(length - 1) // context)
        firsts = np.arange(count) * context
        ends = np.minimum(firsts + context, length - 1)
        starts = np.maximum(ends - context, 0)
        return starts, ends - starts + 1, firsts - starts

    return _lay(texts, places)


def of_rows(rows: Rows) -> Windows:
    """Each row by itself, as it is trained."""
    width = rows.ids.shape[1]
    starts = np.arange(len(rows), dtype=np.int64) * width
    return Windows(rows.ids.reshape(-1), starts, rows.lengths.astype(np.int64), np.zeros_like(starts))


def unpack(rows: Rows) -> np.ndarray:
    """Return the stream of ids that `rows.pack` cut into rows."""
    return np.concatenate([rows.ids[0, :1], rows.ids[:, 1:].reshape(-1)[: rows.targets]])


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., start + count - 1 for each pair, one after the other: (sum of counts,) int64."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _lay(texts: list[np.ndarray], places) -> Windows:
    """Put the texts one after the other, and on each the windows that `places` gives for its length."""
    texts = [text for text in texts if len(text) > 1]
    found, offset = [np.empty((3, 0), np.int64)], 0
    for text in texts:
        starts, lengths, skips = places(len(text))
        found.append(np.stack([starts + offset, lengths, skips]))
        offset += len(text)
    ids = np.concatenate(texts) if texts else np.empty(0, np.uint16)
    return Windows(ids, *np.concatenate(found, axis=1))
