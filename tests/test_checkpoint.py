"""Killed at any point: training goes on from where it was, to the same bytes, and no output is ever half written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny

KILLS = int(os.environ.get("KILLS", 20))
TRAINED = ["train", "train:method=qlora", "train:lora.bits=8"]
STAGES = ["base", "prepare", "tokenize", "evaluate"]


def settle(folder, model, corpus, **changes):
    """Make a folder in which the stages can run: a short training, with all that is random in it."""
    folder.mkdir()
    shutil.copyfile(tiny.ROOT / "params.yaml", folder / "params.yaml")
    for key, value in {
        "preset": "local",
        "presets.local.model": str(model),
        "presets.local.dataset": str(corpus),
        "tokenize.block_size": 32,
        "train.precision": "fp32",
        "train.epochs": 2,
        "train.validations": 5,
        "train.base_dropout": 0.1,
        "train.checkpoint_every": 2,
        "evaluate.precision": "fp32",
        **changes,
    }.items():
        tiny.set_param(folder, key, value)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory, tiny_model, tiny_corpus) -> dict[str, dict]:
    """What came of killing each stage, and training by each method."""
    folder = settle(tmp_path_factory.mktemp("killed") / "project", tiny_model, tiny_corpus)
    command = [sys.executable, str(tiny.ROOT / "tests/killing.py"), str(KILLS), "0", *TRAINED, *STAGES]
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
    assert found["ended"] > 0
    assert found["resumed"] > KILLS / 4 or what in STAGES
