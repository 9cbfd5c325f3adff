"""Models with random weights and random tokens: speed and memory depend only on their sizes."""

import json
from pathlib import Path

from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests

# layers, width, heads, positions, vocabulary: GPT-2's own (Radford et al., 2019), and that of the embedded sample
SIZES = {
    "tiny": (4, 128, 4, 128, 2048),
    "124M": (12, 768, 12, 1024, 50257),
    "355M": (24, 1024, 16, 1024, 50257),
    "774M": (36, 1280, 20, 1024, 50257),
}


def model(folder: Path, size: str) -> Path:
    """Return the folder of a model of this size below `folder`; it is written at the first call."""
    target = folder / f"gpt2-{size}"
    if not target.exists():
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        layers, width, heads, positions, vocabulary = SIZES[size]
        torch.manual_seed(0)
        shape = {"n_positions": positions, "n_layer": layers, "n_embd": width, "n_head": heads}
        config = GPT2Config(vocab_size=vocabulary, bos_token_id=vocabulary - 1, eos_token_id=vocabulary - 1, **shape)
        with atomic_output(target) as new:
            GPT2LMHeadModel(config).save_pretrained(new)
    return target


def tokens(folder: Path, base: Path, block_size: int, count: int) -> Path:
    """Return a folder of token arrays for the model `base`: `count` rows for training, and 10 % for validation."""
    import numpy as np

    from gpt2lora.dataset import blocks

    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    target = folder / f"tokens-{vocabulary}-{block_size}-{count}"
    if not target.exists():
        random, dtype = np.random.default_rng(0), blocks.token_dtype(vocabulary)
        with atomic_output(target) as new:
            new.mkdir()
            for split, number in (("train", count), ("validation", -(-count // 10))):
                ids = random.integers(0, vocabulary, (number, block_size + 1)).astype(dtype)
                blocks.save_blocks(blocks.Blocks(ids, np.full(number, block_size + 1, np.int32)), new, split)
    # Models with the same vocabulary share the arrays; the manifest names the one that is used now.
    manifest = {"block_size": block_size, "files": digests(target, "*.npy"), "base": digests(base), "raw": {}}
    manifest |= {"prefix": [], "special_tokens": False}
    (target / MANIFEST).write_text(json.dumps(manifest) + "\n")
    return target
