"""base: the frozen base model, from the hub at a pinned revision, from a folder, or trained for the sample.

in   params.yaml: preset, presets.<preset>.model, .model_revision, seed
out  data/base: config.json, tokenizer.json, *.safetensors; manifest.json with their digests
     data/environment/base.json: hardware, versions and duration
"""

import json
import os
import shutil
import time
from pathlib import Path

import click

from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.context import check_floats, read_config
from gpt2lora.pipeline.schemas import LoraParams, check_context, check_params
from gpt2lora.sources import hub, local
from gpt2lora.sources.hub import CONFIG_FILES

SLOW_TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.model",))
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@command
@click.option("--out", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
def main(out: Path) -> None:
    """Fetch the base model and its tokenizer into data/base."""
    started = time.perf_counter()
    check_params()
    name = params.choice("preset", "presets")
    preset = params.section(f"presets.{name}", params.PresetParams)
    seed = params.seed()
    key = f"presets.{name}.model"

    origin = {"model": None, "revision": None}  # the sample's base has no home outside this repository
    with atomic_output(out) as folder:
        folder.mkdir()
        if preset.model == local.SAMPLE:
            from gpt2lora.sample import model

            model.sample_config().save_pretrained(folder)
            check_context(read_config(folder, preset.model))
            check_layers(folder)
            model.make_sample_model(folder, seed)
        else:
            source = local.resolve_local_path(key, preset.model, preset.model_revision)
            echo(f"base: copying {source}" if source else f"base: fetching {preset.model} at {preset.model_revision}")
            origin = {"model": os.path.abspath(source) if source else preset.model, "revision": preset.model_revision}
            config_folder = source or hub.fetch_config(preset.model, preset.model_revision)
            config = read_config(config_folder, preset.model)
            check_floats(config, preset.model)
            check_context(config)
            check_layers(config_folder)
            origin |= copy_model(source or hub.fetch_model(preset.model, preset.model_revision), folder)
        check_weights(folder, preset.model)
        write_fast_tokenizer(folder, preset.model)
        size = check_vocabulary(folder, preset.model)
        check_code(folder, preset.model)
        (folder / MANIFEST).write_text(json.dumps({"source": origin, "files": digests(folder)}, indent=2) + "\n")
    environment.write_record(out, "base", started, preset=name, model=preset.model, revision=preset.model_revision)
    echo(f"base: {out} holds {preset.model}, {size:,} tokens in its vocabulary")


def check_layers(folder: Path) -> None:
    """Refuse lora.target_modules, layers and start_from as `train` would, by the config.json in `folder` alone."""
    lora = params.section("lora", LoraParams)
    default = (lora.target_modules, lora.layers, lora.start_from) == ("all-linear", "all", None)
    if params.value("method", str) != "full" and not default:
        from gpt2lora.model import layers  # takes torch, and seconds

        layers.check_target_layers(folder, lora)


def copy_model(source: Path, folder: Path) -> dict:
    """Copy the needed files of a model unchanged: no pickles, code, other frameworks' weights. Return its license."""
    weights = [path for pattern in WEIGHT_FILES for path in sorted(source.glob(pattern))]
    if not any(path.suffix == ".safetensors" for path in weights):
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in hub.PICKLES)
        refused = f" ({', '.join(pickles)}: pickled weights can run code, so they are refused)" if pickles else ""
        raise StageError(f"{source}: no *.safetensors{refused}: save the model with save_pretrained of transformers")
    others = [path for pattern in CONFIG_FILES for path in sorted(source.glob(pattern)) if path.is_file()]
    for path in [*weights, *others]:
        shutil.copyfile(path, folder / path.name)
    return local.read_license(source)


def check_weights(folder: Path, name: str) -> None:
    """Refuse weights that are truncated, or only the pointer file of a clone without Git LFS."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise StageError(f"{name}: {file.name} is damaged, or a pointer of Git LFS: {error}") from error


def write_fast_tokenizer(folder: Path, name: str) -> None:
    """Write tokenizer.json, which `tokenize` reads, if the model has its tokenizer only in another form."""
    if (folder / "tokenizer.json").is_file():
        return
    if not any(all((folder / file).is_file() for file in files) for files in SLOW_TOKENIZERS):
        # transformers would silently create an empty tokenizer
        raise StageError(f"{name}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise StageError(f"{name}: the tokenizer's files are damaged: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise StageError(f"{name}: the tokenizer has no fast form (tokenizer.json), which `tokenize` needs")


def check_vocabulary(folder: Path, name: str) -> int:
    """Return the size of the tokenizer's vocabulary; refuse a model whose embedding lacks a row for one of its ids."""
    from tokenizers import Tokenizer

    rows = read_config(folder, name)["vocab_size"]
    try:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values()
    except Exception as error:  # tokenizers raises plain Exception
        raise StageError(f"{name}: tokenizer.json is damaged: {error}") from error
    if max(ids, default=-1) >= rows:
        raise StageError(f"{name}: the tokenizer has an id {max(ids):,}, the embedding only {rows:,} rows: not a pair")
    return len(ids)


def check_code(folder: Path, name: str) -> None:
    """Refuse a model that needs its own code, which is never run. Types that transformers knows need none."""
    config = read_config(folder, name)
    if "auto_map" not in config:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise StageError(
            f"{name}: transformers has no language model {kind!r}, and code that comes with a model is never run"
        )


if __name__ == "__main__":
    main()
