"""What `base` refuses for the stages after it. Nothing here decides anything else, so no parameter counts as read."""

import json
from pathlib import Path

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.context import choose_block_size, choose_stride
from gpt2lora.pipeline.schemas import EvaluateParams, LoraParams, TokenizeParams

POSITIONS = ("n_positions", "max_position_embeddings")  # names of the maximum context in config.json


def check_later_params(config: dict, folder: Path) -> None:
    """Refuse parameters that do not fit the model.

    Args:
        config: the content of config.json in `folder`, which need not hold anything else.
    """
    block_size = choose_block_size(params.section("tokenize", TokenizeParams).block_size, config, 0)
    choose_stride(params.section("evaluate", EvaluateParams), block_size)
    lora = params.section("lora", LoraParams)
    if params.value("method", str) != "full" and (lora.target_modules, lora.layers) != ("all-linear", "all"):
        from gpt2lora.model import layers  # takes torch, and seconds

        layers.check_target_layers(folder, lora)


def read_config(folder: Path, name: str) -> dict:
    """Return config.json, after a look at the sizes in it."""
    if not (folder / "config.json").is_file():
        raise StageError(f"{name}: no config.json: expected a folder written by transformers' save_pretrained")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        sizes = {"vocab_size": config["vocab_size"]}
        sizes |= {key: config[key] for key in POSITIONS if config.get(key) is not None}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(f"{name}: config.json holds no vocab_size: expected a causal language model") from error
    for key, size in sizes.items():
        if type(size) is not int or size <= 0:
            raise StageError(f"{name}: config.json: {key} is {size!r}: expected an integer above 0")
    return config
