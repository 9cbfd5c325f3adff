"""metrics/report.md and metrics/environment.json: what ran, base and tuned model in metrics, pictures and samples.

GitHub and most editors show the report.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2lora.evaluation.metrics import format_perplexity, shows_words
from gpt2lora.evaluation.plots import PASSAGE, TEST_PLOTS, TRAINING_PLOTS
from gpt2lora.pipeline.artifacts import atomic_output

if TYPE_CHECKING:
    from gpt2lora.pipeline.schemas import QuantizationParams

# Characters that Markdown, or HTML in it, may interpret; `$` starts mathematics on GitHub.
MARKDOWN_CHARACTERS = re.compile(r"[\\`*_\[\]<>&|~$#]")
METRIC_ROWS = {  # of metrics/eval.json, in the same units: name, decimals
    "loss": ("loss (nats/token)", 4),
    "perplexity": ("perplexity (of tokens)", 2),
    "word_perplexity": ("perplexity (of words)", 2),
    "bits_per_byte": ("bits per byte", 4),
    "accuracy": ("accuracy (share of tokens)", 4),
    "top5_accuracy": ("top-5 accuracy (share of tokens)", 4),
}
METHOD_NAMES = {"lora": "LoRA", "qlora": "QLoRA", "full": "Training all weights"}
SHOWN_VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "dvc")


def write_report(
    folder: Path, metrics: dict, records: dict[str, dict | None], samples: list[tuple[str, ...]], passage: str
) -> None:
    """Write environment.json and report.md into `folder`; the pictures are in its subfolder plots."""
    with atomic_output(folder / "environment.json") as file:
        file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    pictures = [Path("plots") / plot.file for plot in (*TEST_PLOTS, *TRAINING_PLOTS)]
    with atomic_output(folder / "report.md") as file:
        file.write_text(render_report(metrics, records, samples, pictures, passage), encoding="utf-8")


def render_report(
    metrics: dict,
    records: dict[str, dict | None],
    samples: list[tuple[str, ...]],
    pictures: list[Path],
    passage: str,
) -> str:
    """Return the report in Markdown.

    Args:
        metrics: the content of metrics/eval.json.
        records: the content of metrics/environment.json: for each stage a record, or None.
        samples: prompts, each with the continuations of the base and of the tuned model.
        pictures: paths relative to the report's folder.
        passage: the text of the passage's picture, if that shows some of its characters by their codes; else "".
    """
    passage_text = ["The passage as text, with the characters that the picture shows by their codes:"]
    passage_text += [escape_markdown(passage)]
    parts = [
        "# Base against tuned",
        headline(metrics, records),
        metrics_table(metrics),
        "`base` is the float base before any training, `tuned` the model after it"
        + (", which stands on the quantized base" if (records["evaluate"] or {}).get("base_bits") else "")
        + ". Lower is better, except for accuracies. "
        f"On {metrics['predicted_tokens']:,} predicted tokens, {metrics['words']:,} words, {metrics['bytes']:,} bytes "
        f"of the original text, in {metrics['windows']:,} windows.",
        "## What changed",
        "A passage of the test split, drawn by the seed. Each token's colour says by how many nats the tuned model "
        "predicts it better (blue) or worse (orange) than the base.",
        f"![passage](plots/{PASSAGE})",
        *(passage_text if passage else []),
        "## What ran",
        run_summary(records),
        "## Plots",
        *(f"![{path.stem.replace('_', ' ')}]({path.as_posix()})" for path in pictures),
        "## Continuations",
        "Beginnings of articles of the test split, and how each model continues them, with the same sampling for both.",
        markdown_table(["prompt", "base", "tuned"], [[escape_markdown(text) for text in sample] for sample in samples]),
        "## Stages",
        stages_table(records),
    ]
    return "\n\n".join(parts) + "\n"


def headline(metrics: dict, records: dict[str, dict | None]) -> str:
    """Return one sentence: what tuning did to the test perplexity, with which share of the weights."""
    base, tuned = (metrics[side]["perplexity"] for side in ("base", "tuned"))
    train, bits = (records["train"] or {}).get("settings"), records["evaluate"].get("base_bits")
    name = METHOD_NAMES[records["evaluate"]["trained_by"]] + (f" on a base of {bits} bits" if bits else "")
    change = f"from {format_perplexity(base)} to {format_perplexity(tuned)} ({tuned / base - 1:+.1%})".replace(
        "%", " %"
    )
    verb = "lowers" if tuned < base else "raises" if tuned > base else "does not change"
    if train and train["lora"]:  # with method full, all of them
        change += f" with {train['trainable_percent']:.2g} % of the weights"
    return f"**{name} {verb} the test perplexity {change}.**"


def settings_rows(settings: dict) -> dict[str, str]:
    """Return what the report says about a training, by name."""
    lora = settings["lora"]
    modules = lora and lora["target_modules"]
    seeds = f"{settings['seed']}; of training {settings['train_seed']}"
    return {
        "rank, alpha": f"{lora['r']}, {lora['alpha']:g}" if lora else "none: no adapter",
        "target modules": (modules if isinstance(modules, str) else ", ".join(modules)) if lora else "all",
        "trained": f"{settings['trainable_parameters']:,} parameters, {settings['trainable_percent']:.2g} % of all",
        "learning rate": f"{settings['learning_rate']:g} at most",
        "epochs": f"{settings['epochs']}: {settings['steps']:,} steps of {settings['rows_per_step']} rows",
        "tokens": f"{settings['tokens']:,} trained on, over all epochs",
        "seeds": seeds if settings["seed"] != settings["train_seed"] else f"{settings['seed']} of everything",
    }


def run_summary(records: dict[str, dict | None]) -> str:
    """Return a table of what ran: preset, base, corpus, method, its settings, protocol, commit and versions."""
    base, prepare, evaluate = (records[stage] or {} for stage in ("base", "prepare", "evaluate"))
    settings = (records["train"] or {}).get("settings")
    rows = {
        "preset": base.get("preset"),
        "base": source_name(base.get("model"), base.get("revision")),
        "corpus": source_name(prepare.get("dataset"), prepare.get("revision")),
        "method": evaluate["method"],
        **(settings_rows(settings) if settings else {"training": None}),
        "scored": evaluate["scored"],
        "commit": evaluate["commit"] and evaluate["commit"][:12] + (" and changes" * evaluate["uncommitted_changes"]),
        "versions": ", ".join(
            [f"Python {evaluate['python']}", *(f"{name} {evaluate['versions'][name]}" for name in SHOWN_VERSIONS)]
        ),
    }
    return markdown_table(["", ""], [[name, escape_markdown(value or "not known")] for name, value in rows.items()])


def source_name(name: str | None, revision: str | None) -> str | None:
    """Return the name of a model or dataset, with the beginning of its revision."""
    return f"{name} at {revision[:12]}" if revision else name


def describe_method(method: str, quantization: "QuantizationParams | None") -> str:
    """Return the method in words."""
    if quantization is None:
        return method
    double = ", its scales quantized too" if quantization.double_quant else ""
    kind = f" ({quantization.quant_type}{double})" if quantization.bits == 4 else ""
    return f"{method}, on a base of {quantization.bits} bits{kind}"


def describe_scoring(protocol: str, manifest: dict, stride: int, prefix: str) -> str:
    """Return the protocol and its windows in words.

    Args:
        manifest: that of data/tokens.
        prefix: the tokens that the tokenizer puts before a text, "" for none.
    """
    windows = f"{protocol}, in windows of {manifest['block_size']:,} tokens"
    if protocol == "lm-eval":
        return windows
    if protocol == "hf":
        return f"{windows}, {stride:,} apart" + (f", {prefix} before the text" if prefix else "")
    before = f", each after {prefix}" if prefix else ""
    if manifest["layout"] == "padded":
        return f"{protocol}, each paragraph by itself, of at most {manifest['block_size']:,} tokens{before}"
    return f"{windows}, {stride:,} apart{before}"


def metrics_table(metrics: dict) -> str:
    """Return the metrics of base and tuned model, and the change; word perplexities only where they tell something."""
    rows = []
    for key, (name, decimals) in METRIC_ROWS.items():
        if key == "word_perplexity" and not shows_words(metrics["base"], metrics["tuned"]):
            continue
        base, tuned, change = (metrics[side][key] for side in ("base", "tuned", "change"))
        # A perplexity is capped at 1e304.
        style = f",.{decimals}f" if max(base, tuned) < 1e9 else ".2e"
        percent = f"{100 * change / base:+.1f}" if base else ""
        rows.append([name, f"{base:{style}}", f"{tuned:{style}}", f"{change:+{style}}", percent])
    return markdown_table(["test split", "base", "tuned", "change", "change (%)"], rows, numbers=True)


def stages_table(records: dict[str, dict | None]) -> str:
    """Return duration, hardware and precision of each stage."""
    rows = []
    for stage, record in records.items():
        if record is None:
            rows.append([stage, "not recorded", "", ""])
            continue
        threads = record["threads"] or record["cores"]
        hardware = record["gpu"] or f"{record['cpu']}, {threads} thread{'s' * (threads > 1)}"
        duration, precision = format_duration(record["seconds"]), record.get("precision", "")
        rows.append([stage, duration, escape_markdown(hardware), precision])
    return markdown_table(["stage", "duration", "on", "precision"], rows)


def format_duration(seconds: float) -> str:
    """Return seconds as "5.0 s", "2 min 3 s" or "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def markdown_table(header: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    """Return a table in GitHub's Markdown. numbers: align all columns except the first to the right."""
    rule = ["---", *(["---:"] * (len(header) - 1))] if numbers else ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def escape_markdown(text: str) -> str:
    """Return Markdown that shows `text` literally, on one line, with <br> for line breaks."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "<br>".join(MARKDOWN_CHARACTERS.sub(r"\\\g<0>", line) for line in lines if line)
