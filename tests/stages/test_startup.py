"""Start-up: --help imports no heavy package, and a stage imports only the packages that it uses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

STAGES = ("sources", "base", "prepare", "tokenize", "train", "evaluate")
COMMANDS = ("compare", "dequantize", "export", "generate", "play")
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "huggingface_hub", "numpy", "tokenizers"}
RUN_MODULE = """
import json, resource, runpy, sys
try:
    sys.argv[0] = sys.argv[1]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=False)
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print()
print(json.dumps({"modules": sorted(sys.modules), "cpu_seconds": used.ru_utime + used.ru_stime}))
"""


def run_module(module: str, *arguments: str, folder: Path = tiny.ROOT) -> dict:
    """Run a module in a process of its own; return the modules that are loaded at its end, and its CPU seconds."""
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    command = [sys.executable, "-c", RUN_MODULE, module, *arguments]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [*([f"stages.{name}"] for name in STAGES), ["gpt2lora"], *(["gpt2lora", name] for name in COMMANDS)],
    ids=" ".join,
)
def test_help_is_quick_and_loads_nothing_heavy(words):
    runs = [run_module(*words, "--help") for _ in range(3)]
    assert not HEAVY & set(runs[0]["modules"])
    # CPU time, and the least of three runs: other processes hardly change it.
    assert min(run["cpu_seconds"] for run in runs) < 0.3


def test_prepare_and_tokenize_load_only_what_they_use(project, tiny_model):
    os.symlink(tiny_model, project / "base")
    for stage, arguments, used in (
        ("prepare", ["--out", "raw"], set()),
        ("tokenize", ["--raw", "raw", "--base", "base", "--out", "tokens"], {"numpy", "tokenizers"}),
    ):
        modules = set(run_module(f"stages.{stage}", *arguments, folder=project)["modules"])
        assert HEAVY & modules <= used, stage


REFERENCE_CYCLE = """
from gpt2lora.pipeline import cli

class Garbage:
    def __del__(self):
        print("collected", flush=True)

@cli.command
def main():
    "Leave a reference cycle behind."
    garbage = Garbage()
    garbage.itself = garbage

main()
"""


def test_no_garbage_is_collected_at_exit():
    """Searching all objects of torch for reference cycles would take long, and find next to none."""
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    process = subprocess.run([sys.executable, "-c", REFERENCE_CYCLE], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, ""), process.stderr
