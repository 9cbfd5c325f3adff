"""The context in tokens: what params.yaml asks for, within what the model's config.json allows."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError

if TYPE_CHECKING:
    from gpt2lora.pipeline.schemas import EvaluateParams

MAX_DEFAULT = 1024  # positions: those of GPT-2. A step on the 131,072 of a Llama takes minutes, or does not fit
POSITIONS = ("n_positions", "max_position_embeddings")  # names of the maximum context in config.json
# Models whose first token has the position after the padding id, 1 by default: the positions before it are never used.
ROBERTA_TYPES = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


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


def check_floats(config: dict, name: str) -> None:
    """Refuse weights that are quantized already, by a model's config.json: `train` quantizes floats, and knows how."""
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise StageError(
            f"{name}: its weights are quantized already (config.json: quantization_config, {method}): expected floats; "
            "take the model's float version, or load it with AutoModelForCausalLM and save a float copy: "
            "model.dequantize().save_pretrained(folder, save_original_format=False)"
        )


def max_context(config: dict) -> int | None:
    """Return the longest context that a model's config.json gives, in tokens, None if it gives none."""
    positions = config.get("n_positions") or config.get("max_position_embeddings")
    if positions and config.get("model_type") in ROBERTA_TYPES:
        padding = config.get("pad_token_id")
        return max(1, positions - 1 - (1 if padding is None else padding))
    return positions


def choose_block_size(block_size: int | None, config: dict, prefix: int) -> int:
    """Return the context in tokens: tokenize.block_size, or by default the model's positions, at most MAX_DEFAULT.

    Args:
        prefix: number of ids that begin each row.
    """
    positions = max_context(config)
    if positions is None and block_size is None:
        expected = "an integer, since the model's config names no longest context"
        raise params.invalid("tokenize.block_size", None, expected)
    if positions and block_size and block_size > positions:
        raise params.invalid("tokenize.block_size", block_size, f"at most {positions}, the model's n_positions")
    short = short_context(config)
    if short and block_size and block_size > short:
        why = "the model's original_max_position_embeddings: beyond it, the longest row of a batch changes all others"
        raise params.invalid("tokenize.block_size", block_size, f"at most {short}, {why}")
    context = block_size or min(positions, short or MAX_DEFAULT, MAX_DEFAULT)
    params.require(context >= prefix, "tokenize.block_size", context, f"at least {prefix}, the ids before each row")
    return context


def short_context(config: dict) -> int | None:
    """Return the tokens up to which a model with LongRoPE (arXiv:2402.13753) takes the same factors, None for others.

    transformers takes the factors of a batch by its longest row.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")


def choose_stride(evaluate: "EvaluateParams", block_size: int) -> int:
    """Return the tokens from one window to the next: evaluate.stride, or by default the block size."""
    if evaluate.stride is not None and evaluate.stride > block_size:
        raise params.invalid("evaluate.stride", evaluate.stride, f"1 to {block_size}, the block size, or null")
    return evaluate.stride or block_size
