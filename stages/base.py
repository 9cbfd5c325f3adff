"""base: the frozen base model, from the hub at a pinned revision, from a folder, or trained for the sample.

in   params.yaml: preset, presets.<preset>.model, .model_revision, seed
out  data/base: config.json, tokenizer.json, *.safetensors; manifest.json with their digests
     data/environment/base.json: hardware, versions and duration
"""

import json
import os
import time
from pathlib import Path

import click

from gpt2lora.base.model_files import (
    check_added_tokens,
    check_no_adapter,
    check_type,
    check_vocabulary,
    check_weights,
    copy_model,
    write_fast_tokenizer,
)
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests
from gpt2lora.pipeline.cli import command, echo
from gpt2lora.pipeline.context import check_floats, read_config
from gpt2lora.pipeline.schemas import LoraParams, check_context, check_params
from gpt2lora.sources import hub, local


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
            check_no_adapter(config_folder, preset.model)
            check_floats(config, preset.model)
            check_context(config)
            check_type(config, preset.model)
            check_layers(config_folder)
            origin |= copy_model(source or hub.fetch_model(preset.model, preset.model_revision), folder)
        check_weights(folder, preset.model)
        write_fast_tokenizer(folder, preset.model)
        vocabulary = check_vocabulary(folder, preset.model)
        check_added_tokens(folder, preset.model, vocabulary)
        (folder / MANIFEST).write_text(json.dumps({"source": origin, "files": digests(folder)}, indent=2) + "\n")
    environment.write_record(out, "base", started, preset=name, model=preset.model, revision=preset.model_revision)
    echo(f"base: {out} holds {preset.model}, {len(vocabulary):,} tokens in its vocabulary")


def check_layers(folder: Path) -> None:
    """Refuse lora.target_modules, layers and start_from as `train` would, by the config.json in `folder` alone."""
    lora = params.section("lora", LoraParams)
    default = (lora.target_modules, lora.layers, lora.start_from) == ("all-linear", "all", None)
    if params.value("method", str) != "full" and not default:
        from gpt2lora.model import layers  # takes torch, and seconds

        layers.check_target_layers(folder, lora)


if __name__ == "__main__":
    main()
