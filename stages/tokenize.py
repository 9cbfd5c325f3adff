"""tokenize: the corpus as token arrays, in blocks (gpt2lora/dataset/blocks.py).

in   data/raw, data/base (tokenizer.json, config.json), params.yaml: tokenize.*
out  data/tokens: {train,validation,test}.npy, {train,validation,test}.lengths.npy, manifest.json
     data/environment/tokenize.json: hardware, versions and duration
"""

if __name__ == "tokenize":  # in the place of the standard library's module, since stages/ is where Python was started
    raise SystemExit("Error: run stages and commands from the repository's root, stages as python -m stages.NAME")

import json
import time
from collections import Counter
from pathlib import Path

import click

from gpt2lora.dataset.documents import find_split, read_marked, read_texts, split_digests
from gpt2lora.dataset.special_tokens import describe_special_tokens, special_token, watch_special_tokens
from gpt2lora.dataset.tokenizer import (
    PIECE_CHARACTERS,
    encode_articles,
    encode_paragraphs,
    end_of_text_id,
    load_tokenizer,
    text_prefix,
)
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests, read_json, read_source, verify_folder
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.context import choose_block_size, max_context
from gpt2lora.pipeline.schemas import TokenizeParams, check_params


@command
@click.option("--raw", type=Path, default="data/raw", show_default=True, help="Folder of the text files.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--out", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
def main(raw: Path, base: Path, out: Path) -> None:
    """Encode the corpus into token arrays, which train and evaluate read."""
    started = time.perf_counter()
    check_params()
    from gpt2lora.dataset import blocks

    tokenize = params.section("tokenize", TokenizeParams)
    verify_folder(base, "base")
    verify_folder(raw, "prepare")
    config = read_json(base / "config.json", "base", "vocab_size")
    tokenizer = load_tokenizer(base, tokenize.special_tokens)
    end, prefix = end_of_text_id(base, config, tokenizer), text_prefix(tokenizer)
    if special_token(base, "eos_token") is None:
        token = tokenizer.id_to_token(end)
        echo(f"tokenize: the tokenizer has no eos_token: texts end with {token!r}, eos_token_id {end} of config.json")
    block_size = choose_block_size(tokenize.block_size, config, len(prefix))
    if block_size < (max_context(config) or 0) and tokenize.block_size is None:
        echo(f"tokenize: blocks of {block_size:,} of the model's {max_context(config):,} tokens: tokenize.block_size")
    dtype = blocks.token_dtype(config["vocab_size"])

    splits = {}
    with atomic_output(out) as folder:
        folder.mkdir()
        for split in blocks.SPLITS:
            file, label = find_split(raw, split), f"tokenize {split}"
            counts, found = Counter(texts=0, tokens=0), watch_special_tokens(base, tokenizer, end)
            if tokenize.layout == "packed":
                marked = read_marked(file, PIECE_CHARACTERS, label)
                stream = encode_articles(tokenizer, marked, end, dtype, counts, found)
                parts = blocks.pack_stream(stream, block_size, end, prefix)
            else:
                texts = read_texts(file, label)
                parts = encode_paragraphs(tokenizer, texts, block_size, end, dtype, counts, prefix, found)
            blocks.save_stream(parts, block_size + 1, dtype, folder, split)
            saved = blocks.load_blocks(folder, split, prefix)
            if len(saved) == 0:
                raise StageError(f"{file}: the {split} split is empty: it has no token to predict; add text")
            splits[split] = {**counts, "rows": len(saved), "predicted_tokens": saved.targets}
            line = "  ".join(f"{count:>11,} {name}" for name, count in splits[split].items())
            echo(f"tokenize: {split:10} {line}".replace("_", " "))
            if cut := counts["cut_tokens"] / counts["tokens"]:
                echo(f"tokenize: {split:10} {cut:.1%} of the tokens cut: their paragraphs are longer than a block")
            splits[split] |= describe_special_tokens(found, tokenizer, split)
        manifest = {
            "layout": tokenize.layout,
            "block_size": block_size,
            "dtype": dtype.__name__,
            "vocabulary_size": tokenizer.get_vocab_size(),
            "end_of_text_id": end,
            "prefix": prefix,
            "special_tokens": tokenize.special_tokens,
            "splits": splits,
            "source": read_source(raw, "prepare") or None,
            "files": digests(folder, "*.npy"),
            "base": digests(base),
            "raw": split_digests(raw),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    environment.write_record(out, "tokenize", started)


if __name__ == "__main__":
    main()
