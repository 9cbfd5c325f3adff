"""Run the stages for several methods: python tests/helpers/every_method.py NAME..., in a clone whose stages it imports.

Leaves what must be the same everywhere in results/NAME. One process for all: importing torch, PEFT and bitsandbytes
takes ten times as long as a tiny training.
"""

import importlib
import shutil
import sys
from pathlib import Path

from tiny import set_param

METHODS = {
    "lora": {"method": "lora"},
    "qlora of 4 bits": {"method": "qlora"},
    "qlora of 8 bits": {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora.bits of 8": {"method": "lora", "lora.bits": 8},
    "full": {"method": "full"},
}
OUTPUTS = ("data/raw", "data/tokens", "data/adapter", "metrics/eval.json")


def main(names: list[str]) -> None:
    original = Path("params.yaml").read_bytes()
    shutil.rmtree("metrics")  # those of the commit
    run("base", "prepare", "tokenize")
    for name in names:
        Path("params.yaml").write_bytes(original)
        for key, value in METHODS[name].items():
            set_param(Path(), key, value)
        run("train", "evaluate")
        for output in OUTPUTS:
            target = Path("results", name, output)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if Path(output).is_dir() else shutil.copyfile)(output, target)
        shutil.rmtree("data/adapter")
        Path("metrics/eval.json").unlink()


def run(*stages: str) -> None:
    for stage in stages:
        module = importlib.import_module(f"stages.{stage}")
        assert Path(module.__file__).is_relative_to(Path.cwd()), f"{module.__file__} is not the clone's"
        module.main.main([], standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
