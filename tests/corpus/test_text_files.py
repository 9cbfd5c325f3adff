"""Reading text files in pieces: any size of a piece gives the same text, line ends and documents."""

import gzip
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2lora.corpus import text_files
from gpt2lora.pipeline.cli import StageError

PIECES = st.lists(
    st.sampled_from(["a", "é", "😀", "\r", "\n", "\r\n", "\ufeff", "<s", "ep>", "<sep>", " "]), max_size=20
)
# Without a time in it: the workers of pytest-xdist must collect the same names.
GZIPPED = gzip.compress(b"text", mtime=0)


def read(path: Path) -> tuple[str, Counter]:
    counts = Counter()
    return "".join(text_files.read_pieces(path, counts)), counts


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_line_ends_and_byte_order_marks_are_normalized(tmp_path, monkeypatch, size):
    monkeypatch.setattr(text_files, "PIECE_BYTES", size)
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nb\r\r\nc\nd\ufeff\r".encode())
    text, counts = read(tmp_path / "a.txt")
    assert text == "é\nb\n\nc\nd\ufeff\n"
    assert counts == {"byte_order_marks": 1, "line_ends": 4}


@given(PIECES, st.integers(1, 5))
def test_the_size_of_pieces_does_not_change_text_and_documents(tmp_path_factory, pieces, size):
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes("".join(pieces).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE_BYTES", size)
        text, _ = read(file)
        found = Counter()
        documents = list(text_files.split_documents(text_files.read_pieces(file, Counter()), "<sep>", found))
    assert text == "".join(pieces).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert documents == [document.strip("\n") for document in text.split("<sep>")]
    assert found["<sep>"] == text.count("<sep>")


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize(
    ("data", "position"), [(b"ab\xc3\xa9\xff", 4), (b"ab\r\n\xf0\x9f", 4), (b"\xf0\x9fab", 0), (b"abc\xc3", 3)]
)
def test_bytes_that_are_not_utf8_are_named_with_their_position(tmp_path, monkeypatch, size, data, position):
    monkeypatch.setattr(text_files, "PIECE_BYTES", size)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(StageError, match=f"a.txt: not UTF-8 at byte {position}: .*; convert the file to UTF-8"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("name", "data", "line"),
    [
        ("a.zip", b"PK\3\4\x14\0\0\0\x08\0\xff", "holds a ZIP archive, not a text: unpack it"),
        ("a.txt", GZIPPED, "holds gzip data, not a text: decompress it"),
        ("a.txt.gz", gzip.compress(GZIPPED, mtime=0), "decompressed, it holds gzip data, not a text"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x04\x00", "holds zstd data, not a text: decompress it"),
        ("data.arrow", b"ARROW1\0\0text", "holds an Arrow table, not a text: save it as Parquet"),
        ("data.arrow", b"\xff\xff\xff\xff\x88\1\0\0", "holds an Arrow stream, not a text: give the whole folder"),
        ("a.txt", b"PAR1\x15\0\x15", "holds a Parquet table, not a text: end its name with .parquet"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_text_is_named_by_its_first_bytes(tmp_path, name, data, line):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(StageError, match=f"{name}: {line}"):
        read(tmp_path / name)


def test_a_text_may_begin_like_another_file(tmp_path):
    (tmp_path / "a.txt").write_text("PAR1 ARROW1 BZh")
    assert read(tmp_path / "a.txt")[0] == "PAR1 ARROW1 BZh"


def test_a_compressed_text_is_decompressed(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(b"one\r\ntwo\r\n" * 1000)
    assert read(tmp_path / "a.txt.gz")[0] == "one\ntwo\n" * 1000


@pytest.mark.parametrize(
    "data", [b"no gzip at all", gzip.compress(b"text" * 100, mtime=0)[:-9]], ids=["other", "truncated"]
)
def test_a_damaged_compressed_text_is_named(tmp_path, data):
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(StageError, match=r"a\.txt\.gz: damaged: "):
        read(tmp_path / "a.txt.gz")


@pytest.mark.parametrize("frames", [1, 3])
def test_zst_files_are_read_whole_or_refused(tmp_path, frames):
    """zstandard's own reader ends without a word where a file was cut."""
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"line {number} of the river\n" for number in range(30_000))
    whole = b"".join(zstandard.ZstdCompressor().compress(text.encode()) for _ in range(frames))
    file = tmp_path / "a.txt.zst"
    file.write_bytes(whole)
    assert read(file)[0] == frames * text
    for cut in (whole[:-3], whole[: len(whole) // 2], whole[:7], b"no frame at all"):
        file.write_bytes(cut)
        with pytest.raises(StageError, match=r"a.txt.zst: damaged: .*; compress the file again"):
            read(file)


def test_nul_characters_are_those_of_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("the river\n".encode("utf-16-le"))
    with pytest.raises(StageError, match=r"a.txt: holds NUL characters, as texts in UTF-16 do: convert the file"):
        read(tmp_path / "a.txt")


def test_zst_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda _: None)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    with pytest.raises(StageError, match=r"needs the package zstandard: `pip install zstandard`"):
        read(tmp_path / "a.txt.zst")
