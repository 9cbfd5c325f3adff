"""What all command lines share: an error is one line, and libraries leave no bars in a log."""

import pytest
import tiny

from gpt2lora.pipeline.cli import StageError


def test_an_error_of_several_lines_is_printed_as_one():
    assert StageError("one\n  two\nthree").format_message() == "one two three"


@pytest.mark.slow
def test_transformers_saves_and_loads_without_bars(tiny_model, tmp_path):
    code = (
        "from gpt2lora.pipeline.cli import configure_libraries; configure_libraries()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"AutoModelForCausalLM.from_pretrained({str(tiny_model)!r}).save_pretrained({str(tmp_path / 'saved')!r})"
    )
    assert tiny.run(tmp_path, "python", "-c", code, PYTHONPATH=str(tiny.ROOT)) == ""
