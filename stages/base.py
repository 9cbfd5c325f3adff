"""base: the frozen base model, from the hub at a pinned revision, from a folder, or made for the sample.

in   params.yaml: preset, presets.<preset>.model, .model_revision, seed
out  data/base: config.json, tokenizer.json, *.safetensors; manifest.json, their digests
     data/environment/base.json: what ran where, and how long
"""

import json
import shutil
import time
from pathlib import Path

import click

from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, digests, whole
from gpt2lora.pipeline.cli import Stop, say, stage
from gpt2lora.sources import hub, local
from gpt2lora.sources.hub import FILES

SLOW_TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.model",))
POSITIONS = ("n_positions", "max_position_embeddings")  # what configurations call the longest context
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


@stage
@click.option("--out", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
def main(out: Path) -> None:
    """Fetch the base model and its tokenizer into data/base."""
    started = time.perf_counter()
    name = params.chosen("preset", "presets")
    preset = params.section(f"presets.{name}", params.Preset)
    seed = params.seed()
    key = f"presets.{name}.model"

    with whole(out) as folder:
        folder.mkdir()
        if preset.model == local.SAMPLE:
            from gpt2lora.sample import model

            model.make(folder, seed)
        elif source := local.local(key, preset.model, preset.model_revision):
            say(f"base: copying {source}")
            copy_model(source, folder)
        else:
            say(f"base: fetching {preset.model} at {preset.model_revision}")
            copy_model(hub.fetch_model(preset.model, preset.model_revision), folder)
        check_weights(folder, preset.model)
        write_fast_tokenizer(folder, preset.model)
        size = check_vocabulary(folder, preset.model)
        check_code(folder, preset.model)
        (folder / MANIFEST).write_text(json.dumps({"files": digests(folder)}, indent=2) + "\n")
    environment.write(out, "base", started, preset=name, model=preset.model, revision=preset.model_revision)
    say(f"base: {out} holds {preset.model}, {size:,} tokens in its vocabulary")


def copy_model(source: Path, folder: Path) -> None:
    """Copy a model's own files, byte for byte, and nothing else: no pickles, no code, no other frameworks."""
    weights = [path for pattern in WEIGHTS for path in sorted(source.glob(pattern))]
    if not (source / "config.json").is_file():
        raise Stop(f"{source}: no config.json: expected a folder written by transformers' save_pretrained")
    if not any(path.suffix == ".safetensors" for path in weights):
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in hub.PICKLES)
        refused = f" ({', '.join(pickles)}: pickled weights can run code, so they are refused)" if pickles else ""
        raise Stop(f"{source}: no *.safetensors{refused}: save the model with save_pretrained of transformers")
    others = [path for pattern in FILES for path in sorted(source.glob(pattern)) if path.is_file()]
    for path in [*weights, *others]:
        shutil.copyfile(path, folder / path.name)


def check_weights(folder: Path, name: str) -> None:
    """Stop at a file of weights that is cut off, or that is only the pointer of a clone without Git LFS."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise Stop(f"{name}: {file.name} is damaged, or a pointer of Git LFS: {error}") from error


def write_fast_tokenizer(folder: Path, name: str) -> None:
    """Write tokenizer.json, the one form that `tokenize` reads, where a model comes with another form only."""
    if (folder / "tokenizer.json").is_file():
        return
    if not any(all((folder / file).is_file() for file in files) for files in SLOW_TOKENIZERS):
        # transformers would make an empty one, and say nothing
        raise Stop(f"{name}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:  # tokenizers raises no other kind
        raise Stop(f"{name}: the tokenizer's files are damaged: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise Stop(f"{name}: the tokenizer has no fast form (tokenizer.json), which `tokenize` needs")


def check_vocabulary(folder: Path, name: str) -> int:
    """Return the size of the tokenizer's vocabulary; stop unless the model's embedding has a row for each id."""
    from tokenizers import Tokenizer

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {"vocab_size": config["vocab_size"]}
        sizes |= {key: config[key] for key in POSITIONS if config.get(key) is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Stop(f"{name}: config.json holds no vocab_size: expected a causal language model") from error
    for key, size in sizes.items():
        if type(size) is not int or size <= 0:
            raise Stop(f"{name}: config.json: {key} is {size!r}: expected an integer above 0")
    try:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # the library raises no other kind
        raise Stop(f"{name}: tokenizer.json is damaged: {error}") from error
    rows = sizes["vocab_size"]
    if max(ids, default=-1) >= rows:
        raise Stop(f"{name}: the tokenizer has an id {max(ids):,}, the embedding only {rows:,} rows: not a pair")
    return len(ids)


def check_code(folder: Path, name: str) -> None:
    """Stop at a model that needs code of its own, which is never run. Where transformers has its own, that is taken."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "auto_map" not in config:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Stop(
            f"{name}: transformers has no language model {kind!r}, and code that comes with a model is never run"
        )


if __name__ == "__main__":
    main()
