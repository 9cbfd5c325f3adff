"""What a stage loads before it works: nothing for its help, and later only what it uses."""

import os
import subprocess
import sys

import pytest
import tiny

STAGES = ("base", "prepare", "tokenize", "train", "evaluate")
COMMANDS = ("compare", "dequantize", "export", "generate")
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "huggingface_hub", "numpy", "tokenizers"}
RUN = """
import json, resource, runpy, sys
try:
    sys.argv[0] = sys.argv[1]
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=False)
except SystemExit as end:
    assert not end.code, end.code
used = resource.getrusage(resource.RUSAGE_SELF)
print()
print(json.dumps({"modules": sorted(sys.modules), "seconds": used.ru_utime + used.ru_stime}))
"""


def loaded(module: str, *arguments: str, folder=tiny.ROOT) -> dict:
    """Run a module in a process of its own; return the modules loaded at its end, and the seconds of CPU it took."""
    import json

    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, module, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [*([f"stages.{name}"] for name in STAGES), ["gpt2lora"], *(["gpt2lora", name] for name in COMMANDS)],
    ids=" ".join,
)
def test_help_loads_nothing_heavy_and_is_quick(words):
    runs = [loaded(*words, "--help") for _ in range(3)]
    assert not HEAVY & set(runs[0]["modules"])
    # Of CPU, the least of three: others on the machine slow a clock down, and hardly this.
    assert min(run["seconds"] for run in runs) < 0.3


def test_prepare_and_tokenize_load_only_what_they_use(project, tiny_model):
    os.symlink(tiny_model, project / "base")
    for stage, arguments, used in (
        ("prepare", ["--out", "raw"], set()),
        ("tokenize", ["--raw", "raw", "--base", "base", "--out", "tokens"], {"numpy", "tokenizers"}),
    ):
        found = set(loaded(f"stages.{stage}", *arguments, folder=project)["modules"])
        assert HEAVY & found <= used, stage


CYCLE = """
from gpt2lora.pipeline import cli

class Garbage:
    def __del__(self):
        print("searched for garbage", flush=True)

@cli.command
def main():
    "Leave a cycle behind."
    thing = Garbage()
    thing.itself = thing

main()
"""


def test_a_stage_does_not_search_all_of_torch_for_garbage_when_it_exits():
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-c", CYCLE], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
