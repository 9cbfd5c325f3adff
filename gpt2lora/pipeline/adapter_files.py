"""The files of a PEFT adapter, and what can be told without torch of the one that training starts from."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import file_digest, read_json, verify_digests
from gpt2lora.pipeline.cli import StageError

if TYPE_CHECKING:
    from gpt2lora.pipeline.schemas import LoraParams

METHOD_FILE = "method.json"  # what `train` writes beside an adapter, or a model that was trained in full
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUANTIZED_WEIGHTS = "adapter_quantized.safetensors"  # replaces ADAPTER_WEIGHTS with lora.bits 8 or 4
PREFIX = "base_model.model."  # of the names of tensors
MATCHING = {"r": "r", "alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
# What adapter_config.json may say besides. Any other key that is set changes what the adapter computes.
IGNORED = (
    *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout"),
    *("megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "target_parameters", "task_type"),
)
INITS_OF_THE_WHOLE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")  # the others change the base as well


def read_method_file(folder: Path) -> dict:
    """Return the content of method.json."""
    return read_json(folder / METHOD_FILE, "train", "method", "quantization", "files", "base")


def verify_adapter(folder: Path) -> dict:
    """Compare the adapter's files with the digests in method.json; return its content."""
    record = read_method_file(folder)
    verify_digests(folder, record["files"], folder / METHOD_FILE, "train")
    return record


def start_path(lora: "LoraParams") -> Path | None:
    """Return the folder lora.start_from, which may not exist here, or None."""
    return Path(os.path.expanduser(lora.start_from)) if lora.start_from else None


def find_start(lora: "LoraParams") -> Path | None:
    """Return the folder lora.start_from, or None.

    Raises:
        StageError: it does not exist.
    """
    path = start_path(lora)
    if path and not os.path.exists(path):
        raise StageError(f"params.yaml: lora.start_from: {lora.start_from!r} does not exist, {params.seen_from(path)}")
    return path


def check_start(lora: "LoraParams") -> None:
    """Refuse an adapter to start from that is not of the kind that `lora` describes. A folder that is gone passes.

    Raises:
        StageError: names the parameter that differs.
    """
    folder = start_path(lora)
    if not folder or not os.path.exists(folder):
        return
    outside = "a folder outside data/, whose files a run replaces: copy the adapter first"
    inside = folder.resolve().is_relative_to(Path("data").resolve())
    params.require(not inside, "lora.start_from", lora.start_from, outside)
    config = read_config(folder)
    for name, key in MATCHING.items():
        expected = config.get(key, False if name.startswith("use_") else None)
        what = f"{params.in_yaml(expected)}, as in the adapter of lora.start_from"
        params.require(getattr(lora, name) == expected, f"lora.{name}", getattr(lora, name), what)
    expected = "an adapter of the whole base, not of what its init left of it"
    init = config.get("init_lora_weights")
    params.require(init in INITS_OF_THE_WHOLE_BASE, "lora.start_from", f"init_lora_weights {init}", expected)
    others = [key for key, value in config.items() if value not in (None, False, "none", [], {})]
    others = sorted({*others} - {*IGNORED, *MATCHING.values()})
    params.require(not others, "lora.start_from", ", ".join(others), "an adapter of LoRA, rsLoRA or DoRA alone")
    read_layers(folder)


def read_config(folder: Path) -> dict:
    """Return adapter_config.json of a LoRA adapter.

    Raises:
        StageError: the folder holds none.
    """
    file, expected = folder / ADAPTER_CONFIG, "expected the folder of a LoRA adapter, as PEFT writes it"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["peft_type"] == "LORA":
            return config
        found = f"peft_type {config['peft_type']!r}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = "missing" if isinstance(error, FileNotFoundError | NotADirectoryError) else f"not readable ({error})"
    raise StageError(f"params.yaml: lora.start_from: {file}: {found}; {expected}")


def weights_file(folder: Path) -> Path:
    """Return the file of an adapter's weights; pickles, which can run code, are refused."""
    for name in (QUANTIZED_WEIGHTS, ADAPTER_WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    refused = f" ({', '.join(pickles)}: pickled weights can run code, so they are refused)" if pickles else ""
    raise StageError(f"{folder}: no {ADAPTER_WEIGHTS}{refused}: save the adapter with save_pretrained of peft")


def read_layers(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the layers of an adapter by their name in the base model, each with its numbers of inputs and outputs."""
    from safetensors import SafetensorError, safe_open

    file = weights_file(folder)
    try:
        with safe_open(file, "numpy") as tensors:
            if file.name == QUANTIZED_WEIGHTS:
                shapes = json.loads(tensors.metadata()["shapes"])
            else:
                shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{file} is damaged, or a pointer of Git LFS: {error}") from error
    if strange := sorted(name for name in shapes if ".lora_" not in name or not name.startswith(PREFIX)):
        raise StageError(f"{file} holds {strange[0]}: expected the factors of linear layers of a whole model alone")
    parts = ("lora_A.weight", "lora_B.weight")
    names = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in shapes})
    if broken := [name for name in names if any(f"{PREFIX}{name}.{part}" not in shapes for part in parts)]:
        raise StageError(f"{file} lacks lora_A or lora_B of {broken[0]}")
    both = {name: [shapes[f"{PREFIX}{name}.{part}"] for part in parts] for name in names}
    return {name: (a[1], b[0]) for name, (a, b) in both.items()}


def describe_start(lora: "LoraParams") -> dict:
    """Return what the records say about the adapter that training starts from: its folder and its SHA-256, or {}."""
    folder = find_start(lora)
    return {"start_from": {"folder": lora.start_from, "sha256": file_digest(weights_file(folder))}} if folder else {}
