"""Checkpoints of training: a run that was killed goes on from its newest one, to the same bytes as one that was not.

A run has a folder named by a hash of all that decides its result, so that no run goes on from another's. A checkpoint
is one file of safetensors, STEP-DIGEST.safetensors; the SHA-256 of its bytes in its name tells whether it is whole.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load, save

from gpt2lora.pipeline.artifacts import digests, file_digest, whole
from gpt2lora.pipeline.cli import say

KEPT = 2
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")  # whose versions decide the bits of a result


@dataclass
class Checkpoints:
    """Those of one run. every: steps from one to the next, 0 for none; caught: signals that asked the run to stop."""

    folder: Path
    every: int
    caught: list[int]
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None

    def due(self, step: int, stopping: bool) -> bool:
        return self.every > 0 and (step % self.every == 0 or stopping)

    def write(
        self,
        step: int,
        trained: list[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        best: list[torch.Tensor],
        losses: list[torch.Tensor],
        record: dict,
    ) -> None:
        """Take a checkpoint, and write it while training goes on.

        Raises:
            Stop: the disk was full when the one before was written; those before it are still there.
        """
        self.wait()
        held = pack(trained, optimizer, best, losses)
        self.writing = self.writer.submit(self.put, step, held, json.dumps(record))

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raise what went wrong."""
        if self.writing:
            self.writing.result()

    def put(self, step: int, held: dict[str, torch.Tensor], record: str) -> None:
        """Add a file, then drop all but the newest two: a process killed at any point leaves one that is whole."""
        # One key of metadata: safetensors writes several in any order.
        content = save(held, {"record": record})
        with whole(self.folder / f"{step:08d}-{digest(content)}.safetensors") as file:
            file.write_bytes(content)
        for path in self.files()[KEPT:]:
            path.unlink(missing_ok=True)

    def resume(
        self, trained: list[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[torch.Tensor], list[torch.Tensor], dict] | None:
        """Put back the newest checkpoint that is whole; return its step, best, losses and record, as `write` got them.

        Damaged ones are named and removed.
        """
        for begun in self.folder.glob(".*"):  # by a run that was killed while it wrote
            begun.unlink()
        for file in self.files() if self.every else []:
            step, expected = file.stem.split("-")
            content = file.read_bytes()
            if digest(content) == expected:
                # The header: its length in 8 bytes, then JSON.
                header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
                best, losses = unpack(load(content), trained, optimizer)
                return int(step), best, losses, json.loads(header["__metadata__"]["record"])
            say(f"train: warning: {file} is damaged: skipped and removed")
            file.unlink()
        return None

    def files(self) -> list[Path]:
        """Return the files of all checkpoints, the newest first."""
        return sorted(self.folder.glob("[0-9]*-*.safetensors"), reverse=True)

    def stop(self, step: int, steps: int) -> None:
        """End the process as the signal that was caught asks for: 130 after SIGINT, 143 after SIGTERM."""
        self.wait()
        kept = f"kept in {self.folder}: run the same command to go on"
        if not self.every:
            kept = "nothing is kept, since train.checkpoint_every is 0"
        say(f"train: stopped after step {step} of {steps}; {kept}")
        raise SystemExit(128 + self.caught[0])

    def remove(self) -> None:
        """Remove the run's folder, and the one around it unless it holds those of other runs."""
        self.writer.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def key(parameters: dict, folders: Iterable[Path], code: Iterable[Path], device: object) -> str:
    """Return 16 hex digits that stand for all that decides a run's result.

    Args:
        parameters: all that were read from params.yaml.
        folders: the inputs; each file in them counts, by its name and its bytes.
        device: what computes, as JSON can hold it: kernels differ, and round differently.
    """
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    facts = [parameters, versions, device]
    facts += [digests(folder) for folder in folders]
    facts += [[file.name, file_digest(file)] for file in sorted(code)]
    return digest(json.dumps(facts, sort_keys=True).encode())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


@contextlib.contextmanager
def signals() -> Iterator[list[int]]:
    """Yield a list that takes SIGINT and SIGTERM instead of their ending the process; the second one ends it."""
    caught: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, _) -> None:
        caught.append(number)
        restore()
        # Not print: the signal may have come in the midst of another one.
        os.write(2, b"\ntrain: stopping after this step; once more stops at once\n")

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()


def pack(
    trained: list[torch.Tensor], optimizer: torch.optim.Optimizer, best: list[torch.Tensor], losses: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return copies of all tensors that decide what the next steps do, by name, on the CPU."""
    held = {f"value.{place}": value for place, value in enumerate(trained)}
    held |= {f"best.{place}": value for place, value in enumerate(best)}
    held |= {
        f"optimizer.{place}.{name}": value
        for place, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    if losses:
        held["losses"] = torch.stack(losses)
    held["random.cpu"] = torch.get_rng_state()
    if trained[0].is_cuda:
        held["random.cuda"] = torch.cuda.get_rng_state(trained[0].device)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in held.items()}


def unpack(
    held: dict[str, torch.Tensor], trained: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Put back what `pack` took, into `trained`, `optimizer` and the random generators; return best and losses."""
    device = trained[0].device
    with torch.no_grad():
        for place, value in enumerate(trained):
            value.copy_(held[f"value.{place}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in held.items():
        if name.startswith("optimizer."):
            _, place, part = name.split(".")
            state.setdefault(int(place), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(held["random.cpu"])
    if "random.cuda" in held:
        torch.cuda.set_rng_state(held["random.cuda"], device)
    best = [held[f"best.{place}"] for place in range(len(trained)) if f"best.{place}" in held]
    return best, list(held["losses"].to(device)) if "losses" in held else []
