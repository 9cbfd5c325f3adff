"""The files beside the weights of an exported model, such that transformers 4.57 reads them as transformers 5 does."""

import contextlib
import json
import shutil
from pathlib import Path

from gpt2lora.pipeline.artifacts import file_digest
from gpt2lora.pipeline.cli import echo
from gpt2lora.sources.hub import CONFIG_FILES
from gpt2lora.training.model_card import CARD

LOAD = """## Load

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
# Keys of a base's config.json that the exported model replaces, or that name code.
DROPPED = ("torch_dtype", "auto_map", "_name_or_path", "transformers_version")


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copy the tokenizer's files, and all other files of the base that the export has not written itself."""
    for pattern in CONFIG_FILES:
        for file in sorted(base.glob(pattern)):
            if not (folder / file.name).exists():  # save_pretrained wrote config.json, with the new dtype
                shutil.copyfile(file, folder / file.name)
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":  # transformers 5's name of the same class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):  # a dict in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(file, config)


def complete_config(base: Path, folder: Path) -> None:
    """Add to config.json what transformers 5 leaves out, and transformers 4 and llama.cpp's converter need.

    Without rope_theta, transformers 4 would silently take 10,000, and without a share of rotated dimensions a default.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in original.items() if key not in DROPPED} | config
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # otherwise one for each type of layer
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if config.get("model_type") in ("gpt_neox", "gpt_neox_japanese") and "rope_theta" in rope:
        config["rotary_emb_base"] = rope["rope_theta"]
        config["rotary_pct"] = rope.get("partial_rotary_factor", 1.0)
    if config.get("model_type") == "gpt2":
        config["n_ctx"] = config["n_positions"]
    write_json(folder / "config.json", config)


def write_card(adapter: Path, folder: Path, metrics: Path) -> None:
    """Write the adapter's model card for the exported model, with the figures on the test split if they are of it."""
    if not (adapter / CARD).exists():
        return
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(adapter / CARD, ignore_metadata_errors=True)
    data, found = card.data, read_test_metrics(adapter, metrics)
    data.library_name = "transformers"
    if data.base_model:
        data.base_model_relation = "finetune"
    if found and data.eval_results:
        given = vars(data.eval_results[0]) | {"dataset_split": "test"}
        data.eval_results += [
            EvalResult(**given | {"metric_type": name, "metric_value": round(value, 4)})
            for name, value in found.items()
        ]
    if not found:
        echo(f"export: {metrics / 'eval.json'} is not of this adapter: the model card has no figures of the test split")
    body = card.text.partition("## Load\n")[0].replace("LoRA adapter for", "LoRA adapter merged into", 1)
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{body.lstrip()}{LOAD}", encoding="utf-8")


def read_test_metrics(adapter: Path, metrics: Path) -> dict[str, float]:
    """Return the tuned model's figures in metrics/eval.json; {} if there are none, or they are of another adapter."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        record = json.loads((metrics / "environment.json").read_text(encoding="utf-8"))["evaluate"]
        if record["adapter"] == file_digest(adapter / "method.json"):
            return dict(json.loads((metrics / "eval.json").read_text(encoding="utf-8"))["tuned"])
    return {}


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
