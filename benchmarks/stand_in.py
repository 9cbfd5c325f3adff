"""stand_in: a GPT-2 to tune where none can be fetched: random weights, trained in full by the pipeline itself.

in   --corpus, a folder of {train,validation,test}.txt; --tokenizer, a folder with GPT-2's; params.yaml
out  OUT, ready to be presets.local.model: config.json, model.safetensors, the tokenizer; and stand_in.json
"""

import json
import shutil
from pathlib import Path

import click

from benchmarks import workspace
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import StageError, command, echo

TRAINING = {"method": "full", "train.weight_decay": 0.1}
TOKENIZER = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json")
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


@command
@click.option("--corpus", type=Path, required=True, help="Folder of the text that it is trained on.")
@click.option("--tokenizer", type=Path, required=True, help="Folder of the tokenizer that it takes over.")
@click.option("--out", type=Path, required=True, help="Folder of the model.")
@click.option("--layers", type=click.IntRange(1), default=12, show_default=True)
@click.option("--width", type=click.IntRange(1), default=768, show_default=True)
@click.option("--heads", type=click.IntRange(1), default=12, show_default=True)
@click.option(
    "--positions", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of context, in training too."
)
@click.option("--epochs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows of so many tokens.")
@click.option("--learning-rate", type=float, default=6e-4, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--set", "items", multiple=True, help="Another key=value of params.yaml; may be repeated.")
def main(
    corpus: Path,
    tokenizer: Path,
    out: Path,
    layers: int,
    width: int,
    heads: int,
    positions: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    items: tuple[str, ...],
) -> None:
    """Train a GPT-2 from random weights on a corpus."""
    for option, path in (("--corpus", corpus), ("--tokenizer", tokenizer)):
        if not path.exists():
            raise StageError(f"{option} {path}: does not exist")
    if width % heads:
        raise StageError(f"--width {width}: expected a multiple of --heads {heads}")
    settings = workspace.settings(items)
    work = workspace.empty(out.with_name(f"{out.name}.work"))
    echo(f"stand_in: {layers} layers of width {width}, {heads} heads, {positions:,} positions, random weights")
    write_random(work / "random", tokenizer, layers, width, heads, positions, seed)
    values = TRAINING | {
        "preset": "local",
        "presets.local.model": str(work / "random"),
        "presets.local.dataset": str(corpus.resolve()),
        "seed": seed,
        "train.epochs": epochs,
        "train.batch_size": batch_size,
        "train.learning_rate": learning_rate,
    }
    params = workspace.write_params(work, values | settings)
    for name in ("base", "prepare", "tokenize", "train"):
        if error := workspace.run_stage(name, work, shown=True):
            raise StageError(error)

    figures = json.loads((work / "metrics" / "train.json").read_text())
    tokens = json.loads((work / "data" / "tokens" / "manifest.json").read_text())["splits"]
    with atomic_output(out) as folder:
        folder.mkdir()
        for source, patterns in ((work / "data" / "adapter", WEIGHTS), (work / "data" / "base", TOKENIZER)):
            for file in (file for pattern in patterns for file in source.glob(pattern)):
                shutil.move(file, folder / file.name)
        record = {"train": figures, "corpus": tokens, "parameters": params["train"]}
        (folder / "stand_in.json").write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(work)
    echo(f"stand_in: validation loss {figures['best_validation_loss']:.4f} nats/token, {out} holds the model")


def write_random(folder: Path, tokenizer: Path, layers: int, width: int, heads: int, positions: int, seed: int) -> None:
    """Write a GPT-2 with the initial values of its paper, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    torch.manual_seed(seed)
    end = loaded.eos_token_id
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": positions}
    config = GPT2Config(vocab_size=len(loaded), bos_token_id=end, eos_token_id=end, **shape)
    GPT2LMHeadModel(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


if __name__ == "__main__":
    main()
