"""On how many GPUs `evaluate` scores."""

from pathlib import Path

from gpt2lora.dataset.blocks import load_blocks, read_token_manifest

SHARE_THRESHOLD = 6e15  # parameters times tokens, for which one H100 takes a minute


def choose_gpus(base: Path, tokens: Path, stride: int | None, free: int) -> tuple[int, str]:
    """Return how many of the free GPUs to score on, and why: all of them if there is work for more than a minute."""
    manifest = read_token_manifest(tokens, base)
    test = load_blocks(tokens, "test", manifest["prefix"])
    read = test.targets * manifest["block_size"] // (stride or manifest["block_size"])
    work = 2 * read * sum(file.stat().st_size for file in base.glob("*.safetensors")) // 4
    reason = f"{work:.1e} parameters x tokens; more processes save time from {SHARE_THRESHOLD:.0e} on"
    return free if work >= SHARE_THRESHOLD else 1, reason
