"""tokenize: the corpus as token arrays, laid out in rows (stages/rows.py).

in   data/raw, data/base (tokenizer.json, config.json), params.yaml: tokenize.*
out  data/tokens: {train,validation,test}.npy, {train,validation,test}.lengths.npy, manifest.json
     data/environment/tokenize.json: what ran where, and how long
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages import articles, environment, params
from stages.command import Stop, need, say, stage, whole

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

LAYOUTS = ("packed", "padded")
BATCH_CHARACTERS = 1_000_000  # encoded at once, by all cores: bounds the memory


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
    import numpy as np

    from stages import rows

    tokenize = params.section("tokenize", Tokenize)
    config = json.loads(need(base / "config.json", "base").read_text(encoding="utf-8"))
    block_size = choose_block_size(tokenize.block_size, config)
    tokenizer = load_tokenizer(base)
    end = end_of_text(base, config, tokenizer)
    dtype = rows.id_type(config["vocab_size"])

    splits = {}
    with whole(out) as folder:
        folder.mkdir()
        for split in rows.SPLITS:
            text = need(raw / f"{split}.txt", "prepare").read_bytes().decode("utf-8")
            if tokenize.layout == "packed":
                texts = list(encode(tokenizer, articles.split(text), dtype))
                arrays = rows.pack(join(texts, end, dtype), block_size, end)
            else:
                texts = [np.append(ids, dtype(end)) for ids in encode(tokenizer, paragraphs(text), dtype)]
                arrays = rows.pad_each(texts, block_size, end)
            if len(arrays) == 0:
                raise Stop(f"{raw}/{split}.txt: the {split} split is empty: it has no token to predict")
            rows.save(arrays, folder, split)
            splits[split] = {
                "texts": len(texts),
                "tokens": sum(map(len, texts)),
                "rows": len(arrays),
                "predicted_tokens": arrays.targets,
            }
            counts = "  ".join(f"{count:>11,} {name}" for name, count in splits[split].items())
            say(f"tokenize: {split:10} {counts}".replace("_", " "))
        manifest = {
            "layout": tokenize.layout,
            "block_size": block_size,
            "dtype": np.dtype(dtype).name,
            "vocabulary_size": tokenizer.get_vocab_size(),
            "end_of_text_id": end,
            "splits": splits,
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    environment.write(out, "tokenize", started)


def choose_block_size(block_size: int | None, config: dict) -> int:
    """Return the context length: the one asked for, else the longest the model has positions for."""
    positions = config.get("n_positions") or config.get("max_position_embeddings")
    if positions is None and block_size is None:
        raise params.wrong("tokenize.block_size", None, "an integer, since the model's config names no longest context")
    if positions and block_size and block_size > positions:
        raise params.wrong("tokenize.block_size", block_size, f"at most {positions}, the model's n_positions")
    return block_size or positions


def load_tokenizer(base: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # The characters "<|endoftext|>" in a corpus are text; only the pipeline itself ends a text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(base: Path, config: dict, tokenizer: "Tokenizer") -> int:
    """Return the id that ends a text: the tokenizer's own eos token, else the one that the model's config names."""
    settings = base / "tokenizer_config.json"
    token = json.loads(settings.read_text(encoding="utf-8")).get("eos_token") if settings.is_file() else None
    if isinstance(token, dict):
        token = token["content"]
    end = tokenizer.token_to_id(token) if token else config.get("eos_token_id")
    if isinstance(end, list):
        end = end[0]
    if end is None or end >= config["vocab_size"]:
        raise Stop(f"{base}: no end-of-text token: expected eos_token in tokenizer_config.json")
    return end


def encode(tokenizer: "Tokenizer", texts: list[str], dtype: type) -> "Iterator[np.ndarray]":
    """Yield the ids of each text as a (tokens,) array, a bounded number of characters at a time."""
    import numpy as np
    from tqdm import tqdm

    with tqdm(total=sum(map(len, texts)), unit="char", unit_scale=True, desc="tokenize", leave=False) as bar:
        batch: list[str] = []
        for place, text in enumerate(texts, start=1):
            batch.append(text)
            characters = sum(map(len, batch))
            if characters >= BATCH_CHARACTERS or place == len(texts):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    yield np.array(encoding.ids, dtype=dtype)
                bar.update(characters)
                batch = []


def join(texts: "list[np.ndarray]", end: int, dtype: type) -> "np.ndarray":
    """Return one stream of ids, the texts separated by the end-of-text id."""
    import numpy as np

    separator = np.array([end], dtype=dtype)
    pieces = [piece for ids in texts for piece in (ids, separator)][:-1]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype)


def paragraphs(text: str) -> list[str]:
    """Return the lines that hold more than white space."""
    return [line for line in text.split("\n") if line.strip()]


if __name__ == "__main__":
    main()
