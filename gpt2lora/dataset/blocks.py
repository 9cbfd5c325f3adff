"""Blocks of token ids: the layout of the arrays in data/tokens, and how they are written and read.

A block is a row of `block_size + 1` token ids. Its first `block_size` ids are inputs, its last `block_size` ids are
targets. `lengths` holds how many ids of each row are real; the rest is padding. Padding is masked by length, never by
id: GPT-2 has no padding token, so rows are padded with <|endoftext|>, which is a real token elsewhere.

If the tokenizer puts ids such as <bos> before a text, each row begins with them: a model that was trained so predicts
badly without. They are this row's prefix, context that is never a target.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2lora.pipeline.artifacts import MANIFEST, read_verified_manifest, require_file, verify_digests
from gpt2lora.pipeline.cli import StageError

SPLITS = ("train", "validation", "test")


@dataclass
class Blocks:
    """One split. ids: (rows, block_size + 1) uint16 or uint32; lengths: (rows,) int32, each at least 2.

    The first `context` ids of each row are no targets: the prefix, or without one the row's first id.
    """

    ids: np.ndarray
    lengths: np.ndarray
    context: int = 1

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def targets(self) -> int:
        """Number of target tokens: every real token of a row except its first, or its prefix."""
        return self.count_targets(slice(None))

    @property
    def width(self) -> int:
        """Number of input tokens in the longest row."""
        return int(self.lengths.max()) - 1

    def count_targets(self, rows: np.ndarray | slice) -> int:
        """Number of target tokens in some of the rows."""
        lengths = self.lengths[rows]
        return int(lengths.sum(dtype=np.int64)) - self.context * len(lengths)


def token_dtype(vocabulary_size: int) -> type[np.unsignedinteger]:
    """Return the smallest of uint16 and uint32 that holds all token ids."""
    return np.uint16 if vocabulary_size <= 2**16 else np.uint32


def pack_blocks(stream: np.ndarray, block_size: int, pad: int, prefix: Sequence[int] = ()) -> Blocks:
    """Cut a stream of ids, (tokens,), into blocks.

    With a prefix each block begins with it, and every token of the stream is a target exactly once. Without one, each
    block begins with the last id of the one before, and every token except the stream's first is a target once.
    """
    first, lead = 0 if prefix else 1, len(prefix)
    context = max(1, lead)
    step = block_size + 1 - context  # targets of a row
    count = max(0, -(-(len(stream) - first) // step))
    ids = np.full((count, block_size + 1), pad, dtype=stream.dtype)
    ids[:, :lead] = prefix
    for row in range(count):
        piece = stream[row * step : (row + 1) * step + first]
        ids[row, lead : lead + len(piece)] = piece
    lengths = np.full(count, block_size + 1, dtype=np.int32)
    if count:
        lengths[-1] = lead + len(stream) - (count - 1) * step
    return Blocks(ids, lengths, context)


def pack_stream(
    pieces: Iterable[np.ndarray], block_size: int, pad: int, prefix: Sequence[int] = ()
) -> Iterator[Blocks]:
    """Yield the blocks that `pack_blocks` makes of the joined pieces as soon as they are full, and the last one."""
    first, step = 0 if prefix else 1, block_size + 1 - max(1, len(prefix))
    rest = None
    for piece in pieces:
        rest = piece if rest is None else np.concatenate((rest, piece))
        edge = max(0, len(rest) - first) // step * step
        if edge:
            yield pack_blocks(rest[: edge + first], block_size, pad, prefix)
            rest = rest[edge:]
    if rest is not None and len(rest) > first:
        yield pack_blocks(rest, block_size, pad, prefix)


def pad_texts(texts: list[np.ndarray], block_size: int, pad: int, prefix: Sequence[int] = ()) -> Blocks:
    """Give each text, (tokens,) ids, a block of its own after the prefix: truncated to the block, or padded."""
    lead = len(prefix)
    room = block_size + 1 - lead
    ids = np.full((len(texts), block_size + 1), pad, dtype=texts[0].dtype if texts else np.uint16)
    ids[:, :lead] = prefix
    lengths = np.array([lead + min(len(text), room) for text in texts], dtype=np.int32)
    for row, text in enumerate(texts):
        ids[row, lead : lengths[row]] = text[:room]
    return Blocks(ids, lengths, max(1, lead))


def save_blocks(blocks: Blocks, folder: Path, split: str) -> None:
    """Write the two arrays of a split."""
    np.save(folder / f"{split}.npy", blocks.ids)
    np.save(folder / f"{split}.lengths.npy", blocks.lengths)


def save_stream(parts: Iterable[Blocks], width: int, dtype: type, folder: Path, split: str) -> None:
    """Write what `save_blocks` writes for the joined parts, (rows, width), with one part in memory at a time."""
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    lengths = [np.empty(0, np.int32)]
    with (folder / f"{split}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, layout | {"shape": (0, width)})
        for part in parts:
            file.write(np.ascontiguousarray(part.ids, dtype))
            lengths.append(part.lengths)
        counts = np.concatenate(lengths)
        file.seek(0)  # NumPy's header has room for the number of rows to grow
        np.lib.format.write_array_header_1_0(file, layout | {"shape": (len(counts), width)})
    np.save(folder / f"{split}.lengths.npy", counts)


def read_token_manifest(folder: Path, base: Path) -> dict:
    """Return the manifest of data/tokens after comparing the arrays, and the base model, with the digests it holds."""
    manifest = read_verified_manifest(folder, "tokenize", "base", "raw", "block_size", "prefix", "special_tokens")
    require_file(base / "config.json", "base")
    verify_digests(base, manifest["base"], folder / MANIFEST, "base tokenize")
    return manifest


def load_blocks(folder: Path, split: str, prefix: Sequence[int]) -> Blocks:
    """Open one split of data/tokens, memory-mapped. prefix: as in the manifest, ids at the start of each row."""
    files = [require_file(folder / f"{split}{suffix}.npy", "tokenize") for suffix in ("", ".lengths")]
    try:
        return Blocks(np.load(files[0], mmap_mode="r"), np.load(files[1]), max(1, len(prefix)))
    except (ValueError, EOFError) as error:
        raise StageError(
            f"{folder}: the {split} split is damaged ({error}): run `dvc repro --force tokenize`"
        ) from error
