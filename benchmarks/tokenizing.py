"""The stage `tokenize`: seconds and peak memory on a text, and on the same text over and over up to given sizes.

    python -m benchmarks.tokenizing --tokenizer FOLDER --text FILE [--megabytes 50 --megabytes 500]

The peak is that of the process, libraries included; texts that make up one article show that it is bounded even there.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks import workspace
from gpt2lora.pipeline.artifacts import require_file
from gpt2lora.pipeline.cli import StageError, command, echo

# As `python -m stages.tokenize`; at its end it writes its own peak (Linux): what wait4 tells may be its parent's.
RUN = """
import atexit, pathlib, runpy, sys
def leave():
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path("peak").write_text(status.partition("VmHWM:")[2].split()[0])
atexit.register(leave)
sys.argv = ["tokenize"]
runpy.run_module("stages.tokenize", run_name="__main__")
"""


@command
@click.option("--tokenizer", type=Path, required=True, help="Folder of a tokenizer.")
@click.option("--text", type=Path, required=True, help="File of text: WikiText-2's train split, say.")
@click.option("--megabytes", type=int, multiple=True, default=(50, 500), show_default=True, help="Sizes to grow it to.")
def main(tokenizer: Path, text: Path, megabytes: tuple[int, ...]) -> None:
    """Measure the stage `tokenize` on a text, and on longer ones made of it."""
    content = require_file(text, "prepare").read_bytes()
    if not content:
        raise StageError(f"--text {text}: is empty")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        workspace.write_params(folder, {})
        write_base(tokenizer, folder / "data" / "base")
        echo(f"{'text':>24} {'MB':>8} {'seconds':>8} {'peak memory, MB':>16}")
        measure("as it is", [content], folder)
        for size in megabytes:
            measure("repeated", [content] * max(1, round(size * 1e6 / len(content))), folder)
        untitled = b" ".join(content.split(b"\n"))
        measure("repeated, one line", [untitled] * max(1, round(megabytes[-1] * 1e6 / len(untitled))), folder)


def write_base(tokenizer: Path, folder: Path) -> None:
    """Write what `tokenize` reads of a base model of 1,024 positions."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    loaded.save_pretrained(folder)
    config = {"n_positions": 1024, "vocab_size": len(loaded), "eos_token_id": loaded.eos_token_id}
    (folder / "config.json").write_text(json.dumps(config))


def measure(label: str, parts: list[bytes], folder: Path) -> None:
    """Run the stage on the joined parts as the train split, in a process of its own, and print what it took."""
    raw = workspace.empty(folder / "data" / "raw")
    with (raw / "train.txt").open("wb") as file:
        file.writelines(parts)
    for split in ("validation", "test"):
        (raw / f"{split}.txt").write_text(" \n = A title = \n \n A text . \n")
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN], cwd=folder, env=workspace.surroundings(), check=True)
    seconds = time.perf_counter() - started
    peak = int((folder / "peak").read_text()) * 1024
    echo(f"{label:>24} {sum(map(len, parts)) / 1e6:8.1f} {seconds:8.1f} {peak / 1e6:16.0f}")


if __name__ == "__main__":
    main()
