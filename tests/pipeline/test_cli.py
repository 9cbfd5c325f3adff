"""What all command lines share: an error is one line."""

from gpt2lora.pipeline.cli import StageError


def test_an_error_of_several_lines_is_printed_as_one():
    assert StageError("one\n  two\nthree").format_message() == "one two three"
