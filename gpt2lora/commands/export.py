"""export: the tuned model as a plain transformers folder, the adapter merged into float weights.

in   data/adapter, data/base, data/tokens (validation, to compare on; random tokens where it is missing)
out  the folder --out: config.json, generation_config.json, *.safetensors in fp32, the tokenizer's files

An adapter that was trained on a quantised base can be merged into either of two float bases:

dequantized  the floats that the quantised weights stand for: what was trained. With 8 bits the tuned model rounds
             its activations as well (LLM.int8(), Dettmers et al., 2022, arXiv:2208.07339) and the export does not:
             on the sample, logits differed by 0.07 at most and losses by 0.0001 nats/token.
original     the floats before they were quantised, which the adapter was not trained on.

Merging into the quantised weights themselves would round them again, and most of the update away.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.pipeline.artifacts import unchanged, whole
from gpt2lora.pipeline.cli import Stop, say, stage
from gpt2lora.sources.hub import FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gpt2lora.dataset.blocks import Rows
    from gpt2lora.model.quantization import Quantization

ROWS = 8  # to compare the two models on
RANDOM_TOKENS = 128  # a row, where there is no validation split
TOLERANCE = 1e-3  # of the largest logit. The order of fp32 sums changed 5e-4 of it at most, in a random GPT-2 124M


@dataclass
class Comparison:
    """The exported model against the tuned one, on the same tokens. Losses in nats/token."""

    difference: float  # of the logits, the largest
    largest: float  # logit of the tuned model, by its absolute value
    loss: float
    tuned_loss: float


@stage
@click.option("--out", type=Path, required=True, help="Folder to write: a new or an empty one.")
@click.option(
    "--onto",
    type=click.Choice(["original", "dequantized"]),
    help="Float base to merge into; default: dequantized if the adapter was trained on a quantised base.",
)
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
def main(out: Path, onto: str | None, base: Path, adapter: Path, tokens: Path) -> None:
    """Write the tuned model as a plain transformers folder and compare the two."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise Stop(f"{out} exists and is not an empty folder: name a new one")
    unchanged(base, "base")
    say("export: loading torch and transformers")
    from gpt2lora.model import loading

    method, quantization = loading.load_method(adapter)
    onto = choose_base(onto, quantization)
    loading.check_files(base, adapter)
    with whole(out) as folder:
        folder.mkdir()
        merge(base, adapter, method, quantization, onto).save_pretrained(folder)
        copy_tokenizer(base, folder)
        sample, name = sample_rows(tokens, base)
        found = compare(folder, base, adapter, sample)
        say(f"export: {describe(found, method, quantization, onto)}, on {name}")
        check(found, same=quantization is None or (quantization.bits == 4 and onto == "dequantized"))
    say(f"export: {out} is a model for transformers' from_pretrained")


def choose_base(onto: str | None, quantization: "Quantization | None") -> str:
    if onto == "dequantized" and quantization is None:
        raise Stop("--onto dequantized: what was trained stands on a float base; leave --onto out")
    return onto or ("original" if quantization is None else "dequantized")


def merge(base: Path, adapter: Path, method: str, quantization: "Quantization | None", onto: str) -> "PreTrainedModel":
    """Return the tuned model in fp32, without adapters, with the base's configuration as it was published."""
    import torch

    from gpt2lora.model import loading, lora

    if method == "full":
        return loading.load_published(adapter, base)
    network = loading.load_published(base, base)
    if onto == "dequantized":
        from gpt2lora.model.quantization import dequantise_into

        dequantise_into(network, loading.load_base(base, quantization, torch.float32))
    return lora.load(network, adapter).merge_and_unload()


def copy_tokenizer(base: Path, folder: Path) -> None:
    for pattern in FILES:
        for file in sorted(base.glob(pattern)):
            if not (folder / file.name).exists():  # as config.json does: save_pretrained wrote it, with the new type
                shutil.copyfile(file, folder / file.name)


def sample_rows(tokens: Path, base: Path) -> "tuple[Rows, str]":
    """Return a few rows of the validation split, or of random tokens where there is none, and what to call them."""
    import numpy as np
    from transformers import AutoConfig

    from gpt2lora.dataset import blocks

    if (tokens / "validation.npy").exists():
        split = blocks.load(tokens, "validation")
        sample = blocks.Rows(split.ids[:ROWS], split.lengths[:ROWS])
        return sample, f"{sample.targets:,} tokens of the validation split"
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    length = min(RANDOM_TOKENS, getattr(config, "max_position_embeddings", RANDOM_TOKENS)) + 1
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(ROWS, length), dtype=np.uint32)
    sample = blocks.Rows(ids, np.full(ROWS, length, dtype=np.int32))
    return sample, f"{sample.targets:,} random tokens ({tokens} has no validation split)"


def compare(exported: Path, base: Path, adapter: Path, sample: "Rows") -> Comparison:
    """Read the export back as anybody would, and run it and the tuned model on the same rows, in fp32."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from gpt2lora.model import loading
    from gpt2lora.training.loss import IGNORED, batch

    tuned = loading.load_tuned(base, adapter, torch.float32).eval()
    place = next(tuned.parameters()).device
    reloaded = loading.load_published(exported, exported).to(place).eval()
    differences, sizes, sums = [], [], np.zeros(2)
    for row in range(len(sample)):  # one at a time: the logits of a row of GPT-2 take 0.2 GB
        inputs, targets = batch(sample, np.array([row]), place)
        with torch.no_grad():
            logits, expected = (network(input_ids=inputs, use_cache=False).logits[0] for network in (reloaded, tuned))
        differences.append(float((logits - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
        sums += [
            float(F.cross_entropy(scores, targets[0], ignore_index=IGNORED, reduction="sum"))
            for scores in (logits, expected)
        ]
    loss, tuned_loss = (sums / sample.targets).tolist()
    return Comparison(float(np.max(differences)), float(np.max(sizes)), loss, tuned_loss)  # NaN stays NaN


def describe(found: Comparison, method: str, quantization: "Quantization | None", onto: str) -> str:
    what = "all weights" if method == "full" else f"{method} on the {onto} base"
    line = (
        f"{what}: loss {found.loss:.4f} nats/token, as tuned {found.tuned_loss:.4f}, "
        f"difference {found.loss - found.tuned_loss:+.6f}; logits differ by at most {found.difference:.1e}"
    )
    if quantization is not None and quantization.bits == 8:
        line += " (as tuned, activations are rounded to 8 bits)"
    return line


def check(found: Comparison, same: bool) -> None:
    """Stop at an export that is broken or, where it ought to be the `same` as the tuned model, differs from it."""
    bound = TOLERANCE * found.largest if same else math.inf
    if not found.difference < bound:  # as no NaN is
        raise Stop(
            f"export: not the model that was trained: a logit differs by {found.difference:.1e}, less than {bound:.1e} "
            f"was expected; nothing was written. Are the base and the adapter from the same run?"
        )


if __name__ == "__main__":
    main()
