"""Fetch a model or a dataset in a process of its own, and write the repositories that hub_server.py serves.

huggingface_hub reads HF_ENDPOINT when it is imported. So each fetch runs in a new process, as a stage does.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tiny

MODEL, PICKLED, CORPUS = "tiny/gpt2", "tiny/pickled", "tiny/wikitext"
COMMIT, OLD_COMMIT, UNKNOWN_COMMIT = "1" * 40, "0" * 40, "f" * 40
SAMPLE_ADVICE = "`dvc exp run -S preset=sample` runs without it"
SPLITS = {
    # As on the hub: blank lines are empty rows, all other lines keep their spaces and their newline.
    "train": ["", " = River = \n", "", ' The river , 12 @.@ 5 km long , is “ quiet ” . \n", said no one \n', ""],
    "validation": ["", " = Bridge = \n", "", " A broken bridge \u2028 of 1 @,@ 200 stones . \n"],
    "test": ["", " = 東京 = \n", "", " <unk> crossed the coast . \n"],
}

FETCH = """
import json, sys
from gpt2lora.sources import hub
from gpt2lora.pipeline.cli import command
assert not {"huggingface_hub", "datasets"} & set(sys.modules)

@command
def main():
    kind, repo, config, revision = sys.argv[1:]
    if kind == "model":
        print(json.dumps(str(hub.fetch_model(repo, revision))))
    else:
        splits = hub.fetch_dataset(repo, config, revision, "text")
        print(json.dumps({name: list(rows) for name, rows in splits.items()}))
    assert "torch" not in sys.modules

main(args=[])
"""
# Code that a process may run before FETCH.
NO_PAUSES = "import time; time.sleep = lambda _: None\n"  # retries without a pause
KILL_DURING_DOWNLOAD = """
import os, pathlib, signal, threading, time

def kill_after_200_kb():
    while True:
        part = next(iter(pathlib.Path(os.environ["HF_HOME"]).glob("hub/*/blobs/" + "?" * 64 + ".incomplete")), None)
        if part and part.stat().st_size > 200_000:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)

threading.Thread(target=kill_after_200_kb, daemon=True).start()
"""
SLOW_NAME_RESOLUTION = "import socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"


@dataclass
class Fetched:
    """The end of a process that ran FETCH."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def result(self):
        """The path or the rows that a successful fetch returned."""
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The one line of error of a fetch that failed."""
        *before, line = self.err.splitlines()
        assert self.code == 1
        assert line.startswith("Error: ")
        assert "Traceback" not in self.err
        assert all("%|" in text or "Generating" in text for text in before if text), self.err  # progress bars
        return line


def fetch(kind, url, home, repo=None, revision=COMMIT, config="small", first="", **variables) -> Fetched:
    """Fetch a repository from the hub at `url` into the cache `home`.

    Args:
        kind: "model" or "dataset".
        first: code that the process runs before the fetch.
        variables: environment variables.
    """
    repo = repo or {"model": MODEL, "dataset": CORPUS}[kind]
    environment = {**tiny.environment(), "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(tiny.ROOT)}
    start = time.monotonic()
    command = [sys.executable, "-c", first + FETCH, kind, repo, config, revision]
    environment |= variables
    done = subprocess.run(command, cwd=home.parent, env=environment, capture_output=True, text=True, timeout=60)
    return Fetched(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def write_repositories(root: Path, tiny_model: Path) -> dict[str, dict[str, Path]]:
    """Write models and datasets below `root`; return their folders by commit, as `Hub` takes them."""
    model, pickled = root / "model", root / "pickled"
    for folder in (model, model / "onnx", pickled):
        folder.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".json":
            (pickled / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "rust_model.ot", "README.md", "onnx/decoder.onnx", "onnx/more.safetensors"):
        (model / name).write_bytes(b"not needed")
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    two_splits = {split: SPLITS[split] for split in ("train", "test")}
    return {
        f"models/{MODEL}": {COMMIT: model},
        f"models/{PICKLED}": {COMMIT: pickled},
        f"datasets/{CORPUS}": {
            OLD_COMMIT: write_dataset(root / "old", {split: ["old\n"] for split in SPLITS}),
            COMMIT: write_dataset(root / "new", SPLITS),
        },
        "datasets/tiny/two-splits": {COMMIT: write_dataset(root / "two-splits", two_splits)},
        "datasets/tiny/columns": {COMMIT: write_dataset(root / "columns", SPLITS, column="sentence")},
    }


def write_dataset(folder: Path, splits: dict[str, list[str]], column: str = "text") -> Path:
    """Write a dataset in the form of WikiText's: a card that lists the parquet files of two configurations."""
    lines = ["---", "configs:"]
    for config in ("large", "small"):
        (folder / config).mkdir(parents=True)
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config}/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.table({column: rows if config == "small" else ["x"]}), folder / name)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    lines += ["dataset_info:"]
    for config in ("large", "small"):
        lines += [f"- config_name: {config}", "  features:", f"  - name: {column}", "    dtype: string", "  splits:"]
        for split, rows in splits.items():
            count = len(rows) if config == "small" else 1
            lines += [f"  - name: {split}", f"    num_bytes: {count}", f"    num_examples: {count}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A corpus"]))
    return folder
