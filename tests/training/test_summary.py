"""The result line of train, with a warning if training did not help."""

import pytest

from gpt2lora.training import summary


@pytest.mark.parametrize("change", [0.0, 0.1, -0.1])
def test_a_run_no_better_than_the_base_prints_a_warning(capsys, change):
    record = {"start_validation_loss": 5.0, "best_validation_loss": 5.0 + change}
    record |= {"best_step": 1, "trainable_parameters": 1}
    summary.echo_result(record, {"tokens_per_second": 1, "peak_memory_bytes": 1})
    warning = "train: warning: no better than before training; lower train.learning_rate or train for more epochs\n"
    assert capsys.readouterr().out.endswith(warning) == (change >= 0)
