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


def test_a_folder_without_train_is_reported(stage_folder):
    (stage_folder / "corpus" / "train.txt").unlink()
    assert error_line(prepare.main).startswith("corpus: no train.txt among test.txt, valid.txt: expected train.txt, ")


def test_two_files_of_one_split_are_reported(stage_folder):
    (stage_folder / "corpus" / "dev.txt").write_text("text")
    assert error_line(prepare.main).startswith("corpus: dev.txt, valid.txt: expected one file for a split")


def test_a_link_to_nothing_is_refused(stage_folder):
    (stage_folder / "corpus" / "test.txt").unlink()
    (stage_folder / "corpus" / "test.txt").symlink_to("/gone/test.txt")
    line = "corpus/test.txt: a link to /gone/test.txt, which does not exist: mend the link, or remove it"
    assert error_line(prepare.main) == line


@pytest.mark.parametrize(("text", "count"), [("one\ntwo\n", 2), ("", 0)])
def test_a_text_too_short_to_split_is_refused(stage_folder, text, count):
    (stage_folder / "corpus.txt").write_text(text)
    tiny.set_param(stage_folder, "presets.local.dataset", "corpus.txt")
    assert error_line(prepare.main) == (
        f"corpus.txt: {count} lines: expected at least three articles or three lines to split; "
        "prepare.document_separator divides a text otherwise"
    )


def test_a_separator_that_does_not_occur_is_refused(stage_folder):
    tiny.set_param(stage_folder, "prepare.document_separator", "<sep>")
    assert error_line(prepare.main) == (
        "params.yaml: prepare.document_separator: expected a string that stands in corpus, or null, not '<sep>'"
    )


@pytest.mark.parametrize("preset", ["sample", "local"])
def test_a_separator_for_documents_of_their_own_is_refused(stage_folder, preset):
    tiny.set_param(stage_folder, "preset", preset)
    (stage_folder / "rows.jsonl").write_text('{"text": "a"}\n')
    tiny.set_param(stage_folder, "presets.local.dataset", "rows.jsonl")
    tiny.set_param(stage_folder, "prepare.document_separator", "<sep>")
    assert "has documents of its own, not '<sep>'" in error_line(prepare.main)


@pytest.mark.parametrize("text", ["", " \n\n \n"], ids=["no bytes", "white space"])
@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("valid", "validation"), ("test", "test")])
def test_an_empty_split_is_reported(stage_folder, name, split, text):
    (stage_folder / "corpus" / f"{name}.txt").write_text(text)
    assert error_line(prepare.main) == f"corpus: the {split} split is empty: add text"


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (["\n"] * 8 + ["text\n"] * 2, "train split is empty: add text, or lower the shares under prepare"),
        (["text\n"] * 8 + ["\n", "text\n"], "validation split is empty: add text, or raise prepare.validation_share"),
        (["text\n"] * 9 + ["\n"], "test split is empty: add text, or raise prepare.test_share"),
    ],
)
def test_a_blank_split_that_was_cut_is_reported_with_its_share(stage_folder, lines, advice):
    (stage_folder / "a.txt").write_text("".join(lines))
    tiny.set_param(stage_folder, "presets.local.dataset", "a.txt")
    assert error_line(prepare.main) == f"a.txt: the {advice}"
