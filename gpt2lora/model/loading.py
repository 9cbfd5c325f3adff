"""Loading the base model, in floats or quantised, and the tuned model on top of it."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gpt2lora.model import attention, device, lora
from gpt2lora.model.quantization import Quantization, _bitsandbytes, check_width
from gpt2lora.pipeline.artifacts import digests, need, read_json, same
from gpt2lora.pipeline.cli import Stop

transformers_logging.disable_progress_bar()  # of reading weights: a second, in bars that say nothing
METHOD_FILE = "method.json"


def load_base(folder: Path, quantization: Quantization | None, dtype: torch.dtype) -> PreTrainedModel:
    """Load data/base with fp32 weights, its linear layers quantised where `quantization` is given.

    Args:
        dtype: what quantised layers compute in. Float layers compute in what autocast says.
    """
    config = _config(folder)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same function in one kernel instead of six
    place = device.pick_device()
    if quantization is None:
        return _load(folder, config).to(place)
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    model = _load(folder, config, quantization_config=_bitsandbytes(quantization, dtype), device_map={"": place})
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            check_width(name, module.in_features, place)
            # Repacks 4-bit weights in place at the first evaluation: training after that crashes.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            # The layer takes the scales over now, once and for all: PEFT, each time it reads the weight on a CPU (for
            # DoRA), puts in a new one without scales, which the layer would take over at its next use.
            module.init_8bit_state()
            module.init_8bit_state = lambda: None
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """Return the model in data/base without its weights: what can be checked on it costs no time."""
    config = _config(folder)
    with torch.device("meta"), _one_line(folder):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def hold_frozen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Hold what is frozen and not quantised in `dtype`, the type it is computed in, instead of casting it each time."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def load_published(weights: Path, config: Path) -> PreTrainedModel:
    """Load a folder's weights in fp32, on the CPU, with the configuration of the folder `config` as it stands."""
    return _load(weights, _config(config))


def load_tuned(base: Path, adapter: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Load what `train` left in data/adapter: an adapter on its base, or a whole model where all was trained."""
    method, quantization = load_method(adapter)
    check_files(base, adapter)
    if method == "full":
        return load_base(adapter, None, dtype)
    return lora.load(load_base(base, quantization, dtype), adapter)


def check_files(base: Path, adapter: Path) -> None:
    """Stop unless the adapter and the weights of its base are those that `save_method` recorded."""
    same(base, check_adapter(adapter)["base"], adapter / METHOD_FILE, "base train")


def check_adapter(folder: Path) -> dict:
    """Return what `save_method` recorded; stop unless the adapter's files are still those."""
    record = _record(folder)
    same(folder, record["files"], folder / METHOD_FILE, "train")
    return record


def load_method(folder: Path) -> tuple[str, Quantization | None]:
    """Return what `save_method` recorded: the method, and how its base was quantised."""
    record = _record(folder)
    return record["method"], Quantization(**record["quantization"]) if record["quantization"] else None


def save_method(folder: Path, method: str, quantization: Quantization | None, base: Path) -> None:
    """Record beside an adapter what it was trained on: `evaluate` loads the same base in the same form."""
    record = {"method": method, "quantization": asdict(quantization) if quantization else None}
    files = {name: digest for name, digest in digests(folder).items() if name != METHOD_FILE}
    record |= {"files": files, "base": digests(base, "*.safetensors")}
    (folder / METHOD_FILE).write_text(json.dumps(record, indent=2) + "\n")


def _record(folder: Path) -> dict:
    return read_json(folder / METHOD_FILE, "train", "method", "quantization", "files", "base")


def _config(folder: Path) -> PretrainedConfig:
    need(folder / "config.json", "base")
    with _one_line(folder):
        # Left out, trust_remote_code has transformers ask at the keyboard whether to run a model's own code.
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load(folder: Path, config: PretrainedConfig, **quantized) -> PreTrainedModel:
    with _one_line(folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of below
            **quantized,
        )
    # What transformers would fill with random numbers.
    if others := sorted(found["mismatched_keys"]):
        name, held, wanted = others[0]
        raise Stop(f"{folder}: {name} is {tuple(held)} in *.safetensors, {tuple(wanted)} by config.json: not a pair")
    if absent := sorted(found["missing_keys"]):
        raise Stop(f"{folder}: *.safetensors lack {len(absent)} of the model's weights, {absent[0]} first")
    if attention.fits(model):
        model.set_attn_implementation(attention.NAME)
    return model


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Make one line of what transformers raises at a folder that does not hold a causal language model."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        if "can't allocate memory" in str(error):  # PyTorch's words, on a CPU
            raise
        line = f"{folder}: transformers itself cannot load this model ({type(error).__name__}: {error})"
        raise Stop(f"{line}; code that comes with a model is never run") from error
