"""evaluate: base and tuned model on the test split, side by side.

in   data/tokens, data/base, data/adapter, params.yaml: evaluate.*
out  metrics/eval.json: loss (nats/token), perplexity (exp of it), accuracy (of the next token), and their change
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages import params
from stages.command import Stop, say, stage, whole

if TYPE_CHECKING:
    from stages.scoring import Score


@dataclass
class Evaluate:
    batch_size: int
    precision: str

    def __post_init__(self):
        from stages.device import PRECISIONS

        params.require(self.batch_size > 0, "evaluate.batch_size", self.batch_size, "an integer above 0")
        known = self.precision in PRECISIONS
        params.require(known, "evaluate.precision", self.precision, f"one of {', '.join(PRECISIONS)}")


@stage
@click.option("--tokens", type=Path, default="data/tokens", show_default=True, help="Folder of the token arrays.")
@click.option("--base", type=Path, default="data/base", show_default=True, help="Folder of the base model.")
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--out", type=Path, default="metrics/eval.json", show_default=True, help="File of the figures.")
def main(tokens: Path, base: Path, adapter: Path, out: Path) -> None:
    """Score the test split under the base model and under the tuned one."""
    say("evaluate: loading torch and transformers")
    from stages import device, model, rows, scoring

    evaluate = params.section("evaluate", Evaluate)
    dtype = device.compute_dtype(evaluate.precision, device.pick_device())
    test = rows.load(tokens, "test")

    scores = {}
    for name, load in (
        ("base", lambda: model.load_base(base, None, dtype)),
        ("tuned", lambda: model.load_tuned(base, adapter, dtype)),
    ):
        network = load()
        scores[name] = figures(scoring.score(network, test, evaluate.batch_size, dtype, f"test, {name}"))
        del network
        say(f"evaluate: {name:6} " + "  ".join(f"{figure} {value:.4f}" for figure, value in scores[name].items()))
    scores["change"] = {figure: scores["tuned"][figure] - scores["base"][figure] for figure in scores["base"]}
    with whole(out) as file:
        file.write_text(json.dumps(scores | {"predicted_tokens": test.targets}, indent=2) + "\n")


def figures(score: "Score") -> dict[str, float]:
    if not math.isfinite(score.loss):
        raise Stop(f"evaluate: the loss is {score.loss}: the model is broken; train again with a lower learning rate")
    return {"loss": score.loss, "perplexity": math.exp(score.loss), "accuracy": score.correct / score.tokens}


if __name__ == "__main__":
    main()
