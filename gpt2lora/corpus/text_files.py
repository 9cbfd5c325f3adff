"""Text files of a user, read in pieces: decompressed, decoded from UTF-8, with their line ends normalized."""

import codecs
import gzip
import importlib.util
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from gpt2lora.pipeline.cli import StageError

PIECE_BYTES = 1_000_000
COMPRESSED = (".gz", ".zst")
BYTE_ORDER_MARK = "\ufeff"


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


def decode(path: Path) -> Iterator[str]:
    """Yield the text of a UTF-8 file in pieces, line ends unchanged."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with open_decompressed(path) as file:
        while True:
            data = read(file, path)
            start = position - len(decoder.getstate()[0])  # the decoder holds the beginning of a character back
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise StageError(
                    f"{path}: not UTF-8 at byte {start + error.start:,}: {error.reason}; convert the file to UTF-8"
                ) from error
            position += len(data)
            if not data:
                return


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file, by its suffix one that is compressed."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        require_zstandard(path)
        import zstandard

        return zstandard.open(path)
    return path.open("rb")


def read(file: BinaryIO, path: Path) -> bytes:
    """Return the next bytes of a file."""
    try:
        return file.read(PIECE_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise StageError(f"{path}: damaged: {error}; compress the file again") from error
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise StageError(f"{path}: damaged: {error}; compress the file again") from error
        raise


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
