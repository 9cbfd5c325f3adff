"""A corpus that prepare cannot read: one line, and earlier outputs unchanged."""

import pytest
import tiny
from bad_input import error_line

from stages import prepare


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_text_that_is_not_utf8_is_reported_with_file_and_byte(stage_folder, name):
    file = stage_folder / "corpus" / f"{name}.txt"
    text = file.read_bytes()
    file.write_bytes(text[:1234] + b"\xff" + text[1234:])
    assert error_line(prepare.main).startswith(f"corpus/{name}.txt: not UTF-8 at byte 1,234: ")


def test_a_single_file_that_is_not_utf8_is_reported(stage_folder):
    (stage_folder / "corpus.txt").write_bytes("naïve".encode("latin-1"))
    tiny.set_param(stage_folder, "presets.local.dataset", "corpus.txt")
    assert error_line(prepare.main).startswith("corpus.txt: not UTF-8 at byte 2: ")


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_missing_split_is_reported(stage_folder, name):
    (stage_folder / "corpus" / f"{name}.txt").unlink()
    expected = "validation.txt or valid.txt or dev.txt" if name == "valid" else f"{name}.txt"
    assert error_line(prepare.main).startswith(f"corpus: no {expected}: expected train.txt, ")


@pytest.mark.parametrize("text", ["", " \n\n \n"], ids=["no bytes", "white space"])
@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("valid", "validation"), ("test", "test")])
def test_an_empty_split_is_reported(stage_folder, name, split, text):
    (stage_folder / "corpus" / f"{name}.txt").write_text(text)
    line = f"corpus: the {split} split is empty: add text, or raise the shares under prepare"
    assert error_line(prepare.main) == line
