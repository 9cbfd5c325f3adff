"""README.md beside an adapter: its base, its data, how it was trained, its figures, and how it is loaded elsewhere.

It depends on the parameters, the inputs and the result of a run alone, so that the same run writes the same bytes.
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.pipeline.adapter_files import ADAPTER_CONFIG
from gpt2lora.pipeline.artifacts import read_json, read_source
from gpt2lora.pipeline.schemas import LoraParams, QuantizationParams, TrainParams

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
METHOD_NAMES = {"lora": "A LoRA adapter", "qlora": "A QLoRA adapter", "full": "A fully fine-tuned model"}


def name_base(adapter: Path, base: Path) -> None:
    """Write into adapter_config.json where the base is to be had: an id and a revision of the hub, or a folder.

    PEFT writes the folder `base`, which stands for a stranger's repository on the hub anywhere but here. It is changed
    afterwards, since PEFT asks the hub about a base whose name it knows before it saves.
    """
    file, source = adapter / ADAPTER_CONFIG, read_source(base, "base")
    names = {"base_model_name_or_path": source.get("model") or str(base), "revision": source.get("revision")}
    config = json.loads(file.read_text(encoding="utf-8")) | names
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_card(
    folder: Path,
    base: Path,
    tokens: Path,
    method: str,
    quantization: QuantizationParams | None,
    lora: LoraParams,
    train: TrainParams,
    record: dict,
) -> None:
    """Write the card into `folder`, data/adapter.

    Args:
        record: the content of metrics/train.json.
    """
    source, data = read_source(base, "base"), read_source(tokens, "tokenize")
    parameters = record["trainable_parameters"], record["trainable_parameters"] + record["frozen_parameters"]
    before, after = record["start_validation_loss"], record["best_validation_loss"]
    rows = {
        "base": describe_source(source.get("model"), source.get("revision")) or f"`{base}`",
        "data": describe_source(data.get("dataset"), data.get("revision"), data.get("config")) or "not recorded",
        "method": describe_training(method, quantization, lora),
        "started from": describe_start(record),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "torch")),
        "training": f"{record['steps']:,} steps, {record['tokens']:,} tokens, learning rate {train.learning_rate:g}",
        "trained parameters": "{:,} of {:,}".format(*parameters),
        "validation loss": f"{before:.4f} nats/token before training, {after:.4f} after step {record['best_step']:,}",
        "validation perplexity": f"{perplexity(before)} before training, {perplexity(after)} after",
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {escape(text)} |" for name, text in rows.items() if text)])
    title = f"{METHOD_NAMES[method]} for {Path(source.get('model') or 'the embedded sample').name}"
    figures = "Figures on the test split are in `metrics/eval.json` and `metrics/report.md` of the same run."
    load = describe_loading(base, source, method, quantization, lora)
    metadata = card_metadata(source, data, method, record)
    text = f"---\n{metadata}\n---\n\n# {title}\n\n{table}\n\n{figures}\n\n## Load\n\n{load}"
    (folder / CARD).write_text(text, encoding="utf-8")


def perplexity(loss: float) -> str:
    """Return exp(loss) as text; a float holds none above exp(709)."""
    return f"{math.exp(loss):.2f}" if loss < 709 else "above 1e307"


def escape(text: str) -> str:
    """Return text for a cell of a Markdown table, which a bar or a line break in a path would end."""
    return " ".join(text.split("\n")).replace("|", "\\|")


def card_metadata(source: dict, data: dict, method: str, record: dict) -> str:
    """Return the hub's metadata as YAML. Only what is on the hub is named there: a base by id, not by folder."""
    from huggingface_hub import ModelCardData

    relation = {"base_model_relation": "finetune" if method == "full" else "adapter"} if source.get("revision") else {}
    return ModelCardData(
        base_model=source["model"] if source.get("revision") else None,
        datasets=[data["dataset"]] if data.get("revision") else None,
        library_name="transformers" if method == "full" else "peft",
        pipeline_tag="text-generation",
        tags=[method],
        model_name=f"{Path(source.get('model') or 'sample').name}-{method}",
        eval_results=validation_results(data, record),
        metrics=["perplexity"],
        **relation,
        **(source.get("license") or {}),
    ).to_yaml()


def validation_results(data: dict, record: dict) -> "list[EvalResult]":
    """Return loss and perplexity on the validation split, as the hub shows them."""
    from huggingface_hub import EvalResult

    loss = record["best_validation_loss"]
    values = {"loss": loss, "perplexity": math.exp(loss)} if loss < 709 else {"loss": loss}
    name = data.get("dataset") or "unknown"
    dataset = {
        "dataset_type": name if data.get("revision") else Path(name).name,
        "dataset_name": Path(name).name,
        "dataset_config": data.get("config"),
        "dataset_revision": data.get("revision"),
        "dataset_split": "validation",
    }
    return [
        EvalResult(task_type="text-generation", metric_type=metric, metric_value=round(value, 4), **dataset)
        for metric, value in values.items()
    ]


def describe_source(name: str | None, revision: str | None, config: str | None = None) -> str:
    """Return a model or a dataset in words: with a link if it is on the hub."""
    if not name:
        return ""
    if not revision:
        return f"`{name}`"
    return f"`{name}`{f', {config}' * bool(config)}, at commit `{revision}` of the hub"


def describe_start(record: dict) -> str:
    """Return in words from which adapter training started, "" if from none."""
    start = record.get("start_from")
    return f"the adapter `{Path(start['folder']).name}`, SHA-256 `{start['sha256']}`" if start else ""


def describe_training(method: str, quantization: QuantizationParams | None, lora: LoraParams) -> str:
    """Return in words what was trained on which form of the base."""
    if method == "full":
        return "all weights"
    stored = ""
    if quantization:
        kind = f" ({quantization.quant_type})" if quantization.bits == 4 else ""
        stored = f", on a base in {quantization.bits} bits{kind}"
    variants = [name for name, chosen in (("rsLoRA", lora.use_rslora), ("DoRA", lora.use_dora)) if chosen]
    variants += [f"init {lora.init}"] * (lora.init != "default")
    variants += [f"the adapter itself in {lora.bits} bits"] * (lora.bits < 16)
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    return ", ".join([f"rank {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {modules}", *variants]) + stored


def describe_loading(
    base: Path, source: dict, method: str, quantization: QuantizationParams | None, lora: LoraParams
) -> str:
    """Return Markdown with the code that loads the folder of the card, "." in it, and its tokenizer."""
    # A base without a home is found from the repository's root alone: its adapter is loaded from there, too.
    place = json.dumps("." if source.get("model") else str(base.parent / "adapter"))
    name, revision = json.dumps(source.get("model") or str(base)), source.get("revision")
    tokenizer = f"AutoTokenizer.from_pretrained({name}{f', revision={json.dumps(revision)}' * bool(revision)})"
    if method == "full":
        lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({place})")
    else:
        imported = "AutoTokenizer, BitsAndBytesConfig" if quantization else "AutoTokenizer"
        lines = ["from peft import AutoPeftModelForCausalLM", f"from transformers import {imported}", ""]
        option = ""
        if quantization:
            lines += ["# The base as it was in training.", f"quantized = {quantization_code(quantization)}"]
            option = ", quantization_config=quantized"
        lines.append(f"model = AutoPeftModelForCausalLM.from_pretrained({place}{option})")
        if read_json(base / "config.json", "base").get("rescale_every"):  # as load_base sets it
            lines.append("model.config.rescale_every = 0  # else transformers halves weights, and not the adapter's")
    text = "\n".join(["```python", *lines, f"tokenizer = {tokenizer}", "```", ""])
    if lora.bits < 16 and method != "full":
        text = "First run `gpt2lora dequantize --out FOLDER`, and load that folder.\n\n" + text
    if not source.get("model"):
        text += (
            f"\nThis base exists only where the run was made: as `{base}`, seen from the repository's root, where this "
            "code runs. `gpt2lora export` makes a model that loads anywhere.\n"
        )
    elif not revision:
        text += "\nThe base is a folder of the machine that trained: write its path where it lies elsewhere.\n"
    return text


def quantization_code(quantization: QuantizationParams) -> str:
    """Return the Python code of the base's quantization."""
    if quantization.bits == 8:
        return "BitsAndBytesConfig(load_in_8bit=True)"
    options = f"bnb_4bit_quant_type={quantization.quant_type!r}, bnb_4bit_use_double_quant={quantization.double_quant}"
    return f"BitsAndBytesConfig(load_in_4bit=True, {options})".replace("'", '"')
