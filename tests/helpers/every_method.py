"""Run the stages for several methods: python tests/helpers/every_method.py NAME..., in a clone of the repository.

The stages are those of the clone. Outputs that must be the same everywhere are copied to results/NAME. One process runs
all methods, since importing torch, PEFT and bitsandbytes takes ten times as long as a tiny training.
"""

import importlib
import shutil
import sys
from pathlib import Path

from tiny import set_param

METHODS = {
    "lora": {"method": "lora"},
    "qlora, 4 bits": {"method": "qlora"},
    "qlora, 8 bits": {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora, adapter of 8 bits": {"method": "lora", "lora.bits": 8},
    "full": {"method": "full"},
}
OUTPUTS = ("data/raw", "data/tokens", "data/adapter", "metrics/eval.json")


def main(names: list[str]) -> None:
    original = Path("params.yaml").read_bytes()
    shutil.rmtree("metrics")  # the committed ones
    run_stages("base", "prepare", "tokenize")
    for name in names:
        Path("params.yaml").write_bytes(original)
        for key, value in METHODS[name].items():
            set_param(Path(), key, value)
        run_stages("train", "evaluate")
        for output in OUTPUTS:
            target = Path("results", name, output)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if Path(output).is_dir() else shutil.copyfile)(output, target)
        shutil.rmtree("data/adapter")
        Path("metrics/eval.json").unlink()


def run_stages(*names: str) -> None:
    for name in names:
        module = importlib.import_module(f"stages.{name}")
        assert Path(module.__file__).is_relative_to(Path.cwd()), f"{module.__file__} is not in the clone"
        module.main.main([], standalone_mode=False)


if __name__ == "__main__":
    main(sys.argv[1:])
