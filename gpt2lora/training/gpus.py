"""On how many GPUs `train` trains."""

from gpt2lora.pipeline.cli import StageError


def choose_gpus(accumulation_steps: int, free: int) -> tuple[int, str]:
    """Return how many of the free GPUs to train on, the largest power of two that divides accumulation_steps; and why.

    Each GPU computes as many micro-batches of a step, and their number decides neither the steps nor the bytes.
    """
    count = 1
    while accumulation_steps % (2 * count) == 0 and 2 * count <= free:
        count *= 2
    reason = f"train.accumulation_steps is {accumulation_steps}, and {free} are free"
    if 2 * count <= free:
        reason += f"; to use {2 * count}, double train.accumulation_steps and halve train.batch_size"
    return count, reason


def check_processes(accumulation_steps: int, count: int) -> None:
    """Refuse a number of processes that the micro-batches of a step cannot be dealt out to."""
    largest, _ = choose_gpus(accumulation_steps, count)
    if largest != count:
        raise StageError(
            f"{count} processes were started, but train.accumulation_steps {accumulation_steps} is dealt out to "
            f"a power of two that divides it: start {largest}, or change train.accumulation_steps"
        )
