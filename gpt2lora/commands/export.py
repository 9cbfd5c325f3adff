"""export: merge the adapter into float weights, and write the tuned model as a plain transformers folder.

in   data/adapter, data/base, data/tokens (the validation split, to compare models on; without it, random tokens)
out  the folder --out: config.json, generation_config.json, *.safetensors in fp32, the tokenizer's files
     or with --gguf the file --out, and a Modelfile beside it

An adapter that was trained on a quantized base can be merged into either of two float bases:

dequantized  the values that the quantized weights stand for: what was trained.
original     the weights before they were quantized, on which the adapter was not trained.

Merging into the quantized weights themselves would quantize the sum again, and lose most of the update.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.commands import exported_files
from gpt2lora.pipeline.artifacts import atomic_output, verify_folder
from gpt2lora.pipeline.cli import StageError, command, echo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gpt2lora.dataset.blocks import Blocks
    from gpt2lora.pipeline.schemas import QuantizationParams

COMPARED_ROWS = 8  # rows on which the two models are compared
RANDOM_TOKENS = 128  # in a row, if there is no validation split
TOLERANCE = 1e-3  # of the largest logit. Another order of fp32 sums changed a random GPT-2 124M by at most 5e-4


@dataclass
class Comparison:
    """The exported model compared with the tuned one on the same tokens. Losses in nats/token."""

    difference: float  # largest difference of a logit
    largest: float  # largest absolute logit of the tuned model
    loss: float
    tuned_loss: float


@command
@click.option("--out", type=Path, required=True, help="Folder to write: a new or an empty one. With --gguf a new file.")
@click.option(
    "--onto",
    type=click.Choice(["original", "dequantized"]),
    help="Float base to merge into; default: dequantized if the adapter was trained on a quantized base.",
)
@click.option(
    "--gguf",
    type=click.Choice(["f16", "q8_0"]),
    help="Write --out as a GGUF file for llama.cpp, and a Modelfile for Ollama beside it.",
)
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--metrics", type=Path, default="metrics", show_default=True, help="Folder of the model card's figures.")
def main(out: Path, onto: str | None, gguf: str | None, base: Path, adapter: Path, tokens: Path, metrics: Path) -> None:
    """Write the tuned model as a plain transformers folder or as a GGUF file, and compare it with the tuned one."""
    modelfile = out.with_name(out.name.removesuffix(".gguf") + ".Modelfile")
    check_new(out, modelfile if gguf else None)
    verify_folder(base, "base")
    if gguf:
        from gpt2lora.commands import export_gguf

        export_gguf.check_base(base)
    echo("export: loading torch and transformers")
    from gpt2lora.model import loading

    method, quantization = loading.read_method(adapter)
    onto = choose_base(onto, quantization)
    loading.verify_adapter_and_base(base, adapter)
    network = merge_adapter(base, adapter, method, quantization, onto)

    def compare(exported: "PreTrainedModel") -> None:
        sample, name = comparison_blocks(tokens, base)
        found = compare_models(exported, base, adapter, sample)
        echo(f"export: {describe_comparison(found, method, onto)}, on {name}")
        check_comparison(found, same=quantization is None or onto == "dequantized")

    if gguf:
        compare(network)
        with atomic_output(modelfile) as new_modelfile, atomic_output(out) as file:
            count = export_gguf.write_gguf(network, base, gguf, file)
            export_gguf.check_file(file, network)
            new_modelfile.write_text(export_gguf.modelfile(out, base), encoding="utf-8")
        echo(f"export: {out} holds {count} tensors for llama.cpp, each read back as {gguf} rounds it")
        echo(f"export: ollama create NAME -f {modelfile}")
        return
    with atomic_output(out) as folder:
        folder.mkdir()
        network.save_pretrained(folder)
        exported_files.complete_config(base, folder)
        exported_files.copy_tokenizer(base, folder)
        exported_files.write_card(adapter, folder, metrics)
        compare(loading.load_fp32(folder, folder))
    echo(f"export: {out} is a model for transformers' from_pretrained")


def check_new(out: Path, modelfile: Path | None) -> None:
    """Refuse to overwrite anything. modelfile: None if `out` is to be a folder, which may exist if it is empty."""
    if modelfile and (taken := [path for path in (out, modelfile) if path.exists()]):
        raise StageError(f"{taken[0]} exists: name a new file")
    if not modelfile and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise StageError(f"{out} exists and is not an empty folder: name a new one")


def choose_base(onto: str | None, quantization: "QuantizationParams | None") -> str:
    """Return "original" or "dequantized"."""
    if onto == "dequantized" and quantization is None:
        raise StageError("--onto dequantized: the adapter was trained on a float base; leave --onto out")
    return onto or ("original" if quantization is None else "dequantized")


def merge_adapter(
    base: Path, adapter: Path, method: str, quantization: "QuantizationParams | None", onto: str
) -> "PreTrainedModel":
    """Return the tuned model in fp32, without adapters, with the base's unchanged configuration."""
    import torch

    from gpt2lora.model import loading, lora

    if method == "full":
        return loading.load_fp32(adapter, base)
    network = loading.load_fp32(base, base)
    if onto == "dequantized":
        from gpt2lora.model.quantization import dequantize_into

        dequantize_into(network, loading.load_base(base, quantization, torch.float32))
    return lora.load_adapter(network, adapter).merge_and_unload()


def comparison_blocks(tokens: Path, base: Path) -> "tuple[Blocks, str]":
    """Return some blocks of the validation split, or of random tokens if there is none, and their description."""
    import numpy as np
    from transformers import AutoConfig

    from gpt2lora.dataset import blocks

    if (tokens / "validation.npy").exists():
        split = blocks.load_blocks(tokens, "validation", ())
        sample = blocks.Blocks(split.ids[:COMPARED_ROWS], split.lengths[:COMPARED_ROWS])
        return sample, f"{sample.targets:,} tokens of the validation split"
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    length = min(RANDOM_TOKENS, getattr(config, "max_position_embeddings", RANDOM_TOKENS)) + 1
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(COMPARED_ROWS, length), dtype=np.uint32)
    sample = blocks.Blocks(ids, np.full(COMPARED_ROWS, length, dtype=np.int32))
    return sample, f"{sample.targets:,} random tokens ({tokens} has no validation split)"


def compare_models(exported: "PreTrainedModel", base: Path, adapter: Path, sample: "Blocks") -> Comparison:
    """Run the exported and the tuned model on the same rows, in fp32."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from gpt2lora.model import loading
    from gpt2lora.training.loss import IGNORE_INDEX, make_batch

    tuned = loading.load_tuned(base, adapter, torch.float32).eval()
    device = next(tuned.parameters()).device
    exported = exported.to(device).eval()
    differences, sizes, sums = [], [], np.zeros(2)
    for row in range(len(sample)):  # one at a time: the logits of a GPT-2 row take 0.2 GB
        inputs, targets = make_batch(sample, np.array([row]), device)
        with torch.no_grad():
            logits, expected = (network(input_ids=inputs, use_cache=False).logits[0] for network in (exported, tuned))
        differences.append(float((logits - expected).abs().max()))
        sizes.append(float(expected.abs().max()))
        sums += [
            float(F.cross_entropy(scores, targets[0], ignore_index=IGNORE_INDEX, reduction="sum"))
            for scores in (logits, expected)
        ]
    loss, tuned_loss = (sums / sample.targets).tolist()
    return Comparison(float(np.max(differences)), float(np.max(sizes)), loss, tuned_loss)  # NaN stays NaN


def describe_comparison(found: Comparison, method: str, onto: str) -> str:
    what = "all weights" if method == "full" else f"{method} on the {onto} base"
    return (
        f"{what}: loss {found.loss:.4f} nats/token, as tuned {found.tuned_loss:.4f}, "
        f"difference {found.loss - found.tuned_loss:+.6f}; logits differ by at most {found.difference:.1e}"
    )


def check_comparison(found: Comparison, same: bool) -> None:
    """Refuse an export that is broken, or that differs from the tuned model although it should be the `same`."""
    bound = TOLERANCE * found.largest if same else math.inf
    if not found.difference < bound:  # false for NaN too
        raise StageError(
            f"export: not the model that was trained: a logit differs by {found.difference:.1e}, less than {bound:.1e} "
            f"was expected; nothing was written. Are the base and the adapter from the same run?"
        )
