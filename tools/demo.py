"""The whole pipeline twice on the embedded sample, LoRA and QLoRA, as two DVC experiments, and what came out.

Both run in temporary folders of DVC's own (`--temp`), so that the workspace stays as it is. What `base`, `prepare`
and `tokenize` made for the first is taken from DVC's cache for the second; the demo fails where it is not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import heartbeat

EXPERIMENTS = {"lora": "demo-lora", "qlora": "demo-qlora"}
# The sample's model is a hundredth of GPT-2's size and learns best at a higher rate.
SETTINGS = ["preset=sample", "train.learning_rate=5e-3", "train.epochs=2", "train.validations=4"]
SHARED = ("base", "prepare", "tokenize")  # stages that no method changes


def main() -> None:
    os.chdir(Path(__file__).resolve().parent.parent)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    check_clone()
    forget_earlier_runs()
    commands = [experiment(method, name) for method, name in EXPERIMENTS.items()]
    printed = [show(command) for command in [*commands, ["dvc", "metrics", "diff", *EXPERIMENTS.values()]]]
    check_cache(printed[1])
    print_table(figures())


def show(command: list[str]) -> bytes:
    """Run a command in sight of the user; return what it printed, or exit with its code."""
    print(f"\n$ {' '.join(command)}", flush=True)
    code, printed = heartbeat.run(command[0], command)
    if code:
        sys.exit(code)
    return printed


def check_cache(printed: bytes) -> None:
    """Exit unless the second experiment took what no method changes from DVC's cache."""
    ran = [stage.decode() for stage in heartbeat.STAGE.findall(printed)]
    if again := [stage for stage in ran if stage in SHARED]:
        sys.exit(f"Error: {' and '.join(again)} ran again for the second experiment: expected them from DVC's cache")
    print(f"\n{', '.join(SHARED)}: made once, taken from DVC's cache for the second experiment")


def experiment(method: str, name: str) -> list[str]:
    options = [word for setting in [f"method={method}", *SETTINGS] for word in ("-S", setting)]
    return ["dvc", "exp", "run", "--temp", "--name", name, *options]


def check_clone() -> None:
    """Exit in a shallow clone: DVC would run everything there, and then lose the experiments."""
    command = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(command, capture_output=True, text=True).stdout.strip() == "true":
        sys.exit(
            "Error: this clone is shallow (git clone --depth), and DVC loses the experiments of such a clone: "
            "run `git fetch --unshallow` first"
        )


def forget_earlier_runs() -> None:
    listed = subprocess.run(["dvc", "exp", "list", "--name-only"], capture_output=True, text=True)
    if listed.returncode:
        why = listed.stderr.strip().removeprefix("ERROR: ")
        sys.exit(f"Error: {why}; make demo needs a clone, since DVC keeps experiments in git")
    if earlier := [name for name in listed.stdout.split() if name in EXPERIMENTS.values()]:
        subprocess.run(["dvc", "exp", "remove", "--quiet", *earlier], check=True)


def figures() -> dict[str, dict]:
    """Return metrics/eval.json and metrics/train.json of each method's experiment, as flat dicts."""
    command = ["dvc", "metrics", "diff", "--all", "--json", *EXPERIMENTS.values()]
    diff = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        method: {key: found[side] for file in diff.values() for key, found in file.items()}
        for method, side in zip(EXPERIMENTS, ("old", "new"), strict=True)
    }


def print_table(found: dict[str, dict]) -> None:
    rows = [("base", "base", found["lora"], 0)]
    rows += [(method, "tuned", found[method], found[method]["trainable_parameters"]) for method in EXPERIMENTS]
    print("\ntest split      loss  perplexity  accuracy     trainable  frozen base")
    print("         nats/token                 share    parameters           MB")
    for name, prefix, of, trainable in rows:
        print(
            f"{name:10}{of[f'{prefix}.loss']:10.4f}{of[f'{prefix}.perplexity']:12.2f}"
            f"{of[f'{prefix}.accuracy']:10.4f}{trainable:14,}{of['frozen_base_bytes'] / 1e6:13.2f}"
        )
    print("\nNext: `. .venv/bin/activate`, then `dvc exp show`, `dvc exp apply demo-qlora` or `dvc repro`.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
