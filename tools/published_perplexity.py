"""Compare the perplexities of GPT-2 124M on WikiText-2 with published ones (`make verify`).

29.94    perplexity by the loop of transformers' documentation without overlap, and
37.37    word perplexity by lm-evaluation-harness: https://github.com/huggingface/transformers/issues/13761;
         the latter again as 37.3698, by a later harness: https://github.com/workofart/ml-by-hand/releases
25.2     the loop at its stride of 512: https://allenlu2009.github.io/genai/2025/01/15/Perplexity_Code
"""

import json
from pathlib import Path

import click

from gpt2lora.dataset.tokenizer import end_of_text_id, load_tokenizer
from gpt2lora.evaluation import protocols
from gpt2lora.evaluation.metrics import compute_metrics
from gpt2lora.pipeline import params
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.context import choose_block_size
from gpt2lora.sources import hub
from gpt2lora.sources.hub import restore_line
from gpt2lora.sources.local import read_text

PUBLISHED = (29.94, 25.2, 37.37)
TOLERANCE = 0.1


@command
@click.option("--base", type=Path, help="Folder of the model.  [default: presets.gpt2's, from the hub]")
@click.option("--text", type=Path, help="File of the raw test split.  [default: presets.gpt2's, from the hub]")
@click.option(
    "--published",
    type=float,
    nargs=3,
    default=PUBLISHED,
    show_default=True,
    help="Perplexity by hf at a stride of the whole context and of half of it; word perplexity by lm-eval.",
)
@click.option("--batch-size", type=click.IntRange(1), help="Windows read at once.  [default: as many as fit well]")
def main(base: Path | None, text: Path | None, published: tuple[float, ...], batch_size: int | None) -> None:
    """Score GPT-2 124M in fp32 by each protocol with a published perplexity; fail if one is off by more than 0.1."""
    preset = params.section("presets.gpt2", params.PresetParams)
    folder = base or hub.fetch_model(preset.model, preset.model_revision)
    content = read_text(text) if text else fetch_test(preset)
    measured = measure(folder, content, batch_size)

    echo(f"\n{'perplexity':32}{'published':>12}{'measured':>12}{'difference':>12}")
    wrong = []
    for (name, value), expected in zip(measured.items(), published, strict=True):
        echo(f"{name:32}{expected:12.4f}{value:12.4f}{value - expected:+12.4f}")
        if not abs(value - expected) <= TOLERANCE:
            wrong.append(name)
    if wrong:
        raise StageError(f"verify: off by more than {TOLERANCE}: {', '.join(wrong)}")


def fetch_test(preset: params.PresetParams) -> str:
    """Return the raw test split from the hub."""
    rows = hub.fetch_dataset(preset.dataset, preset.dataset_config, preset.dataset_revision, preset.text_column)["test"]
    return "".join(map(restore_line, rows))


def measure(base: Path, text: str, batch_size: int | None) -> dict[str, float]:
    """Return the three perplexities of the model in `base` on a raw test split."""
    config = json.loads(require_file(base / "config.json", "base").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(base)
    context = choose_block_size(None, config, 0)
    end = end_of_text_id(base, config, tokenizer)
    echo("verify: loading torch and transformers")
    import torch

    from gpt2lora.model.loading import load_base
    from gpt2lora.scoring.log_likelihood import score_windows

    model = load_base(base, None, torch.float32)
    measured = {}
    for name, metric, task in (
        (f"hf, stride {context}", "perplexity", protocols.hf_task(text, tokenizer, context, context)),
        (f"hf, stride {context // 2}", "perplexity", protocols.hf_task(text, tokenizer, context, context // 2)),
        ("lm-eval, by words", "word_perplexity", protocols.lm_eval_task(text, tokenizer, end, context)),
    ):
        scores = score_windows(model, task.windows, batch_size, torch.float32, name)
        measured[name] = compute_metrics(scores, task)[metric]
    return measured


if __name__ == "__main__":
    main()
