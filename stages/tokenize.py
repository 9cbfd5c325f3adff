"""tokenize: the corpus as token arrays, laid out in rows (gpt2lora/dataset/blocks.py).

in   data/raw, data/base (tokenizer.json, config.json), params.yaml: tokenize.*
out  data/tokens: {train,validation,test}.npy, {train,validation,test}.lengths.npy, manifest.json
     data/environment/tokenize.json: what ran where, and how long
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click

from gpt2lora.dataset import articles
from gpt2lora.dataset.tokenizer import (
    PIECE_CHARACTERS,
    end_of_text,
    load_tokenizer,
    longest_context,
    packed,
    padded,
    read,
)
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, digests, need, read_json, unchanged, whole
from gpt2lora.pipeline.cli import Stop, say, stage

LAYOUTS = ("packed", "padded")


@dataclass
class Tokenize:
    block_size: int | None
    layout: str

    def __post_init__(self):
        good = self.block_size is None or self.block_size > 0
        params.require(good, "tokenize.block_size", self.block_size, "an integer above 0, or null")
        params.require(self.layout in LAYOUTS, "tokenize.layout", self.layout, f"one of {', '.join(LAYOUTS)}")


@stage
@click.option("--raw", type=Path, default="data/raw", show_default=True, help="Folder of the text files.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--out", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
def main(raw: Path, base: Path, out: Path) -> None:
    """Encode the corpus once, into arrays that train and evaluate read."""
    started = time.perf_counter()
    from gpt2lora.dataset import blocks

    tokenize = params.section("tokenize", Tokenize)
    unchanged(base, "base")
    unchanged(raw, "prepare")
    config = read_json(base / "config.json", "base", "vocab_size")
    block_size = choose_block_size(tokenize.block_size, config)
    tokenizer = load_tokenizer(base)
    end = end_of_text(base, config, tokenizer)
    dtype = blocks.id_type(config["vocab_size"])

    splits = {}
    with whole(out) as folder:
        folder.mkdir()
        for split in blocks.SPLITS:
            text, counts = need(raw / f"{split}.txt", "prepare"), {"texts": 0, "tokens": 0}
            if tokenize.layout == "packed":
                stream = packed(tokenizer, articles.starts(read(text, PIECE_CHARACTERS)), end, dtype, counts)
                parts = blocks.pack_pieces(stream, block_size, end)
            else:
                parts = padded(tokenizer, read(text), block_size, end, dtype, counts)
            blocks.save_parts(parts, block_size + 1, dtype, folder, split)
            arrays = blocks.load(folder, split)
            if len(arrays) == 0:
                raise Stop(f"{raw}/{split}.txt: the {split} split is empty: it has no token to predict; add text")
            splits[split] = counts | {"rows": len(arrays), "predicted_tokens": arrays.targets}
            told = "  ".join(f"{count:>11,} {name}" for name, count in splits[split].items())
            say(f"tokenize: {split:10} {told}".replace("_", " "))
        manifest = {
            "layout": tokenize.layout,
            "block_size": block_size,
            "dtype": dtype.__name__,
            "vocabulary_size": tokenizer.get_vocab_size(),
            "end_of_text_id": end,
            "splits": splits,
            "files": digests(folder, "*.npy"),
            "base": digests(base),
            "raw": digests(raw, "*.txt"),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    environment.write(out, "tokenize", started)


def choose_block_size(block_size: int | None, config: dict) -> int:
    """Return the context length: the one asked for, else the longest the model has positions for."""
    positions = longest_context(config)
    if positions is None and block_size is None:
        raise params.wrong("tokenize.block_size", None, "an integer, since the model's config names no longest context")
    if positions and block_size and block_size > positions:
        raise params.wrong("tokenize.block_size", block_size, f"at most {positions}, the model's n_positions")
    return block_size or positions


if __name__ == "__main__":
    main()
