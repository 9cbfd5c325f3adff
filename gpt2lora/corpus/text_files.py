"""Text files of a user, read in pieces: decompressed, decoded from UTF-8, with their line ends normalized."""

import codecs
import functools
import gzip
import importlib.util
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2lora.pipeline.cli import StageError

PIECE_BYTES = 1_000_000
COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = "\ufeff"
# The first bytes of files that are no text, what they are, and what to do.
OTHER_FILES = {
    b"PK\3\4": ("a ZIP archive", "unpack it, and name the text or table in it"),
    b"\x1f\x8b": ("gzip data", "decompress it"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "decompress it"),
    b"BZh": ("bzip2 data", "decompress it"),
    b"\xfd7zXZ\0": ("xz data", "decompress it"),
    b"PAR1": ("a Parquet table", "end its name with .parquet"),
    b"ARROW1": ("an Arrow table", "save it as Parquet, or as a folder by save_to_disk of datasets"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "give the whole folder of save_to_disk, or save it as Parquet"),
    b"%PDF-": ("a PDF document", "save it as plain text"),
}


def read_pieces(path: Path, counts: Counter) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces. CRLF and CR become LF; a byte order mark is left out.

    Args:
        counts: "line_ends" and "byte_order_marks", what was normalized, are added to.
    """
    first, held = True, ""
    for piece in filter(None, decode(path)):
        if first and piece.startswith(BYTE_ORDER_MARK):
            piece = piece[1:]
            counts["byte_order_marks"] += 1
        piece, first = held + piece, False
        held = "\r" if piece.endswith("\r") else ""  # the next piece may begin with the LF of a CRLF
        yield normalize_line_ends(piece[: len(piece) - len(held)], counts)
    yield normalize_line_ends(held, counts)


def normalize_line_ends(text: str, counts: Counter) -> str:
    """Return the text with LF for CRLF and CR; counts["line_ends"] is added to."""
    if found := text.count("\r"):
        counts["line_ends"] += found
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, LF, CRLF or CR; a byte order mark is left out."""
    held = ""
    for number, piece in enumerate(decode(path)):
        text = held + (piece if number else piece.removeprefix(BYTE_ORDER_MARK))
        end = 1 + max(text.rfind("\n"), text.rfind("\r", 0, -1))  # LF may follow a CR at the end
        yield from io.StringIO(text[:end], newline="")
        held = text[end:]
    yield from io.StringIO(held, newline="")


def decode(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces, line ends unchanged."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    for data in read_bytes(path):
        start = position - len(decoder.getstate()[0])  # the decoder holds the beginning of a character back
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            refuse_other_files(path)
            raise StageError(
                f"{path}: not UTF-8 at byte {start + error.start:,}: {error.reason}; convert the file to UTF-8"
            ) from error
        if "\0" in text:
            refuse_other_files(path)
            raise StageError(f"{path}: holds NUL characters, as texts in UTF-16 do: convert the file to UTF-8")
        yield text
        position += len(data)


def refuse_other_files(path: Path) -> None:
    """Refuse a file whose first bytes, decompressed by its suffix, are those of no text."""
    first = b"".join(itertools.islice(read_bytes(path), 8))
    inside = "decompressed, it " if path.suffix.lower() in COMPRESSED else ""
    for start, (kind, advice) in OTHER_FILES.items():
        if first.startswith(start):
            raise StageError(f"{path}: {inside}holds {kind}, not a text: {advice}")


def read_bytes(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces, decompressed by its suffix, and b"" at the end."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            if path.suffix.lower() == ".zst":
                yield from decompress_zstandard(file, path)
            else:
                yield from iter(functools.partial(file.read, PIECE_BYTES), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise damaged(path, error) from error
    yield b""


def decompress_zstandard(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the content of the frames of a .zst file. Its own reader takes any end for the file's."""
    require_zstandard(path)
    import zstandard

    frame = None
    while data := file.read(PIECE_BYTES // 16):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise damaged(path, error) from error
            data = frame.unused_data
            if frame.eof:
                frame = None
    if frame:
        raise damaged(path, "it ends within a frame")


def damaged(path: Path, why: object) -> StageError:
    return StageError(f"{path}: damaged: {why}; compress the file again")


def require_zstandard(path: Path) -> None:
    """Refuse a .zst file where the package that reads it is not installed."""
    if importlib.util.find_spec("zstandard") is None:
        raise StageError(f"{path}: needs the package zstandard: `pip install zstandard`, or decompress the file")


def split_documents(pieces: Iterable[str], separator: str, found: Counter) -> Iterator[str]:
    """Yield the documents between separators. The line ends around a separator belong to it.

    Args:
        found: the number of separators is added to it.
    """
    held, tail = [], ""  # of a document that has not ended: its end may be the beginning of a separator
    for piece in pieces:
        first, *others = (tail + piece).split(separator)
        found[separator] += len(others)
        for other in others:
            yield "".join([*held, first]).strip("\n")
            held, first = [], other
        edge = max(0, len(first) - len(separator) + 1)
        held.append(first[:edge])
        tail = first[edge:]
    yield "".join([*held, tail]).strip("\n")
