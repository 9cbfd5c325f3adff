"""What a run says before it takes hours, and a signal that ends a validation at its next batch."""

import os
import re
import shutil
import signal

import numpy as np
import pytest
import tiny
from training_runs import checkpoint_files, read_outputs, run_stage

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.scoring import log_likelihood
from gpt2lora.training import progress
from gpt2lora.training.state import History, TrainState
from stages import train


def blocks(rows: int) -> Blocks:
    return Blocks(np.zeros((rows, 9), np.uint16), np.full(rows, 9, np.int32))


def test_the_plan_names_steps_tokens_and_validations(capsys):
    progress.echo_plan(blocks(100), blocks(7), tiny.train_params(epochs=3, validations=10), 75)
    assert capsys.readouterr().out == (
        "train: 3 epochs of 25 steps, 75 steps in all, on 2,400 tokens; 11 validations on 56 tokens each\n"
    )
    progress.echo_plan(blocks(100), blocks(7), tiny.train_params(epochs=1, validations=10), 25)
    assert "train: 1 epoch of 25 steps, 25 steps in all, on 800 tokens;" in capsys.readouterr().out


def test_a_batch_of_more_rows_than_there_are_is_named(capsys):
    progress.echo_plan(blocks(100), blocks(7), tiny.train_params(batch_size=60, accumulation_steps=2), 1)
    assert "batch_size 60 x accumulation_steps 2 is more than the 100 rows of train" in capsys.readouterr().out
    progress.echo_plan(blocks(120), blocks(7), tiny.train_params(batch_size=60, accumulation_steps=2), 1)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("validation", "line"),
    [
        (60.0, "about 25 min left after step 15 of 105, 10 min of it in 10 validations"),
        (None, "about 15 min left after step 15 of 105, 10 validations not counted"),
    ],
)
def test_the_time_left_counts_steps_and_validations(monkeypatch, validation, line):
    state = TrainState(5, History([{}], 5.0, {}, 0, 0.0), [], [], [], validation_seconds=validation)
    times, lines = progress.TimeLeft(state), []
    for step in range(6, 21):
        seconds = 1000.0 if step == 6 else 1000.0 + 10 * (step - 6)  # the first step takes long
        monkeypatch.setattr(progress.time, "perf_counter", lambda seconds=seconds: seconds)
        state.step = step
        lines.append(times.after_step(state, 105, 11))
    assert list(filter(None, lines)) == [f"train: {line}"]


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (99, "99 s"), (780, "13 min"), (9000, "2.5 h")])
def test_durations_have_two_digits(seconds, text):
    assert progress.format_seconds(seconds) == text


# A signal in a validation


@pytest.fixture
def stop_in_batch(monkeypatch):
    """A function that runs train, sends it a signal while it scores a batch, and returns what it printed."""
    window_batch = log_likelihood.window_batch

    def stop(number: int) -> str:
        calls = []

        def count_and_signal(*arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            assert len(calls) <= number, "a batch after the signal"
            return window_batch(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(log_likelihood, "window_batch", count_and_signal)
            return run_stage(train.main, code=128 + signal.SIGINT)

    return stop


def test_a_signal_ends_a_validation_and_the_run_resumes_with_it(training_folder, stop_in_batch):
    tiny.set_param(training_folder, "train.batch_size", 4)  # several batches in a validation
    lines = run_stage(train.main)
    assert re.search(r"^train: about .* left after step 10 of ", lines, re.MULTILINE)
    steps = int(re.search(r"([\d,]+) steps in all", lines)[1])
    batches = -(-len(np.load("data/tokens/validation.lengths.npy")) // 4)
    expected = read_outputs(training_folder)
    shutil.rmtree("data/adapter")

    assert f"stopped after step 0 of {steps}; nothing was trained yet" in stop_in_batch(2)
    assert checkpoint_files() == []
    first = -(-steps // 5)  # the first step after which a validation is due
    assert f"stopped after step {first} of {steps}; checkpoint in" in stop_in_batch(batches + 2)
    assert f"stopped after step {first} of {steps}; checkpoint in" in stop_in_batch(1)  # in the validation left over
    run_stage(train.main)
    assert read_outputs(training_folder) == expected


@pytest.mark.parametrize(("loss", "ending"), [(3.0, "nats/token, the lowest so far\n"), (5.0, "nats/token\n")])
def test_the_lowest_loss_is_below_that_before_training(capsys, loss, ending):
    history = History([{"step": 1, "validation_loss": loss}], 4.0, {}, 0, 0.0)
    history.best = history.rows[0]
    progress.echo_validation(history, 2)
    assert capsys.readouterr().out.endswith(ending)
