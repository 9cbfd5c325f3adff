"""metrics/report.md: what ran, base against tuned in figures, pictures and words. GitHub and most editors show it."""

import re
from pathlib import Path

# What Markdown, or HTML in it, may take for more than a character; `$` is mathematics on GitHub.
MARKS = re.compile(r"[\\`*_\[\]<>&|~$#]")
FIGURES = {  # of metrics/eval.json: name, factor, decimals
    "loss": ("loss (nats/token)", 1, 4),
    "perplexity": ("perplexity", 1, 2),
    "word_perplexity": ("word perplexity", 1, 2),
    "bits_per_byte": ("bits per byte", 1, 4),
    "accuracy": ("accuracy (%)", 100, 2),
    "top5_accuracy": ("top-5 accuracy (%)", 100, 2),
}
SHOWN = ("torch", "transformers", "peft", "bitsandbytes", "dvc")  # of the versions in metrics/environment.json


def render(
    scores: dict, records: dict[str, dict | None], samples: list[tuple[str, str, str]], pictures: list[Path]
) -> str:
    """Return the report in Markdown.

    Args:
        scores: metrics/eval.json.
        records: metrics/environment.json: a record, or None, for each stage.
        samples: prompts, and what the base and the tuned model put behind each.
        pictures: paths from the report's folder.
    """
    parts = [
        "# Base against tuned",
        what_ran(records),
        "## Test split",
        figures(scores),
        f"On {scores['predicted_tokens']:,} predicted tokens, {scores['words']:,} words, {scores['bytes']:,} bytes "
        f"of the original text, in {scores['windows']:,} windows.",
        "## Plots",
        *(f"![{path.stem.replace('_', ' ')}]({path.as_posix()})" for path in pictures),
        "## Continuations",
        "Beginnings of the test split, and what each model puts behind them, drawn alike for both.",
        table(["prompt", "base", "tuned"], [[escape(text) for text in sample] for sample in samples]),
        "## Stages",
        stages(records),
    ]
    return "\n\n".join(parts) + "\n"


def what_ran(records: dict[str, dict | None]) -> str:
    base, prepare, evaluate = (records[stage] or {} for stage in ("base", "prepare", "evaluate"))
    rows = {
        "preset": base.get("preset"),
        "base": source(base.get("model"), base.get("revision")),
        "corpus": source(prepare.get("dataset"), prepare.get("revision")),
        "method": evaluate["method"],
        "scored": evaluate["scored"],
        "commit": evaluate["commit"] and evaluate["commit"][:12] + (" and changes" * evaluate["uncommitted_changes"]),
        "versions": ", ".join(
            [f"Python {evaluate['python']}", *(f"{name} {evaluate['versions'][name]}" for name in SHOWN)]
        ),
    }
    return "\n".join(f"- {name}: {escape(value or 'not known')}" for name, value in rows.items())


def source(name: str | None, revision: str | None) -> str | None:
    return f"{name} at {revision[:12]}" if revision else name


def figures(scores: dict) -> str:
    rows = []
    for figure, (name, factor, decimals) in FIGURES.items():
        base, tuned, change = (factor * scores[side][figure] for side in ("base", "tuned", "change"))
        # evaluate caps a perplexity at 1e304.
        style = f",.{decimals}f" if max(base, tuned) < 1e9 else ".2e"
        rows.append([name, f"{base:{style}}", f"{tuned:{style}}", f"{change:+{style}}"])
    return table(["", "base", "tuned", "change"], rows, numbers=True)


def stages(records: dict[str, dict | None]) -> str:
    rows = []
    for stage, record in records.items():
        if record is None:
            rows.append([stage, "not recorded", "", ""])
        else:
            threads = record["threads"] or record["cores"]
            place = record["gpu"] or f"{record['cpu']}, {threads} thread{'s' * (threads > 1)}"
            rows.append([stage, duration(record["seconds"]), escape(place), record.get("precision", "")])
    return table(["stage", "duration", "on", "precision"], rows)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(header: list[str], rows: list[list[str]], numbers: bool = False) -> str:
    """Return a table in GitHub's Markdown; `numbers`: all columns but the first are set to the right."""
    rule = ["---", *(["---:"] * (len(header) - 1))] if numbers else ["---"] * len(header)
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def escape(text: str) -> str:
    """Return a text as Markdown that shows it: one line, its line breaks as <br>, nothing in it a mark."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "<br>".join(MARKS.sub(r"\\\g<0>", line) for line in lines if line)
