"""Checkpoints: a training that was stopped resumes from the newest one, and writes the bytes of an undisturbed run."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from dvc_yaml import declared_params, imported_files
from training_runs import checkpoint_files, read_outputs, run_stage

from gpt2lora.dataset import blocks
from gpt2lora.distributed import facts
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training import checkpoint, loop
from stages import train

# Stop and resume


def slow(changes: dict):
    return pytest.param(changes, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "qlora"},
        {"method": "full"},
        {"lora.bits": 4, "lora.use_dora": True, "train.lora_plus_ratio": 4.0, "train.weight_decay": 0.1},
        {"lora.init": "orthogonal", "train.precision": "bf16", "train.accumulation_steps": 2},
        slow({"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False}),
        slow({"method": "qlora", "lora.init": "loftq"}),
        slow({"lora.init": "pissa", "train.lora_plus_ratio": 4.0, "train.weight_decay": 0.1}),
    ],
    ids=lambda changes: ",".join(f"{key}={value}" for key, value in changes.items()) or "lora",
)
def test_a_resumed_run_ends_with_the_same_bytes(training_folder, stop_training, changes):
    for key, value in ({"train.deterministic": True} | changes).items():  # matters on a GPU
        tiny.set_param(training_folder, key, value)
    run_stage(train.main)
    expected = read_outputs(training_folder)
    assert len(expected) >= 5
    shutil.rmtree("data/adapter")
    for step in (3, 6):  # the second stop interrupts a run that has resumed
        output = stop_training(step)
    assert "resuming after step 3 of " in output
    assert "stopped after step 6 of " in output
    output = run_stage(train.main)
    assert "resuming after step 6 of " in output
    assert read_outputs(training_folder) == expected
    assert not Path("data/.checkpoints").exists()


def test_loss_csv_is_written_at_every_validation(training_folder, stop_training):
    def steps() -> list[int]:
        return [int(line.split(",")[0]) for line in Path("metrics/loss.csv").read_text().splitlines()[1:]]

    stop_training(9)
    assert steps() == [0, 4, 7]
    stop_training(14)
    assert steps() == [0, 4, 7, 10, 13]
    run_stage(train.main)
    assert steps() == [0, 4, 7, 10, 13, 16]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_current_step(training_folder, stop_training, number):
    before = signal.getsignal(number)
    output = stop_training(5, number)  # no checkpoint is due at step 5
    (file,) = [file for file in checkpoint_files() if file.name.startswith("00000005-")]
    line = f"train: stopped after step 5 of 16; checkpoint in {file.parent}: run the same command to resume"
    assert output.splitlines()[-1] == line
    assert not Path("data/adapter").exists()
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_run_at_once(training_folder, monkeypatch):
    lr_at_step, steps, before = loop.lr_at_step, [], signal.default_int_handler
    signal.signal(signal.SIGINT, before)  # a background job of a shell ignores SIGINT

    def lr_and_signals(step, *others):
        steps.append(step)
        if step == 5:
            while len(list(Path("data/.checkpoints").glob("*/[0-9]*"))) < 2:  # that of step 4 is still being written
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not before:  # wait until Python has handled the first signal
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        return lr_at_step(step, *others)

    monkeypatch.setattr(loop, "lr_at_step", lr_and_signals)
    assert run_stage(train.main, code=130).splitlines()[-1] == "Stopped; no output is half written"
    assert steps[-1] == 5
    assert {file.name[:8] for file in checkpoint_files()} == {"00000002", "00000004"}


def test_a_signal_after_a_step_stops_at_the_next_step(training_folder, monkeypatch):
    """The signal comes after step 5 decided to write no checkpoint; so step 6 writes one."""
    is_due = checkpoint.Checkpoints.is_due

    def is_due_then_signal(self, step, stopping):
        result = is_due(self, step, stopping)
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(checkpoint.Checkpoints, "is_due", is_due_then_signal)
    assert "train: stopped after step 6 of 16; checkpoint in " in run_stage(train.main, code=143)
    assert "00000006" in {file.name[:8] for file in checkpoint_files()}


def test_a_signal_after_the_last_step_lets_the_run_finish(training_folder, stop_training, monkeypatch):
    validate = loop.validate

    def validate_and_signal(model, validation, backward, state, *others):
        validate(model, validation, backward, state, *others)
        if state.step == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", validate_and_signal)
        run_stage(train.main, code=128 + signal.SIGTERM)
    resume = checkpoint.Checkpoints.resume

    def signal_and_resume(self, *others):
        os.kill(os.getpid(), signal.SIGTERM)
        return resume(self, *others)

    monkeypatch.setattr(checkpoint.Checkpoints, "resume", signal_and_resume)
    assert "resuming after step 16 of 16" in run_stage(train.main)
    assert Path("data/adapter").exists()


def test_a_signal_keeps_nothing_without_checkpoints(training_folder, stop_training):
    tiny.set_param(training_folder, "train.checkpoint_every", 0)
    assert "no checkpoint, since train.checkpoint_every is 0" in stop_training(5)
    assert checkpoint_files() == []


# Which run a checkpoint belongs to


def test_a_changed_parameter_starts_a_new_run(training_folder, stop_training):
    """The checkpoints of the run before stay, and it can still resume."""
    stop_training(8)
    before = checkpoint_files()
    parameters = Path("params.yaml").read_text()
    tiny.set_param(training_folder, "train.learning_rate", 3e-3)
    output = run_stage(train.main)
    assert "resuming" not in output
    assert "train: starts anew: the checkpoints in data/.checkpoints are of other runs (1), with other" in output
    assert checkpoint_files() == before
    changed = read_outputs(training_folder)
    Path("params.yaml").write_text(parameters)
    assert "resuming after step 8 of 16" in run_stage(train.main)
    assert checkpoint_files() == []
    assert read_outputs(training_folder) != changed


# For each parameter that train reads, a value other than that of the training folder.
CHANGED_VALUES = {
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
    "lora.start_from": "first",
    "train.epochs": 2,
    "train.batch_size": 15,
    "train.accumulation_steps": 2,
    "train.learning_rate": 3e-3,
    "train.lora_plus_ratio": 2.0,
    "train.warmup_fraction": 0.5,
    "train.weight_decay": 0.1,
    "train.clip_norm": 2.0,
    "train.base_dropout": 0.2,
    "train.precision": "bf16",
    "train.compile": "never",
    "train.deterministic": True,
    "train.validations": 4,
    "train.patience": 3,
    "train.checkpoint_every": 3,
    "train.seed": 7,
}


def checkpoint_folder() -> str:
    """Return the name of the folder in which train would keep its checkpoints."""
    names = []

    def record_name(*arguments):
        names.append(arguments[5].folder.name)
        raise StageError("stopped before training")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "fit", record_name)
        # Else a module that was first imported between two runs would change the name, whatever else does.
        patch.setattr(facts, "code_files", lambda script: {script})
        assert run_stage(train.main, code=1).endswith("Error: stopped before training\n")
    return names[0]


@pytest.fixture(scope="module")
def folder_with(tmp_path_factory, prepared_folder):
    """A function that returns this name for changed parameters. It runs train once for the same changes."""
    folder = shutil.copytree(prepared_folder, tmp_path_factory.mktemp("names") / "project")
    tiny.write_adapter(folder / "first", folder / "data/base", r=16, alpha=32)
    original = (folder / "params.yaml").read_bytes()
    names = {}

    def folder_name(changes: dict) -> str:
        if str(changes) not in names:
            (folder / "params.yaml").write_bytes(original)
            for key, value in changes.items():
                tiny.set_param(folder, key, value)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                names[str(changes)] = checkpoint_folder()
        return names[str(changes)]

    return folder_name


@pytest.mark.parametrize("changes", [{}, {"method": "qlora"}], ids=str)
def test_the_same_parameters_have_the_same_checkpoint_folder(training_folder, folder_with, changes):
    for key, value in changes.items():
        tiny.set_param(training_folder, key, value)
    assert checkpoint_folder() == checkpoint_folder() == folder_with(changes)


@pytest.mark.parametrize("key", CHANGED_VALUES)
def test_every_parameter_changes_the_checkpoint_folder(folder_with, key):
    before = {"method": "qlora"} if key.startswith("methods.qlora.") else {}
    if key == "methods.qlora.bits":
        before["methods.qlora.double_quant"] = False
    assert folder_with(before | {key: CHANGED_VALUES[key]}) != folder_with(before)


def test_changed_values_cover_every_parameter_of_train(training_folder):
    declared = set()
    for method in ("lora", "qlora"):
        tiny.set_param(training_folder, "method", method)
        declared |= declared_params("train", training_folder)
    assert declared == CHANGED_VALUES.keys()


@pytest.mark.parametrize("name", ["tokens/train.npy", "base/model.safetensors"])
def test_every_input_changes_the_checkpoint_folder(training_folder, monkeypatch, name):
    before = checkpoint_folder()
    monkeypatch.setattr(blocks, "read_token_manifest", lambda *_: {"prefix": []})  # it would refuse the changed file
    file = Path("data", name)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint_folder() != before


def test_the_key_covers_parameters_inputs_code_and_device(tmp_path, monkeypatch):
    folder, code = tmp_path / "tokens", tmp_path / "code.py"
    folder.mkdir()
    (folder / "train.npy").write_bytes(b"tokens")
    code.write_text("code")

    def key(lr: float = 1e-3, device: str = "CPU") -> str:
        return checkpoint.run_key(facts.run_facts({"train": {"learning_rate": lr}}, [folder], [code]), device)

    keys = [key(), key(lr=1.0000001e-3), key(device="GPU")]
    assert key() == keys[0]
    (folder / "train.npy").write_bytes(b"tokenz")
    keys.append(key())
    (folder / "train.npy").rename(folder / "test.npy")
    keys.append(key())
    code.write_text("other")
    keys.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(facts, "version", lambda name: "0")
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_the_key_covers_the_code_that_dvc_tracks():
    code = {file.relative_to(tiny.ROOT).as_posix() for file in facts.code_files(Path(train.__file__))}
    assert imported_files("train", tiny.ROOT) - code == {"stages/__init__.py"}


# Files


def test_the_next_step_does_not_change_collected_tensors():
    """They are written to disk while training continues."""
    trained = [torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(trained, fused=True)
    losses = [torch.tensor(1.0)]

    def step() -> None:
        trained[0].grad = torch.ones(3)
        optimizer.step()
        losses[0] += 1

    step()
    collected = checkpoint.collect_tensors(trained, optimizer, [torch.ones(3)], losses)
    before = {name: value.clone() for name, value in collected.items()}
    step()
    after = checkpoint.collect_tensors(trained, optimizer, [torch.ones(3)], losses)
    assert all(torch.equal(collected[name], before[name]) for name in collected)
    changed = {name for name in collected if not torch.equal(after[name], before[name])}
    assert changed == {"value.0", "losses", *(f"optimizer.0.{name}" for name in ("step", "exp_avg", "exp_avg_sq"))}


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "flipped bit":
        content[-100] ^= 1
    else:
        content.clear()
    file.write_bytes(content)


@pytest.fixture(scope="module")
def undisturbed_outputs(tmp_path_factory, prepared_folder) -> dict[str, bytes]:
    """The outputs of an undisturbed run in the training folder."""
    folder = shutil.copytree(prepared_folder, tmp_path_factory.mktemp("undisturbed") / "training")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(train.main)
    return read_outputs(folder)


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "empty"])
def test_a_damaged_checkpoint_is_skipped(training_folder, stop_training, undisturbed_outputs, how):
    stop_training(7)
    assert [file.name[:8] for file in checkpoint_files()] == ["00000006", "00000007"], "the newest two"
    damaged = checkpoint_files()[-1]
    damage(damaged, how)
    output = run_stage(train.main)
    assert f"train: warning: {damaged} is damaged: skipped and removed" in output
    assert "resuming after step 6 of 16" in output
    assert read_outputs(training_folder) == undisturbed_outputs


def test_a_run_with_only_damaged_checkpoints_starts_over(training_folder, stop_training):
    stop_training(7)
    for file in checkpoint_files():
        damage(file, "truncated")
    output = run_stage(train.main)
    assert output.count("is damaged") == 2
    assert "resuming" not in output


def test_an_unfinished_checkpoint_is_removed(training_folder, stop_training):
    stop_training(4)
    (checkpoint_files()[0].parent / ".00000006-0123.safetensors.new").write_bytes(b"half")
    stop_training(7)
    assert [file.name[:8] for file in checkpoint_files()] == ["00000006", "00000007"]


def test_a_checkpoint_that_another_run_is_writing_is_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, [])
    for step in (1, 2, 3):
        (tmp_path / ".00000009-0123.safetensors.new").write_bytes(b"half")
        checkpoints.write_file(step, {"value": torch.ones(1)}, "{}")
    assert sorted(file.name[:9] for file in tmp_path.iterdir()) == [".00000009", "00000002-", "00000003-"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1,400 KB: it holds two checkpoints of the tiny model's adapter, 600 KB each, but not three."""
    disk = tmp_path / "disk"
    with tiny.mounted(disk, "1400k"):
        yield disk


def test_a_full_disk_keeps_checkpoints_and_outputs(training_folder, small_disk):
    run_stage(train.main)
    expected = read_outputs(training_folder)
    result = CliRunner().invoke(train.main, ["--checkpoints", str(small_disk)])
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "No space left on device" in lines[0] and str(small_disk) in lines[0]
    files = sorted(small_disk.glob("*/*"))
    assert len(files) >= 1
    assert all(checkpoint.short_digest(file.read_bytes()) == file.stem.split("-")[1] for file in files)
    live = "metrics/loss.csv"  # written at each validation, so it shows the run that failed
    outputs = {name: content for name, content in read_outputs(training_folder).items() if name != live}
    assert outputs == {name: content for name, content in expected.items() if name != live}
    shutil.move(files[0].parent, Path("data/.checkpoints") / files[0].parent.name)
    assert f"resuming after step {int(files[-1].name[:8])} of 16" in run_stage(train.main)
    assert read_outputs(training_folder) == expected


# An early end


def test_a_resumed_run_ends_early_at_the_same_step(training_folder, stop_training):
    for key, value in {"train.learning_rate": 0.03, "train.warmup_fraction": 0.9, "train.patience": 2}.items():
        tiny.set_param(training_folder, key, value)  # the validation loss is lowest at the second of five validations
    line = "train: ends early, after step 13 of 16: no validation loss below that of step 7 in 2 validations"
    assert line in run_stage(train.main)
    expected = read_outputs(training_folder)
    record = json.loads(expected["metrics/train.json"])
    assert (record["steps"], record["planned_steps"], record["best_step"]) == (13, 16, 7)
    shutil.rmtree("data/adapter")
    stop_training(12)  # before the validation that ends the run
    stop_training(13)  # in its last step: what is resumed has ended
    output = run_stage(train.main)
    assert "resuming after step 13 of 16" in output
    assert line in output
    assert read_outputs(training_folder) == expected
