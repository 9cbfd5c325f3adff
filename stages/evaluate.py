"""evaluate: base and tuned model on the test split, side by side, by one of three protocols (stages/protocols.py).

in   data/raw (test.txt), data/tokens, data/base, data/adapter, metrics/loss.csv, params.yaml: evaluate.*
out  metrics/eval.json: for base and tuned, and as the change from one to the other,
         loss             summed negative log-likelihood / predicted tokens, nats
         perplexity       exp(loss)
         word_perplexity  exp(summed negative log-likelihood / words of the original text)
         bits_per_byte    summed negative log-likelihood / ln 2 / UTF-8 bytes of the original text
         accuracy, top5_accuracy  share of predicted tokens that are the model's first choice, among its first five
     and predicted_tokens, words, bytes, windows: what these figures were counted on
     metrics/positions.csv: loss and accuracy by the place in the window
     metrics/plots: the same, and how training went, as pictures
     metrics/report.md: what ran, these figures, all pictures, continuations of three prompts
     metrics/environment.json: what each stage ran on, and how long
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.evaluation import plots, report
from gpt2lora.evaluation.metrics import counts, figures, warn, write_positions
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, need, same, whole
from gpt2lora.pipeline.cli import Stop, say, stage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gpt2lora.evaluation.protocols import Task
    from gpt2lora.model.quantization import Quantization


PROTOCOLS = ("native", "hf", "lm-eval")


@dataclass
class Evaluate:
    protocol: str
    stride: int | None
    batch_size: int | None
    precision: str

    def __post_init__(self):
        known = self.protocol in PROTOCOLS
        params.require(known, "evaluate.protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        good = self.stride is None or self.stride > 0
        params.require(good, "evaluate.stride", self.stride, "an integer above 0, or null")
        good = self.batch_size is None or self.batch_size > 0
        params.require(good, "evaluate.batch_size", self.batch_size, "an integer above 0, or null")
        known = self.precision in params.PRECISIONS
        params.require(known, "evaluate.precision", self.precision, f"one of {', '.join(params.PRECISIONS)}")


@stage
@click.option("--raw", type=Path, default="data/raw", show_default=True, help="Folder of the text files.")
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option(
    "--out",
    type=Path,
    default="metrics/eval.json",
    show_default=True,
    help="File of the figures; the rest lies beside it.",
)
@click.option(
    "--positions", type=Path, default="metrics/positions.csv", show_default=True, help="File of the figures by place."
)
@click.option("--loss", type=Path, default="metrics/loss.csv", show_default=True, help="File of the losses by step.")
def main(raw: Path, tokens: Path, base: Path, adapter: Path, out: Path, positions: Path, loss: Path) -> None:
    """Score the test split under the base model and under the tuned one."""
    started = time.perf_counter()
    evaluate = params.section("evaluate", Evaluate)
    from gpt2lora.dataset import blocks
    from gpt2lora.dataset.tokenizer import load_tokenizer
    from gpt2lora.evaluation import protocols

    manifest = blocks.read_manifest(tokens, base)
    need(loss, "train")
    same(raw, manifest["raw"], tokens / MANIFEST, "prepare tokenize")
    block_size = manifest["block_size"]
    stride = choose_stride(evaluate, block_size)
    text = protocols.read(raw)
    tokenizer = load_tokenizer(base)
    task = lay_out(evaluate.protocol, stride, manifest, text, tokens, tokenizer)
    if len(task.windows) == 0 or task.words == 0:
        raise Stop(f"{raw}/test.txt: nothing to score: expected a word at least, and a token to predict")
    say("evaluate: loading torch and transformers")
    from gpt2lora.evaluation import samples
    from gpt2lora.model import device, loading
    from gpt2lora.scoring.log_likelihood import likelihood

    dtype = device.compute_dtype(evaluate.precision, device.pick_device())
    prompts = samples.choose(text, tokenizer, block_size)
    found, scores, written = {}, {}, {}
    for name, load in (
        ("base", lambda: loading.load_base(base, None, dtype)),
        ("tuned", lambda: loading.load_tuned(base, adapter, dtype)),
    ):
        network = load()
        found[name] = likelihood(network, task.windows, evaluate.batch_size, dtype, f"test, {name}")
        scores[name] = figures(found[name], task)  # stops at a broken model, which can write nothing
        written[name] = samples.write(network, prompts, manifest["end_of_text_id"])
        del network
        say(f"evaluate: {name:6} " + "  ".join(f"{figure} {value:.4f}" for figure, value in scores[name].items()))
        warn(name, scores[name])
    scores["change"] = {figure: scores["tuned"][figure] - scores["base"][figure] for figure in scores["base"]}
    scores |= counts(task)
    with whole(positions) as table, whole(out) as file:
        write_positions(table, task.windows, found, block_size)
        file.write_text(json.dumps(scores, indent=2) + "\n")

    for kinds, table in ((plots.TRAINING, loss), (plots.TEST, positions)):
        plots.draw(kinds, table, out.parent / "plots")
    texts = (map(tokenizer.decode, ids) for ids in (prompts.ids, written["base"], written["tuned"]))
    makers = {"base": base, "prepare": raw, "tokenize": tokens, "train": adapter}
    records = {stage: environment.read(made, stage) for stage, made in makers.items()}
    facts = {"method": in_words(*loading.load_method(adapter)), "scored": scored(evaluate.protocol, manifest, stride)}
    records["evaluate"] = environment.describe(started, **facts, precision=str(dtype).removeprefix("torch."))
    write_report(out.parent, scores, records, list(zip(*texts, strict=True)))
    say(f"evaluate: {out.parent}/report.md shows it all")


def choose_stride(evaluate: Evaluate, block_size: int) -> int:
    """Return the tokens from one window to the next: those asked for, else as many as a window holds."""
    if evaluate.stride is None:
        return block_size
    if evaluate.protocol == "lm-eval":
        raise params.wrong("evaluate.stride", evaluate.stride, "null, since lm-eval has a stride of its own")
    if evaluate.stride > block_size:
        raise params.wrong("evaluate.stride", evaluate.stride, f"1 to {block_size}, the block size, or null")
    return evaluate.stride


def lay_out(protocol: str, stride: int, manifest: dict, text: str, tokens: Path, tokenizer: "Tokenizer") -> "Task":
    """Return what `protocol` scores of the test split, whose text is given."""
    from gpt2lora.dataset import blocks
    from gpt2lora.evaluation import protocols

    if protocol == "native":
        return protocols.native(blocks.load(tokens, "test"), manifest["layout"], text, tokenizer, stride)
    if protocol == "hf":
        return protocols.hf(text, tokenizer, manifest["block_size"], stride)
    return protocols.lm_eval(text, tokenizer, manifest["end_of_text_id"], manifest["block_size"])


def in_words(method: str, quantization: "Quantization | None") -> str:
    if quantization is None:
        return method
    double = ", its scales quantised too" if quantization.double_quant else ""
    kind = f" ({quantization.quant_type}{double})" if quantization.bits == 4 else ""
    return f"{method}, on a base of {quantization.bits} bits{kind}"


def scored(protocol: str, manifest: dict, stride: int) -> str:
    windows = f"{protocol}, in windows of {manifest['block_size']:,} tokens"
    if protocol == "lm-eval":
        return windows
    if protocol == "native" and manifest["layout"] == "padded":
        return f"{protocol}, each paragraph by itself, of at most {manifest['block_size']:,} tokens"
    return f"{windows}, {stride:,} apart"


def write_report(folder: Path, scores: dict, records: dict[str, dict | None], texts: list[tuple[str, ...]]) -> None:
    """Write environment.json and report.md, which shows all pictures."""
    with whole(folder / "environment.json") as file:
        file.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    pictures = [Path("plots") / plot.file for plot in (*plots.TEST, *plots.TRAINING)]
    with whole(folder / "report.md") as file:
        file.write_text(report.render(scores, records, texts, pictures), encoding="utf-8")


if __name__ == "__main__":
    main()
