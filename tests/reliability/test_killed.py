"""Killed at any point: training goes on from where it was, to the same bytes, and no output is ever half written."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from dvc_yaml import declared_leaves, imported_files

from gpt2lora.dataset import blocks
from gpt2lora.pipeline import artifacts
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import checkpoint, divergence, loop, oom, summary
from stages import base, prepare, tokenize, train

KILLS = int(os.environ.get("KILLS", 20))
TRAINED = ["train", "train:method=qlora", "train:lora.bits=8"]
STAGES = ["base", "prepare", "tokenize", "evaluate"]


# Killed


def settle(folder: Path, model: Path, corpus: Path) -> Path:
    """Make a folder in which the stages can run: a training of 16 steps, with all that is random in it."""
    folder.mkdir()
    shutil.copyfile(tiny.ROOT / "params.yaml", folder / "params.yaml")
    for key, value in {
        "preset": "local",
        "presets.local.model": str(model),
        "presets.local.dataset": str(corpus),
        "tokenize.block_size": 32,
        "train.precision": "fp32",
        "train.epochs": 1,
        "train.batch_size": 16,
        "train.validations": 5,
        "train.base_dropout": 0.1,
        "train.checkpoint_every": 2,
        "evaluate.precision": "fp32",
    }.items():
        tiny.set_param(folder, key, value)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model, tiny_corpus) -> dict[str, dict]:
    """What came of killing each stage, and training by each method."""
    folder = settle(tmp_path_factory.mktemp("killed") / "project", tiny_model, tiny_corpus)
    command = [sys.executable, str(tiny.ROOT / "tests/helpers/killing.py"), str(KILLS), "0", *TRAINED, *STAGES]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {record["what"]: record for record in found}


@pytest.mark.parametrize("what", [*TRAINED, *STAGES])
def test_killed_at_random_moments_a_stage_leaves_whole_outputs_and_ends_as_if_it_had_not_been(killed, what):
    found = killed[what]
    assert found["wrong"] == []
    assert found["killed after a time"] + found["killed at a call"] >= KILLS
    assert found["killed while writing"] > 0
    assert found["killed while writing a checkpoint"] >= KILLS / 4 or what in STAGES
    assert found["ended"] > 0
    assert found["resumed"] > KILLS / 4 or what in STAGES


# Stopped and started again


def contents(folder: Path) -> dict[str, bytes]:
    """Return what two runs must have in common, byte for byte."""
    files = [*folder.glob("data/adapter/*"), folder / "metrics/loss.csv", folder / "metrics/train.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


def run(stage, code: int = 0) -> str:
    """Run a stage; return what it printed, or where it is to fail its errors."""
    result = CliRunner().invoke(stage, [], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stderr if code == 1 else result.stdout


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, tiny_corpus) -> Path:
    folder = settle(tmp_path_factory.mktemp("inputs") / "project", tiny_model, tiny_corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for stage in (base.main, prepare.main, tokenize.main):
            run(stage)
    return folder


@pytest.fixture
def workplace(tmp_path, inputs, monkeypatch) -> Path:
    """The working directory: all that train reads, and room for what it writes."""
    folder = tmp_path / "workplace"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def stopped(monkeypatch):
    """Run train and send it a signal in the midst of a step; return what it printed."""

    def stop(step: int, number: int = signal.SIGTERM) -> str:
        def rate(now, *others):
            if now == step:
                os.kill(os.getpid(), number)
            return learning_rate(now, *others)

        learning_rate = loop.lr_at_step
        with monkeypatch.context() as patch:
            patch.setattr(loop, "lr_at_step", rate)
            return run(train.main, 128 + number)

    return stop


def checkpoints() -> list[Path]:
    return sorted(Path("data/.checkpoints").glob("*/*"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "qlora"},
        {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
        {"method": "qlora", "lora.init": "loftq"},
        {"method": "full"},
        {"lora.bits": 4, "lora.use_dora": True},
        {"lora.init": "pissa", "train.lora_plus_ratio": 4.0, "train.weight_decay": 0.1},
        {"lora.init": "orthogonal", "train.precision": "bf16", "train.accumulation_steps": 2},
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "lora",
)
def test_a_run_that_was_stopped_ends_with_the_bytes_of_one_that_was_not(workplace, stopped, changes):
    for key, value in changes.items():
        tiny.set_param(workplace, key, value)
    run(train.main)
    expected = contents(workplace)
    assert len(expected) >= 5
    shutil.rmtree("data/adapter")
    for step in (3, 6):  # the second time within the run that goes on
        output = stopped(step)
    assert "resuming after step 3 of " in output
    assert "stopped after step 6 of " in output
    output = run(train.main)
    assert "resuming after step 6 of " in output
    assert contents(workplace) == expected
    assert not Path("data/.checkpoints").exists()


def test_the_loss_table_is_written_at_every_validation(workplace, stopped):
    def steps() -> list[int]:
        return [int(line.split(",")[0]) for line in Path("metrics/loss.csv").read_text().splitlines()[1:]]

    stopped(9)
    assert steps() == [4, 7]
    stopped(14)
    assert steps() == [4, 7, 10, 13]
    run(train.main)
    assert steps() == [4, 7, 10, 13, 16]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(workplace, stopped, number):
    before = signal.getsignal(number)
    output = stopped(5, number)  # not a step at which a checkpoint was due
    (file,) = [file for file in checkpoints() if file.name.startswith("00000005-")]
    line = f"train: stopped after step 5 of 16; checkpoint in {file.parent}: run the same command to resume"
    assert output.splitlines()[-1] == line
    assert not Path("data/adapter").exists()
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_it_at_once(workplace, monkeypatch):
    learning_rate, steps, before = loop.lr_at_step, [], signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a shell's background jobs ignore it

    def rate(step, *others):
        steps.append(step)
        if step == 5:
            while len(list(Path("data/.checkpoints").glob("*/[0-9]*"))) < 2:  # that of step 4 is being written
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not before:  # two that come before Python looks are one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(step, *others)

    monkeypatch.setattr(loop, "lr_at_step", rate)
    assert run(train.main, 130).splitlines()[-1] == "Stopped; no output is half written"
    assert steps[-1] == 5
    assert {file.name[:8] for file in checkpoints()} == {"00000002", "00000004"}


def test_a_signal_between_two_looks_still_leaves_a_checkpoint(workplace, monkeypatch):
    """It comes when step 5 has been told to leave none, and before the loop looks whether to go on."""
    due = checkpoint.Checkpoints.is_due

    def late(self, step, stopping):
        found = due(self, step, stopping)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(checkpoint.Checkpoints, "is_due", late)
    assert "train: stopped after step 6 of 16; checkpoint in " in run(train.main, 143)
    assert "00000006" in {file.name[:8] for file in checkpoints()}


def test_a_signal_to_a_run_that_has_no_step_left_lets_it_end(workplace, stopped, monkeypatch):
    stopped(16)
    resume = checkpoint.Checkpoints.resume

    def signalled(self, *others):
        os.kill(os.getpid(), signal.SIGTERM)
        return resume(self, *others)

    monkeypatch.setattr(checkpoint.Checkpoints, "resume", signalled)
    assert "resuming after step 16 of 16" in run(train.main)
    assert Path("data/adapter").exists()


def test_without_checkpoints_a_signal_finishes_the_step_and_keeps_nothing(workplace, stopped):
    tiny.set_param(workplace, "train.checkpoint_every", 0)
    assert "no checkpoint, since train.checkpoint_every is 0" in stopped(5)
    assert checkpoints() == []


def test_a_changed_parameter_starts_afresh_and_another_run_s_checkpoints_stay(workplace, stopped):
    stopped(8)
    kept = checkpoints()
    tiny.set_param(workplace, "train.learning_rate", 1e-3)
    assert "resuming" not in run(train.main)
    assert checkpoints() == kept
    changed = contents(workplace)
    tiny.set_param(workplace, "train.learning_rate", 2e-3)
    assert "resuming after step 8 of 16" in run(train.main)
    assert checkpoints() == []
    assert contents(workplace) != changed


# Of each parameter that train reads: another value that it may have.
OTHERS = {
    "seed": 1,
    "method": "full",
    "methods.qlora.bits": 8,
    "methods.qlora.quant_type": "fp4",
    "methods.qlora.double_quant": False,
    "lora.r": 4,
    "lora.alpha": 8,
    "lora.dropout": 0.5,
    "lora.target_modules": ["attn.c_attn"],
    "lora.layers": [0],
    "lora.bits": 8,
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init": "orthogonal",
    "train.epochs": 2,
    "train.batch_size": 15,
    "train.accumulation_steps": 2,
    "train.learning_rate": 1e-3,
    "train.lora_plus_ratio": 2.0,
    "train.warmup_fraction": 0.5,
    "train.weight_decay": 0.1,
    "train.clip_norm": 2.0,
    "train.base_dropout": 0.2,
    "train.precision": "bf16",
    "train.compile": "never",
    "train.deterministic": True,
    "train.validations": 4,
    "train.checkpoint_every": 3,
}


@pytest.fixture
def name_of_run(workplace, monkeypatch):
    """Return the name that train gives the folder of its checkpoints."""

    def find() -> str:
        names = []

        def fit(*arguments):
            names.append(arguments[5].folder.name)
            raise StageError("named")

        with monkeypatch.context() as patch:
            patch.setattr(loop, "fit", fit)
            assert run(train.main, 1).endswith("Error: named\n")
        return names[0]

    return find


@pytest.mark.parametrize("key", OTHERS)
def test_a_run_of_another_parameter_has_other_checkpoints(workplace, name_of_run, key):
    if key.startswith("methods.qlora."):
        tiny.set_param(workplace, "method", "qlora")
    if key == "methods.qlora.bits":
        tiny.set_param(workplace, "methods.qlora.double_quant", False)
    before = name_of_run()
    assert name_of_run() == before
    tiny.set_param(workplace, key, OTHERS[key])
    assert name_of_run() != before


def test_no_parameter_of_train_is_left_out_above(workplace):
    declared = set()
    for method in ("lora", "qlora"):
        tiny.set_param(workplace, "method", method)
        declared |= declared_leaves("train", workplace)
    assert declared == OTHERS.keys()


@pytest.mark.parametrize("name", ["tokens/train.npy", "base/model.safetensors"])
def test_a_run_of_another_input_has_other_checkpoints(workplace, name_of_run, monkeypatch, name):
    before = name_of_run()
    monkeypatch.setattr(blocks, "read_token_manifest", lambda *_: None)  # which would refuse it
    file = Path("data", name)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert name_of_run() != before


def test_the_key_stands_for_parameters_inputs_code_and_device(tmp_path, monkeypatch):
    folder, code = tmp_path / "tokens", tmp_path / "code.py"
    folder.mkdir()
    (folder / "train.npy").write_bytes(b"tokens")
    code.write_text("code")

    def key(rate: float = 1e-3, device: str = "CPU") -> str:
        return checkpoint.run_key({"train": {"learning_rate": rate}}, [folder], [code], device)

    found = [key(), key(rate=1.0000001e-3), key(device="GPU")]
    assert key() == found[0]
    (folder / "train.npy").write_bytes(b"tokenz")
    found.append(key())
    (folder / "train.npy").rename(folder / "test.npy")
    found.append(key())
    code.write_text("other")
    found.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "version", lambda name: "0")
        found.append(key())
    assert len(set(found)) == len(found)


def test_the_code_in_the_key_is_all_that_dvc_watches():
    code = {file.relative_to(tiny.ROOT).as_posix() for file in checkpoint.code_files(Path(train.__file__))}
    assert imported_files("train", tiny.ROOT) - code == {"stages/__init__.py"}


# What is kept


def test_a_checkpoint_that_is_still_being_written_does_not_change_with_the_next_step():
    trained = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(trained, fused=True)
    losses = [torch.tensor(1.0)]

    def step() -> None:
        trained[0].grad = torch.ones(3)
        optimizer.step()
        losses[0] += 1

    step()
    held = checkpoint.collect_tensors(trained, optimizer, [torch.ones(3)], losses)
    before = {name: value.clone() for name, value in held.items()}
    step()
    now = checkpoint.collect_tensors(trained, optimizer, [torch.ones(3)], losses)
    assert all(torch.equal(held[name], before[name]) for name in held)
    changed = {name for name in held if not torch.equal(now[name], before[name])}
    assert changed == {"value.0", "losses", *(f"optimizer.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq"))}


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut off":
        del content[len(content) // 2 :]
    elif how == "a bit":
        content[-100] ^= 1
    else:
        content.clear()
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut off", "a bit", "empty"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(workplace, stopped, how):
    run(train.main)
    expected = contents(workplace)
    stopped(7)
    assert [file.name[:8] for file in checkpoints()] == ["00000006", "00000007"], "the newest two"
    damaged = checkpoints()[-1]
    damage(damaged, how)
    output = run(train.main)
    assert f"train: warning: {damaged} is damaged: skipped and removed" in output
    assert "resuming after step 6 of 16" in output
    assert contents(workplace) == expected


def test_where_all_checkpoints_are_damaged_it_starts_afresh(workplace, stopped):
    stopped(7)
    for file in checkpoints():
        damage(file, "cut off")
    output = run(train.main)
    assert output.count("is damaged") == 2
    assert "resuming" not in output


def test_what_a_killed_run_had_begun_to_write_is_cleared_away(workplace, stopped):
    stopped(4)
    (checkpoints()[0].parent / ".00000006-0123.safetensors.new").write_bytes(b"half")
    stopped(7)
    assert [file.name[:8] for file in checkpoints()] == ["00000006", "00000007"]


def test_a_run_leaves_alone_what_another_of_the_same_key_is_writing(tmp_path):
    kept = checkpoint.Checkpoints(tmp_path, 1, [])
    for step in (1, 2, 3):
        (tmp_path / ".00000009-0123.safetensors.new").write_bytes(b"half")
        kept.write_file(step, {"value": torch.ones(1)}, "{}")
    assert sorted(file.name[:9] for file in tmp_path.iterdir()) == [".00000009", "00000002-", "00000003-"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1,400 KB: two checkpoints of the tiny model's adapter, of 600 KB each, and no third."""
    disk = tmp_path / "disk"
    with tiny.mounted(disk, "1400k"):
        yield disk


def test_a_disk_that_fills_up_leaves_checkpoints_and_outputs_as_they_were(workplace, small_disk, stopped):
    run(train.main)
    expected = contents(workplace)
    arguments = ["--checkpoints", str(small_disk)]
    result = CliRunner().invoke(train.main, arguments)
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "No space left on device" in lines[0] and str(small_disk) in lines[0]
    left = sorted(small_disk.glob("*/*"))
    assert len(left) >= 1
    assert all(checkpoint.short_digest(file.read_bytes()) == file.stem.split("-")[1] for file in left)
    assert contents(workplace) == expected
    shutil.move(left[0].parent, Path("data/.checkpoints") / left[0].parent.name)
    assert f"resuming after step {int(left[-1].name[:8])} of 16" in run(train.main)
    assert contents(workplace) == expected


# Whole outputs


def test_every_byte_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
    )
    monkeypatch.setattr(os, "replace", lambda *names: done.append("replace") or replace(*names))
    with atomic_output(tmp_path / "out") as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text("bytes")
    new = f"{tmp_path}/.out.new"
    assert done == [new, f"{new}/inner", f"{new}/inner/file", "replace", str(tmp_path)]


def test_an_old_output_that_was_half_removed_never_comes_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    for name in "abc":
        (target / name).write_text("old")

    def killed(path):
        (path / "a").unlink()
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit), atomic_output(target) as folder:
        folder.mkdir()
        patch.setattr(artifacts.shutil, "rmtree", killed)
    shutil.rmtree(target)  # as DVC does before it runs a stage again
    with pytest.raises(StageError), atomic_output(target):
        raise StageError("the next run fails")
    assert list(tmp_path.iterdir()) == []


def test_killed_between_two_renames_the_old_output_comes_back(tmp_path):
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "file").write_text("old")
    (tmp_path / ".out.new").mkdir()
    with pytest.raises(StageError), atomic_output(tmp_path / "out"):
        raise StageError("the next run fails")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/file"]


# DVC


def test_dvc_repro_goes_on_where_a_killed_one_was(project, inputs, monkeypatch):
    shutil.copy(inputs / "params.yaml", project)
    shutil.copytree(inputs / "data", project / "data", dirs_exist_ok=True)
    for key, value in {"train.epochs": 8, "train.checkpoint_every": 1}.items():
        tiny.set_param(project, key, value)
    monkeypatch.chdir(project)
    run(train.main)
    expected = contents(project)
    command = ["dvc", "repro", "--single-item", "train"]
    running = subprocess.Popen(command, env=tiny.environment(), text=True, stdout=subprocess.PIPE)
    while len(checkpoints()) < 2:
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.01)
    stage, *_ = stages_of(running.pid)  # and the shell around it, where that is a process of its own
    os.kill(stage, signal.SIGKILL)
    running.communicate()
    assert running.returncode != 0
    assert not Path("data/adapter").exists()
    assert "train: resuming after step" in tiny.run(project, *command)
    assert contents(project) == expected
    assert checkpoints() == []


def stages_of(parent: int) -> list[int]:
    """Return the processes below `parent` that run a stage, the innermost first."""
    children = [int(number) for number in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    found = [number for child in children for number in stages_of(child)]
    command_line = Path(f"/proc/{parent}/cmdline").read_bytes()
    return [*found, parent] if b"stages.train" in command_line and b"dvc" not in command_line else found


# Numbers that guard themselves


def test_a_gradient_that_is_not_finite_stops_with_its_step():
    norms = [1.0, math.inf, 1.0]
    with pytest.raises(StageError, match=r"the norm of the gradient is inf at step 19: lower train.learning_rate"):
        divergence.check_gradient_norms(norms, math.inf, 20)


def test_a_gradient_that_explodes_is_warned_of(capsys):
    lowest = divergence.check_gradient_norms([2.0, 3.0, 100.0], math.inf, 10)
    assert lowest == 3.0
    assert divergence.check_gradient_norms([290.0], lowest, 20) == 3.0
    assert capsys.readouterr().out == ""
    assert divergence.check_gradient_norms([310.0], lowest, 30) == 3.0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("train: warning: the gradient explodes: norm 310 near step 30, 3 before: lower train.learn")


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (500.0, "warning: the gradient explodes: norm 500 near step 14, 1 before"),
        (math.inf, "the norm of the gradient is inf at step 13"),
    ],
)
def test_training_looks_at_the_norms_of_its_gradients(workplace, monkeypatch, norm, said):
    tiny.set_param(workplace, "train.epochs", 2)
    tiny.set_param(workplace, "train.validations", 1)
    norms = iter([1.0] * 12 + [norm] + [1.0] * 100)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    assert said in run(train.main, int(math.isinf(norm)))


def test_a_look_at_ten_steps_comes_when_the_next_one_is_begun(workplace, monkeypatch):
    for key, value in {"train.epochs": 4, "train.validations": 1, "train.checkpoint_every": 0}.items():
        tiny.set_param(workplace, key, value)
    taken = []

    def norm(*_):
        taken.append(math.inf if len(taken) + 1 == 17 else 1.0)
        return torch.tensor(taken[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    assert "the norm of the gradient is inf at step 17" in run(train.main, 1)
    assert len(taken) == 21


def test_no_run_goes_on_from_a_step_that_diverged(workplace, monkeypatch):
    tiny.set_param(workplace, "train.checkpoint_every", 3)
    norms = iter([1.0] * 5 + [math.inf] + [1.0] * 100)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(next(norms)))
    assert "the norm of the gradient is inf at step 6" in run(train.main, 1)
    assert {file.name[:8] for file in checkpoints()} == {"00000003"}


@pytest.mark.parametrize("change", [0.0, 0.1, -0.1])
def test_a_run_that_ends_no_better_than_the_base_says_so(capsys, change):
    record = {"start_validation_loss": 5.0, "best_validation_loss": 5.0 + change}
    record |= {"best_step": 1, "trainable_parameters": 1}
    summary.echo_result(record, {"tokens_per_second": 1, "peak_memory_bytes": 1})
    warning = "train: warning: no better than before training; lower train.learning_rate or train for more epochs\n"
    assert capsys.readouterr().out.endswith(warning) == (change >= 0)


@pytest.fixture
def small_gpu(monkeypatch):
    """Steps that need more memory than there is: a row takes 1 MB, all else 2 MB."""

    def limited(add, rows, places, batch_size):
        if batch_size > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return accumulate(add, rows, places, batch_size)

    accumulate = loop.accumulate_gradients
    monkeypatch.setattr(loop, "accumulate_gradients", limited)
    monkeypatch.setattr(oom, "measure_memory", lambda *_: (2_000_000, 1_000_000, 8_000_000))


def test_too_little_memory_names_the_batch_that_fits(workplace, small_gpu):
    line = run(train.main, 1).splitlines()[-1]
    assert line == (
        "Error: train: out of memory at train.batch_size 16: a token takes 31 kB, all else 0.00 GB of 0.01 GB, so 5 "
        "rows of 32 tokens fit; for the same steps: -S train.batch_size=4 -S train.accumulation_steps=4"
    )
    for key, value in {"train.batch_size": 4, "train.accumulation_steps": 4}.items():
        tiny.set_param(workplace, key, value)
    run(train.main)


@pytest.mark.parametrize("room", [2_500_000, None], ids=["measured", "out of memory again"])
def test_too_little_memory_for_a_single_row(workplace, small_gpu, monkeypatch, room):
    def measure(*_):
        if room is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 2_000_000, 1_000_000, room

    monkeypatch.setattr(oom, "measure_memory", measure)
    line = run(train.main, 1).splitlines()[-1]
    assert line.startswith("Error: train: out of memory at train.batch_size 16: not even a row of 32 tokens fits: ")


def test_too_little_memory_in_any_other_stage(workplace, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(prepare, "read_folder", fail)
    assert run(prepare.main, 1).startswith("Error: out of memory on the GPU: lower the stage's batch_size, or end ")


def test_what_fits_leaves_some_memory_unused():
    assert oom.max_batch_size(fixed=10, row=10, room=100) == 8
    assert oom.max_batch_size(fixed=200, row=10, room=100) == 0
