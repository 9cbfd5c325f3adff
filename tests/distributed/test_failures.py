"""A process of a group fails: all end within 30 s, one line says why, and nothing is half written."""

import re
import signal
import time
from datetime import timedelta

import pytest
import tiny
from training_runs import read_outputs

from gpt2lora.distributed import group
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import checkpoint

AT_STEP_5 = """
import errno, os, signal
from datetime import timedelta
from gpt2lora.distributed import facts, failure, group
from gpt2lora.training import checkpoint, loop

failure.GRACE = 1.0

def at_step_5(action):
    def lr_and_action(step, *others):
        if step == 5:
            action()
        return lr_at_step(step, *others)

    lr_at_step, loop.lr_at_step = loop.lr_at_step, lr_and_action

def send(number):
    at_step_5(lambda: os.kill(os.getpid(), number))

def fail(error):
    def raise_error(*_):
        raise error
    return raise_error
"""


@pytest.fixture
def fail_group(training_folder, run_group):
    """A function that runs train in two processes with some code first; it returns all errors that were printed."""
    for key, value in {"train.accumulation_steps": 2, "train.batch_size": 8}.items():
        tiny.set_param(training_folder, key, value)

    def run(setup: str, stopped: int = 0) -> list[str]:
        result = run_group(training_folder, "train", 2, setup=AT_STEP_5 + setup)
        assert result["seconds"] < 30
        assert all(result["codes"]), result["printed"]
        if stopped:
            assert result["codes"] == [128 + stopped] * 2
        assert not (training_folder / "data/adapter").exists()
        for file in training_folder.glob("data/.checkpoints/*/[0-9]*"):
            assert checkpoint.short_digest(file.read_bytes()) == file.stem.split("-")[1]
        lines = [line for printed in result["printed"] for line in printed.splitlines()]
        assert not any("Traceback" in line for line in lines), lines
        return [line for line in lines if line.startswith("Error: ") or "stopped after" in line]

    return run


SLOW = pytest.mark.slow
FAILURES = [
    ("if rank == 1: send(signal.SIGKILL)", "rank 1 of 2 ended without a word"),
    pytest.param("if rank == 0: send(signal.SIGKILL)", "rank 0 of 2 ended", marks=SLOW),
    pytest.param(
        'if rank == 1: at_step_5(fail(RuntimeError("DefaultCPUAllocator: can\'t allocate memory")))',
        "Error: rank 1 of 2: out of memory on the CPU",
        marks=SLOW,
    ),
    pytest.param(
        "if rank == 0: checkpoint.Checkpoints.write_file = fail(OSError(errno.ENOSPC, 'No space left on device'))",
        "Error: rank 0 of 2: No space left on device",
        marks=SLOW,
    ),
    pytest.param(
        "group.TIMEOUT = timedelta(seconds=5)\nif rank == 1: send(signal.SIGSTOP)",
        "rank 1 of 2 does not answer",
        marks=SLOW,
    ),
    pytest.param(
        "at_step_5(fail(group.StageError('the same in all')))", "Error: rank 0 of 2: the same in all", marks=SLOW
    ),
]


@pytest.mark.parametrize(("setup", "expected"), FAILURES)
def test_a_failure_ends_all_processes_in_one_line(fail_group, setup, expected):
    (line,) = fail_group(setup)
    assert expected in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "number"),
    [("send(signal.SIGINT)", signal.SIGINT), ("if rank == 1: send(signal.SIGTERM)", signal.SIGTERM)],
    ids=["SIGINT to all", "SIGTERM to one"],
)
def test_a_signal_stops_all_processes_after_the_same_step(fail_group, training_folder, run_group, setup, number):
    (line,) = fail_group(setup, number)
    assert line.startswith("train: stopped after step 5 of 16; checkpoint in ")
    assert list(training_folder.glob("data/.checkpoints/*/00000005-*"))
    result = run_group(training_folder, "train", 2)
    assert "resuming after step 5" in result["printed"][0]
    assert len(read_outputs(training_folder)) >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("if rank: os.chdir(os.getcwd() + '/../other')", "rank 1 has other parameters in params.yaml than rank 0"),
        ("if rank: facts.version = lambda name: '0'", "rank 1 has other versions of packages than rank 0"),
        ("if rank: facts.code_files = lambda script: {script}", "rank 1 has other code than rank 0"),
        (
            "import torch\nfrom gpt2lora.model import device\n"
            "device.compute_dtype = lambda *_: (torch.float32, torch.bfloat16)[rank]",
            "rank 1 has other precision (train.precision) than rank 0",
        ),
    ],
)
def test_processes_that_differ_are_refused(fail_group, training_folder, copy_of, setup, expected):
    copy_of(training_folder, "other", {"train.learning_rate": 3e-3})
    (line,) = fail_group(setup)
    assert line == f"Error: rank 0 of 2: {expected}: give all processes the same"


@pytest.mark.slow
def test_evaluate_refuses_processes_with_other_code(training_folder, run_group):
    run_group(training_folder, "train", 1)
    setup = "from gpt2lora.distributed import facts\nif rank: facts.code_files = lambda script: {script}"
    result = run_group(training_folder, "evaluate", 2, setup=setup)
    assert result["codes"] == [1, 1], result["printed"]
    assert "rank 1 has other code than rank 0" in "".join(result["printed"])
    assert not (training_folder / "metrics/eval.json").exists()


@pytest.mark.slow
def test_results_that_rank_0_cannot_write_fail_in_all_processes(fail_group):
    (line,) = fail_group(
        "from gpt2lora.training import model_card\n"
        "if rank == 0: model_card.write_card = fail(OSError(errno.ENOSPC, 'No space left on device'))"
    )
    assert line.startswith("Error: rank 0 of 2: No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize("signal_at_step_5", [False, True])
def test_a_checkpoint_may_take_longer_than_a_process_may_be_silent(training_folder, run_group, signal_at_step_5):
    changes = {"train.accumulation_steps": 2, "train.batch_size": 8, "train.checkpoint_every": 4}
    for key, value in changes.items():
        tiny.set_param(training_folder, key, value)
    setup = (
        "import time\nfrom gpt2lora.distributed import waiting\nwaiting.BEAT = 0.5\n"
        "group.TIMEOUT = timedelta(seconds=2)\nwrite_file = checkpoint.Checkpoints.write_file\n"
        "checkpoint.Checkpoints.write_file = lambda *arguments: (time.sleep(4), write_file(*arguments))\n"
    )
    result = run_group(training_folder, "train", 2, setup=AT_STEP_5 + setup + "send(15)" * signal_at_step_5)
    assert result["codes"] == ([143, 143] if signal_at_step_5 else [0, 0]), result["printed"]
    assert signal_at_step_5 or len(read_outputs(training_folder)) >= 5


@pytest.mark.slow
def test_a_wrong_parameter_is_refused_by_one_process(fail_group, training_folder):
    tiny.set_param(training_folder, "train.epochs", 0)
    (line,) = fail_group("")
    assert line.startswith("Error: rank 0 of 2: params.yaml: train.epochs")


@pytest.mark.slow
def test_a_group_that_does_not_come_together_is_reported(fail_group):
    lines = fail_group("del os.environ['MASTER_ADDR']")
    assert len(lines) == 2, "no process knows of the others"
    lines += fail_group("group.JOIN_TIMEOUT = timedelta(seconds=3)\nos.environ['MASTER_PORT'] = str(9 + rank)")
    assert all("the group of processes did not come together" in line for line in lines), lines
    assert all(line.endswith("torchrun, or unset RANK to run a single process") for line in lines)


@pytest.mark.parametrize(
    ("rank", "host", "seconds", "said"),
    [
        ("1", "127.0.0.1", 2, "rank 0 does not answer at 127.0.0.1:9: "),
        ("1", "no-such-host.invalid", 2, "rank 0 does not answer at no-such-host.invalid:9: "),
        ("5", "127.0.0.1", 0, "RANK: expected 0 to 1"),
        ("-1", "127.0.0.1", 0, "RANK: expected 0 to 1"),
    ],
)
def test_a_process_without_a_rank_0_gives_up_in_time(monkeypatch, rank, host, seconds, said):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": host, "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(group, "JOIN_TIMEOUT", timedelta(seconds=2))
    started = time.monotonic()
    with pytest.raises(StageError, match=re.escape(said)):
        group.join()
    assert seconds <= time.monotonic() - started < seconds + 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MASTER_PORT": "abc"}, "'abc'"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE expected, but not set"),
    ],
    ids=str,
)
def test_wrong_or_missing_variables_of_a_launcher_are_reported(monkeypatch, changes, said):
    variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"} | changes
    for name, value in variables.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(StageError, match=re.escape(said)):
        group.join()


@pytest.mark.slow
def test_processes_that_a_step_cannot_be_dealt_out_to(training_folder, run_group):
    result = run_group(training_folder, "train", 2)
    assert result["codes"] == [1, 1]
    (line,) = [line for printed in result["printed"] for line in printed.splitlines() if "Error" in line]
    assert "2 processes were started, but train.accumulation_steps 1 is dealt out to" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "kernels", "shown"),
    [
        (["NVIDIA A", "NVIDIA B"], [[], []], "NVIDIA A, NVIDIA B"),
        (["CPU", "CPU"], [["AVX2"], ["AVX512"]], "CPU, AVX2, CPU, AVX512"),
    ],
)
def test_devices_of_different_models_are_warned_of(training_folder, run_group, names, kernels, shown):
    tiny.set_param(training_folder, "train.accumulation_steps", 2)
    setup = (
        "from gpt2lora.distributed import facts\nfrom gpt2lora.model import device\n"
        f"device.device_name = lambda _: {names}[rank]\nfacts.cpu_kernels = lambda: {kernels}[rank]"
    )
    result = run_group(training_folder, "train", 2, setup=setup)
    assert result["codes"] == [0, 0], result["printed"]
    assert f"warning: devices of different models ({shown}): bytes may differ" in result["printed"][0]
