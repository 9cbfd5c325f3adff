"""On how many GPUs `evaluate` scores."""

import pytest

from gpt2lora.evaluation import gpus


@pytest.mark.parametrize(("threshold", "count"), [(1e3, 4), (1e12, 1)])
def test_all_free_gpus_are_taken_for_much_work(stage_outputs, monkeypatch, threshold, count):
    monkeypatch.setattr(gpus, "SHARE_THRESHOLD", threshold)
    chosen, reason = gpus.choose_gpus(stage_outputs["base"], stage_outputs["tokens"], None, 4)
    assert chosen == count
    assert reason.endswith(f"save time from {threshold:.0e} on")


def test_the_work_grows_with_the_overlap_of_windows(stage_outputs):
    work = [
        float(gpus.choose_gpus(stage_outputs["base"], stage_outputs["tokens"], stride, 4)[1].split()[0])
        for stride in (None, 8)
    ]
    assert work[1] == pytest.approx(4 * work[0], rel=0.1), "the block size is 32"
