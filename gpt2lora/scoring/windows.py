"""Windows: which tokens of a text the model reads at once in evaluation, and which of them are scored.

A text longer than the model's context is cut into windows, which may overlap; each token is scored in exactly one of
them. Before the tokens of a window the model reads a prefix: what its tokenizer puts before a text, such as <bos>, or
nothing. Without a prefix the first token of a text is never scored: there is nothing to predict it from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2lora.dataset.blocks import Blocks


@dataclass
class Windows:
    """Windows over one array of ids.

    A window reads the prefix and `ids[start : start + length - 1]`. It scores `ids[start + skip : start + length]`: its
    first `skip` ids serve as context only, because an earlier window scored them, or because nothing precedes them.
    """

    ids: np.ndarray  # (tokens,) uint16 or uint32
    starts: np.ndarray  # (windows,) int64
    lengths: np.ndarray  # (windows,) int64, with the prefix each at least 2
    skips: np.ndarray  # (windows,) int64, each below length; at least 1 without a prefix
    prefix: Sequence[int] = ()  # ids before each window

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def counts(self) -> np.ndarray:
        """Number of scored tokens of each window, (windows,) int64."""
        return self.lengths - self.skips

    @property
    def reads(self) -> np.ndarray:
        """Number of tokens that the model reads in each window, the prefix included, (windows,) int64."""
        return len(self.prefix) + self.lengths - 1

    @property
    def contexts(self) -> np.ndarray:
        """Number of tokens from which each scored token is predicted, in the order of the windows, (tokens,) int64."""
        return concatenate_ranges(len(self.prefix) + self.skips, self.counts)

    @property
    def targets(self) -> np.ndarray:
        """Ids of the scored tokens, in the order of the windows, (tokens,)."""
        return self.ids[concatenate_ranges(self.starts + self.skips, self.counts)]


def sliding_windows(texts: list[np.ndarray], context: int, stride: int, prefix: Sequence[int] = ()) -> Windows:
    """Return windows of `context` tokens over each text, each starting `stride` tokens after the one before.

    The first window of a text is scored completely, a later one only where the window before was not. So every token
    is scored once, from at least `context - stride + 1` tokens if the text has as many before it.

    Args:
        context: tokens that the model reads at once, the prefix included. With a prefix the stride is shortened by it
            where windows would not touch.
    """
    first = 0 if prefix else 1  # the first id of a text that is scored
    width = context - len(prefix) + 1  # ids of a window
    stride = min(stride, width - first)

    def layout(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = 1 + max(0, -(-(length - width) // stride))
        starts = np.arange(count) * stride
        ends = np.minimum(starts + width, length)
        skips = np.where(starts > 0, width - stride, first)
        return starts, ends - starts, skips

    return _place_windows(texts, layout, prefix)


def rolling_windows(texts: list[np.ndarray], context: int) -> Windows:
    """Return windows at a stride of `context` over each text; the last one is shifted left to be full.

    These are the rolling windows of lm-evaluation-harness, whose prefix token is the text's first id here.
    """

    def layout(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = -(-(length - 1) // context)
        firsts = np.arange(count) * context
        ends = np.minimum(firsts + context, length - 1)
        starts = np.maximum(ends - context, 0)
        return starts, ends - starts + 1, firsts - starts + 1

    return _place_windows(texts, layout, ())


def block_windows(blocks: Blocks) -> Windows:
    """Return one window for each row, as in training."""
    width = blocks.ids.shape[1]
    starts = np.arange(len(blocks), dtype=np.int64) * width
    skips = np.full_like(starts, blocks.context)
    return Windows(blocks.ids.reshape(-1), starts, blocks.lengths.astype(np.int64), skips)


def unpack_stream(blocks: Blocks, prefix: Sequence[int]) -> np.ndarray:
    """Return the stream of ids, (tokens,), that `pack_blocks` cut into blocks."""
    targets = blocks.ids[:, blocks.context :].reshape(-1)[: blocks.targets]
    return targets if prefix else np.concatenate([blocks.ids[0, :1], targets])


def concatenate_ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ..., start + count - 1 for each pair, concatenated: (sum of counts,) int64."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def _place_windows(texts: list[np.ndarray], layout: Callable[[int], tuple], prefix: Sequence[int]) -> Windows:
    """Concatenate the texts, and place on each the windows that `layout` returns for its length."""
    texts = [text for text in texts if len(text) + len(prefix) > 1 and len(text)]
    found, offset = [np.empty((3, 0), np.int64)], 0
    for text in texts:
        starts, lengths, skips = layout(len(text))
        found.append(np.stack([starts + offset, lengths, skips]))
        offset += len(text)
    ids = np.concatenate(texts) if texts else np.empty(0, np.uint16)
    return Windows(ids, *np.concatenate(found, axis=1), prefix)
