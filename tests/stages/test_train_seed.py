"""train.seed decides the adapter, the order and the dropout alone, so that error bars share base and splits."""

from pathlib import Path

import pytest
import tiny
from training_runs import run_stage

from stages import train


@pytest.mark.slow
def test_the_seed_of_training_replaces_the_seed_of_the_run(training_folder):
    def adapter(seed: int, train_seed: int | None) -> bytes:
        tiny.set_param(training_folder, "seed", seed)
        tiny.set_param(training_folder, "train.seed", train_seed)
        run_stage(train.main)
        return Path("data/adapter/adapter_model.safetensors").read_bytes()

    first = adapter(3, None)
    assert adapter(0, 3) == first
    assert adapter(3, 4) != first
