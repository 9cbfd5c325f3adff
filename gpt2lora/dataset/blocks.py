"""Token rows: how a text becomes what the model reads, and how a batch of it is laid out.

A row is `block_size + 1` token ids: its first `block_size` are the inputs, its last `block_size` the targets.
`lengths` tells how many ids of each row are real. What follows is padding, and it is masked by length, never by
its id: GPT-2 has no padding token, so padding is <|endoftext|>, which is also a real token elsewhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2lora.pipeline.artifacts import MANIFEST, need, recorded, same
from gpt2lora.pipeline.cli import Stop

SPLITS = ("train", "validation", "test")


@dataclass
class Rows:
    """One split. ids: (rows, block_size + 1) uint16 or uint32; lengths: (rows,) int32, each at least 2."""

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def targets(self) -> int:
        """Number of predicted tokens: every real token of a row but its first."""
        return self.targets_of(slice(None))

    @property
    def width(self) -> int:
        """Number of predicted tokens in the longest row."""
        return int(self.lengths.max()) - 1

    def targets_of(self, places: np.ndarray | slice) -> int:
        """Number of predicted tokens in some of the rows."""
        lengths = self.lengths[places]
        return int(lengths.sum(dtype=np.int64)) - len(lengths)


def id_type(vocabulary_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocabulary_size <= 2**16 else np.uint32


def pack(stream: np.ndarray, block_size: int, pad: int) -> Rows:
    """Cut one stream of ids into rows, each beginning with the last id of the row before.

    So every token but the stream's first is a target exactly once, and none is dropped.
    """
    count = max(0, -(-(len(stream) - 1) // block_size))
    ids = np.full((count, block_size + 1), pad, dtype=stream.dtype)
    for row in range(count):
        piece = stream[row * block_size : (row + 1) * block_size + 1]
        ids[row, : len(piece)] = piece
    lengths = np.full(count, block_size + 1, dtype=np.int32)
    if count:
        lengths[-1] = len(stream) - (count - 1) * block_size
    return Rows(ids, lengths)


def pack_pieces(pieces: Iterable[np.ndarray], block_size: int, pad: int) -> Iterator[Rows]:
    """Yield the rows that `pack` makes of the pieces joined, as soon as they are full; the last one when all are."""
    rest = None
    for piece in pieces:
        rest = piece if rest is None else np.concatenate((rest, piece))
        edge = max(0, len(rest) - 1) // block_size * block_size
        if edge:
            yield pack(rest[: edge + 1], block_size, pad)
            rest = rest[edge:]
    if rest is not None and len(rest) > 1:
        yield pack(rest, block_size, pad)


def pad_each(texts: list[np.ndarray], block_size: int, pad: int) -> Rows:
    """Give each text a row of its own: cut to `block_size + 1` ids or padded up to it."""
    ids = np.full((len(texts), block_size + 1), pad, dtype=texts[0].dtype if texts else np.uint16)
    lengths = np.array([min(len(text), block_size + 1) for text in texts], dtype=np.int32)
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        ids[row, :length] = text[:length]
    return Rows(ids, lengths)


def save(rows: Rows, folder: Path, split: str) -> None:
    np.save(folder / f"{split}.npy", rows.ids)
    np.save(folder / f"{split}.lengths.npy", rows.lengths)


def save_parts(parts: Iterable[Rows], width: int, dtype: type, folder: Path, split: str) -> None:
    """Write the files that `save` writes of the parts joined, (rows, width), one part in memory at a time."""
    layout = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    lengths = [np.empty(0, np.int32)]
    with (folder / f"{split}.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, layout | {"shape": (0, width)})
        for part in parts:
            file.write(np.ascontiguousarray(part.ids, dtype))
            lengths.append(part.lengths)
        counts = np.concatenate(lengths)
        file.seek(0)  # NumPy leaves room in its header for the number of rows to grow
        np.lib.format.write_array_header_1_0(file, layout | {"shape": (len(counts), width)})
    np.save(folder / f"{split}.lengths.npy", counts)


def read_manifest(folder: Path, base: Path) -> dict:
    """Return the manifest of data/tokens; stop unless its arrays and the base model are those it was written of."""
    manifest = recorded(folder, "tokenize", "base", "raw", "block_size")
    need(base / "config.json", "base")
    same(base, manifest["base"], folder / MANIFEST, "base tokenize")
    return manifest


def load(folder: Path, split: str) -> Rows:
    """Open one split of data/tokens, memory-mapped."""
    files = [need(folder / f"{split}{kind}.npy", "tokenize") for kind in ("", ".lengths")]
    try:
        return Rows(np.load(files[0], mmap_mode="r"), np.load(files[1]))
    except (ValueError, EOFError) as error:
        raise Stop(f"{folder}: the {split} split is damaged ({error}): run `dvc repro --force tokenize`") from error
