"""Checkpoints of training: a run that was killed resumes from its newest one, and ends with the same bytes as without.

Each run has a folder named by a hash of everything that decides its result, so that no run resumes from another's
checkpoint. A checkpoint is one safetensors file, STEP-DIGEST.safetensors. The SHA-256 in its name tells whether it is
complete. It holds no state of random number generators, which each micro-batch seeds, and nothing that depends on the
number of processes: rank 0 writes it, and any number of processes resume from it.
"""

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save

from gpt2lora.distributed import group
from gpt2lora.distributed.facts import cpu_kernels, short_digest
from gpt2lora.model.device import device_name
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import echo
from gpt2lora.training.execution import missing_compile_requirement

CHECKPOINTS_KEPT = 2


@dataclass
class Checkpoints:
    """The checkpoints of one run."""

    folder: Path
    interval: int  # steps between two checkpoints; 0: none are written
    caught: list[int]  # signals that asked the run to stop, from `catch_signals`
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    writing: Future | None = None

    def is_due(self, step: int, stopping: bool) -> bool:
        """Tell whether to write a checkpoint after this step."""
        return self.interval > 0 and (step % self.interval == 0 or stopping)

    def stop_requested(self) -> int:
        """Return the signal that asked one of the processes to stop, or 0: the same in all of them."""
        return group.largest([self.caught[0] if self.caught else 0])[0]

    def write(
        self,
        step: int,
        trained: list[torch.Tensor],
        optimizer: torch.optim.Optimizer,
        best: list[torch.Tensor],
        losses: list[torch.Tensor],
        record: dict,
    ) -> None:
        """Copy the state to the CPU, and write it to disk in a thread while training continues.

        Args:
            best: the values of `trained` at the lowest validation loss.
            losses: of the steps since the last validation.
            record: everything else that a resumed run needs, as JSON can hold it.

        Raises:
            StageError: the disk was full when the checkpoint before was written; older ones are still there.
        """
        group.main_first(self.wait)
        if not group.is_main():
            return
        tensors = collect_tensors(trained, optimizer, best, losses)
        self.writing = self.writer.submit(self.write_file, step, tensors, json.dumps(record | {"step": step}))

    def wait(self) -> None:
        """Wait until the last checkpoint is written, and raise its error if it failed."""
        if self.writing:
            self.writing.result()

    def write_file(self, step: int, tensors: dict[str, torch.Tensor], record: str) -> None:
        """Write a checkpoint, then remove all but the newest two: at any moment a complete one exists."""
        # A single metadata key: safetensors writes several keys in a random order.
        content = save(tensors, {"record": record})
        with atomic_output(self.folder / f"{step:08d}-{short_digest(content)}.safetensors") as file:
            file.write_bytes(content)
        for path in self.files()[CHECKPOINTS_KEPT:]:
            path.unlink(missing_ok=True)

    def resume(
        self, trained: list[torch.Tensor], optimizer: torch.optim.Optimizer
    ) -> tuple[int, list[torch.Tensor], list[torch.Tensor], dict] | None:
        """Restore the newest complete checkpoint; return its step, best, losses and record, as passed to `write`.

        A damaged checkpoint is reported and removed. Without any, return None.
        """
        content = group.broadcast_bytes(self.read_newest() if group.is_main() else None)
        if content is None:
            self.echo_others()
            return None
        # The header of a safetensors file: its length in 8 bytes, then JSON.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["record"])
        best, losses = restore_tensors(load(content), trained, optimizer)
        return record["step"], best, losses, record

    def read_newest(self) -> bytes | None:
        """Return the content of the newest complete checkpoint, or None without any."""
        for unfinished in self.folder.glob(".*"):  # of a run that was killed while it wrote
            unfinished.unlink()
        for file in self.files() if self.interval else []:
            content = file.read_bytes()
            if short_digest(content) == file.stem.split("-")[1]:
                return content
            echo(f"train: warning: {file} is damaged: skipped and removed")
            file.unlink()
        return None

    def echo_others(self) -> None:
        """Say that other runs left checkpoints, of which one may be meant."""
        others = [path for path in self.folder.parent.glob("*") if path != self.folder]
        if self.interval and others:
            echo(
                f"train: starts anew: the checkpoints in {self.folder.parent} are of other runs ({len(others)}), with "
                "other parameters, data, code, packages, processor or number of its threads"
            )

    def files(self) -> list[Path]:
        """Return the files of all checkpoints, the newest first."""
        return sorted(self.folder.glob("[0-9]*-*.safetensors"), reverse=True)

    def stop(self, step: int, steps: int, number: int) -> None:
        """Exit with 130 after SIGINT, with 143 after SIGTERM, as soon as the last checkpoint is written."""
        group.main_first(self.wait)
        group.barrier()  # the others need rank 0 until they have seen that it is done
        kept = f"checkpoint in {self.folder}: run the same command to resume"
        if not self.interval:
            kept = "no checkpoint, since train.checkpoint_every is 0"
        elif not self.files():
            kept = "nothing was trained yet"
        echo(f"train: stopped after step {step} of {steps}; {kept}")
        raise SystemExit(128 + number)

    def remove(self) -> None:
        """Remove the run's folder, and its parent unless that holds other runs."""
        self.writer.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def run_key(facts: dict[str, str], device: object) -> str:
    """Return 16 hex digits that identify a run.

    Args:
        facts: from distributed/facts.py.
        device: the hardware, as JSON can hold it: other kernels round differently. Not the number of processes.
    """
    return short_digest(json.dumps([*facts.values(), device], sort_keys=True).encode())


def hardware_facts(device: torch.device, dtype: torch.dtype) -> list:
    """Return what decides a run's kernels. CPUs differ in them; on a GPU, compiled steps draw other random numbers."""
    kernels = missing_compile_requirement() if device.type == "cuda" else cpu_kernels()
    return [device_name(device), str(dtype), kernels]


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Yield a list that collects the first SIGINT or SIGTERM; the second one ends the process as usual."""
    caught: list[int] = []

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, _) -> None:
        caught.append(number)
        restore()
        if group.size() == 1:  # in a group it may be the launcher's, after another process failed
            # Not print, which must not be called again while the signal interrupts it.
            os.write(2, b"\ntrain: stopping after this step or batch; a second signal stops at once\n")

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        restore()


def collect_tensors(
    trained: list[torch.Tensor], optimizer: torch.optim.Optimizer, best: list[torch.Tensor], losses: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return copies on the CPU of all tensors that decide the following steps, by name."""
    tensors = {f"value.{index}": value for index, value in enumerate(trained)}
    tensors |= {f"best.{index}": value for index, value in enumerate(best)}
    tensors |= {
        f"optimizer.{index}.{name}": value
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    if losses:
        tensors["losses"] = torch.stack(losses)
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}


def restore_tensors(
    tensors: dict[str, torch.Tensor], trained: list[torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Restore `trained` and `optimizer`; return best and losses."""
    device = trained[0].device
    with torch.no_grad():
        for index, value in enumerate(trained):
            value.copy_(tensors[f"value.{index}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    best = [tensors[f"best.{index}"] for index in range(len(trained)) if f"best.{index}" in tensors]
    return best, list(tensors["losses"].to(device)) if "losses" in tensors else []
