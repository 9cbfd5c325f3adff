"""Train and evaluate several methods in one folder, in this process."""

import json
from pathlib import Path

import tiny
from training_runs import run_stage

METHODS = {
    "lora": {},
    "qlora": {"method": "qlora"},
    "qlora8": {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora, adapter of 8 bits": {"lora.bits": 8},
    "qlora, adapter of 4 bits": {"method": "qlora", "lora.bits": 4},
    "full": {"method": "full"},
}
DEFAULTS = {"method": "lora", "methods.qlora.bits": 4, "methods.qlora.double_quant": True, "lora.bits": 16}
LEARNING_RATES = {"full": 3e-3}  # of the other methods: 3e-2


def run_every_method(folder: Path) -> None:
    """Run all stages in the working directory `folder`; the outputs of a method go to a folder with its name."""
    from stages import base, evaluate, prepare, tokenize, train

    for stage in (base.main, prepare.main, tokenize.main):
        run_stage(stage)
    for method in METHODS:
        set_method(folder, method)
        run_stage(train.main, "--out", f"{method}/adapter", "--metrics", method)
        run_stage(evaluate.main, *evaluate_inputs(method), "--out", f"{method}/eval.json")


def set_method(folder: Path, method: str) -> None:
    """Write the parameters of a method to params.yaml."""
    learning_rate = {"train.learning_rate": LEARNING_RATES.get(method, 3e-2)}
    for key, value in (DEFAULTS | learning_rate | METHODS[method]).items():
        tiny.set_param(folder, key, value)


def evaluate_inputs(method: str) -> list[str]:
    """Return the options of evaluate that name the outputs of train for a method."""
    return ["--adapter", f"{method}/adapter", "--loss", f"{method}/loss.csv"]


def read_json(file: str | Path) -> dict:
    return json.loads(Path(file).read_text())


def file_contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of the files in `folder`, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
