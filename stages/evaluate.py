"""evaluate: score the test split under the base and the tuned model, by one of three protocols.

in   data/raw (test.txt), data/tokens, data/base, data/adapter, metrics/loss.csv, params.yaml: evaluate.*, seed
out  metrics/eval.json: for base and tuned, and as the change from one to the other,
         loss             summed negative log-likelihood / predicted tokens, nats
         perplexity       exp(loss)
         word_perplexity  exp(summed negative log-likelihood / words of the original text)
         bits_per_byte    summed negative log-likelihood / ln 2 / UTF-8 bytes of the original text
         accuracy, top5_accuracy  share of predicted tokens that are the model's first choice, among its first five
     and predicted_tokens, words, bytes, windows: the counts behind these metrics
     metrics/positions.csv: loss and accuracy by the position in the window
     metrics/plots: both tables, and metrics/loss.csv, as pictures; a passage of the test split, token by token
     metrics/report.md: what came out, what ran, all pictures, continuations of three prompts
     metrics/environment.json: hardware, versions and duration of each stage
"""

import json
import time
from functools import partial
from pathlib import Path

import click

from gpt2lora.distributed import launch
from gpt2lora.evaluation import plots, report
from gpt2lora.evaluation.metrics import (
    compute_metrics,
    count_scored,
    describe_metrics,
    warn_about_metrics,
    write_positions,
)
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.adapter_files import METHOD_FILE
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, file_digest, require_file, verify_digests
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.context import choose_stride
from gpt2lora.pipeline.schemas import EvaluateParams, check_params


@command
@click.option("--raw", type=Path, default="data/raw", show_default=True, help="Folder of the text files.")
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--loss", type=Path, default="metrics/loss.csv", show_default=True, help="File of the training losses.")
@click.option("--out", type=Path, default="metrics/eval.json", show_default=True, help="File of the metrics.")
@click.option(
    "--positions", type=Path, default="metrics/positions.csv", show_default=True, help="File of metrics by position."
)
def main(raw: Path, tokens: Path, base: Path, adapter: Path, loss: Path, out: Path, positions: Path) -> None:
    """Score the test split under the base and the tuned model."""
    work = partial(evaluate, raw, tokens, base, adapter, loss, out, positions)
    launch.run("evaluate", check_params, partial(choose_gpus, base, tokens), work)


def choose_gpus(base: Path, tokens: Path, free: int) -> tuple[int, str]:
    """Return how many of the free GPUs to score on, and why."""
    from gpt2lora.evaluation import gpus

    return gpus.choose_gpus(base, tokens, params.section("evaluate", EvaluateParams).stride, free)


def evaluate(raw: Path, tokens: Path, base: Path, adapter: Path, loss: Path, out: Path, positions: Path) -> None:
    """Score in this process, alone or as one of a group."""
    started = time.perf_counter()
    options = params.section("evaluate", EvaluateParams)
    from gpt2lora.dataset.blocks import read_token_manifest
    from gpt2lora.dataset.documents import find_split
    from gpt2lora.dataset.tokenizer import load_tokenizer
    from gpt2lora.evaluation.protocols import build_task, read_test_text

    plots.read_columns(plots.TRAINING_PLOTS, require_file(loss, "train"))  # a damaged file is reported before scoring
    manifest = read_token_manifest(tokens, base)
    verify_digests(raw, manifest["raw"], tokens / MANIFEST, "prepare tokenize")
    stride = choose_stride(options, manifest["block_size"])
    text, tokenizer = read_test_text(raw), load_tokenizer(base, manifest["special_tokens"])
    task = build_task(options.protocol, stride, manifest, text, tokens, base)
    if len(task.windows) == 0 or task.words == 0:
        raise StageError(
            f"{find_split(raw, 'test')}: nothing to score: expected a word at least, and a token to predict"
        )

    echo("evaluate: loading torch and transformers")
    from gpt2lora.distributed import facts, group
    from gpt2lora.evaluation import passage
    from gpt2lora.evaluation.samples import choose_prompts, generate_samples
    from gpt2lora.model import device, loading
    from gpt2lora.scoring.log_likelihood import score_windows

    target, processes = device.pick_device(), group.size()
    dtype = device.compute_dtype(options.precision, target)
    precision = str(dtype).removeprefix("torch.")
    decisive = facts.run_facts(vars(options), (raw, tokens, base, adapter), facts.code_files(Path(__file__)))
    described = facts.describe_device(target, device.device_name(target))
    group.check_same(decisive | {"precision (evaluate.precision)": precision}, described)
    prompts = choose_prompts(text, tokenizer, manifest["block_size"], manifest["prefix"])
    scores, metrics, samples = {}, {}, [prompts.ids]
    for name, load in (
        ("base", lambda: loading.load_base(base, None, dtype)),
        ("tuned", lambda: loading.load_tuned(base, adapter, dtype)),
    ):
        model = load()
        scores[name] = score_windows(model, task.windows, options.batch_size, dtype, f"test, {name}")
        metrics[name] = compute_metrics(scores[name], task)  # stops if the model is broken, which cannot generate
        samples.append(generate_samples(model, prompts, manifest["end_of_text_id"]))
        del model
        echo(f"evaluate: {name}: {describe_metrics(metrics[name])}")
        warn_about_metrics(name, metrics[name])
    if not group.leave():
        return
    metrics["change"] = {key: metrics["tuned"][key] - metrics["base"][key] for key in metrics["base"]}
    metrics |= count_scored(task)

    with atomic_output(positions) as table, atomic_output(out) as file:
        write_positions(table, task.windows, scores, manifest["block_size"])
        file.write_text(json.dumps(metrics, indent=2) + "\n")
    plots.draw_plots(plots.TRAINING_PLOTS, loss, out.parent / "plots")
    plots.draw_plots(plots.TEST_PLOTS, positions, out.parent / "plots")
    shown = passage.choose_passage(task.windows, scores, tokenizer, manifest["end_of_text_id"], params.seed())
    passage.draw_passage(shown, out.parent / "plots" / passage.FILE)
    prefix = "".join(map(tokenizer.id_to_token, manifest["prefix"]))
    outputs = {"base": base, "prepare": raw, "tokenize": tokens, "train": adapter}
    records = {stage: environment.read_record(folder, stage) for stage, folder in outputs.items()}
    method, quantization = loading.read_method(adapter)
    ran = {
        "method": report.describe_method(method, quantization),
        "trained_by": method,
        "base_bits": quantization and quantization.bits,
        "scored": report.describe_scoring(options.protocol, manifest, stride, prefix),
        "adapter": file_digest(adapter / METHOD_FILE),  # whose figures these are
        "precision": precision,
        "processes": processes,
    }
    records["evaluate"] = environment.describe_run(started, **ran)
    decoded = [[tokenizer.decode(ids) for ids in column] for column in samples]
    text = "".join(shown.texts) if passage.has_undrawable(shown) else ""
    report.write_report(out.parent, metrics, records, list(zip(*decoded, strict=True)), text)
    echo(f"evaluate: {out.parent}/report.md shows all results")


if __name__ == "__main__":
    main()
