"""Locks on GPUs: stages that run at once never share one, and a killed one leaves none behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import ROOT

from gpt2lora.distributed import leases
from gpt2lora.pipeline.cli import StageError
from gpt2lora.training.gpus import check_processes, choose_gpus

GPUS = ["GPU-aa", "GPU-ab", "GPU-ba", "GPU-bb"]
HOLDER = f"""
import sys, time
from gpt2lora.distributed import leases

with leases.leased({GPUS}, lambda free: (1, "a reason"), "train") as (taken, _):
    print("takes", taken[0], time.monotonic(), flush=True)
    time.sleep(1000 if sys.argv[1] == "0" else 0.4)
    print("gives", taken[0], time.monotonic(), flush=True)
"""


def start_holder(number: int, folder) -> subprocess.Popen:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", HOLDER, str(number)]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)


def test_eight_processes_share_four_gpus_and_one_is_killed(tmp_path):
    killed = start_holder(0, tmp_path)
    gpu = killed.stdout.readline().split()[1]
    others = [start_holder(number, tmp_path) for number in range(1, 8)]
    time.sleep(1)
    killed.send_signal(signal.SIGKILL)
    end = time.monotonic()
    killed.communicate()
    printed = [other.communicate(timeout=60)[0] for other in others]
    assert [other.returncode for other in others] == [0] * 7
    spans = {each: [] for each in GPUS}
    for text in printed:
        (_, taken, start), (_, given, stop) = (line.split() for line in text.splitlines() if "GPU-" in line)
        assert taken == given
        spans[taken].append((float(start), float(stop)))
    assert all(start > end - 0.1 for start, _ in spans[gpu]), "the killed one held it until then"
    for times in spans.values():
        assert all(before[1] <= after[0] for before, after in zip(sorted(times), sorted(times)[1:], strict=False))
    assert any("train: waiting for a free GPU: all 4 are in use by other stages" in text for text in printed)


def test_a_lease_takes_as_many_free_gpus_as_it_can_use(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "lock_folder", lambda: tmp_path)

    def lease(accumulation_steps: int):
        return leases.leased(GPUS, lambda free: choose_gpus(accumulation_steps, free), "train")

    with lease(1) as (one, _):
        assert one == GPUS[:1]
        with lease(4) as (two, reason):
            assert two == GPUS[1:3], "three are free, and two divide four"
            assert reason.startswith("train.accumulation_steps is 4, and 3 are free")
            with lease(4) as (last, _):
                assert last == GPUS[3:]
    with lease(8) as (all_four, _):
        assert all_four == GPUS


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("0,2", ["GPU-aa", "GPU-ba"]),
        ("GPU-b", ["GPU-ba"]),
        ("3, GPU-aa", ["GPU-bb", "GPU-aa"]),
        ("1,9,2", ["GPU-ab"]),
        ("", []),
        ("-1", []),
        ("MIG-1", ["MIG-1"]),
    ],
)
def test_only_visible_gpus_are_used(visible, expected):
    assert leases.select_visible(GPUS, visible) == expected


@pytest.mark.parametrize(
    ("accumulation_steps", "free", "count"),
    [(1, 4, 1), (2, 4, 2), (3, 4, 1), (4, 4, 4), (4, 3, 2), (12, 8, 4), (8, 1, 1)],
)
def test_the_number_of_gpus_is_a_power_of_two_that_divides_the_steps(accumulation_steps, free, count):
    chosen, reason = choose_gpus(accumulation_steps, free)
    assert chosen == count
    assert ("double train.accumulation_steps" in reason) == (2 * count <= free)


def test_another_number_of_processes_is_refused():
    check_processes(4, 4)
    with pytest.raises(StageError, match=r"3 processes were started, but .* start 2, or change"):
        check_processes(4, 3)
