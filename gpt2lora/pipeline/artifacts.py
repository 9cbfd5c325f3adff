"""The files that stages hand to each other: written atomically, and verified by their SHA-256 before they are read."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from gpt2lora.pipeline.cli import StageError

# NumPy and safetensors report a full disk in errors without an errno.
DISK_FULL = re.compile(r"\d+ requested and \d+ written|No space left on device")
MANIFEST = "manifest.json"
_UMASK = os.umask(0o022)  # it can only be read by setting it, which no thread should see
os.umask(_UMASK)


def require_file(path: Path, stage: str) -> Path:
    """Return `path`, an output of `stage`.

    Raises:
        StageError: it does not exist.
    """
    if not path.exists():
        if not Path(path.parts[0]).exists() and not Path("dvc.yaml").exists():
            raise StageError(f"{path} is missing, seen from {Path.cwd()}: run it from the repository's root")
        raise StageError(f"{path} is missing: run `dvc repro {stage}`, or python -m stages.{stage}")
    return path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits. Neither safetensors nor .npy files hold a checksum."""
    state = path.stat()
    return _cached_digest(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache  # one stage needs the digest of 0.5 GB of weights several times
def _cached_digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the SHA-256 of each file in `folder`, by name."""
    return {path.name: file_digest(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def prefetch_digests(folder: Path) -> None:
    """Compute the digests of a folder's files in a daemon thread. Errors are left to the caller that needs them."""

    def compute() -> None:
        with contextlib.suppress(OSError):
            digests(folder)

    threading.Thread(target=compute, daemon=True).start()


def read_json(file: Path, stage: str, *keys: str) -> dict:
    """Return a JSON file that `stage` wrote.

    Raises:
        StageError: it is missing, damaged, or lacks one of `keys`.
    """
    try:
        content = json.loads(require_file(file, stage).read_text(encoding="utf-8"))
        for key in keys:
            content[key]
        return dict(content)
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{file} is damaged ({error}): run `dvc repro --force {stage}`") from error


def read_verified_manifest(folder: Path, stage: str, *keys: str) -> dict:
    """Return the manifest of a folder that `stage` wrote, after its files were compared with their digests."""
    file = folder / MANIFEST
    manifest = read_json(file, stage, "files", *keys)
    verify_digests(folder, manifest["files"], file, stage)
    return manifest


def read_source(folder: Path, stage: str) -> dict:
    """Return from the manifest of `folder`, which `stage` wrote, where its content came from; {} if it does not say."""
    manifest = folder / MANIFEST
    return (read_json(manifest, stage).get("source") if manifest.exists() else None) or {}


def verify_folder(folder: Path, stage: str) -> None:
    """Compare a folder's files with the digests in its manifest. A folder without a manifest passes."""
    if (folder / MANIFEST).exists():
        read_verified_manifest(folder, stage)


def verify_digests(folder: Path, expected: dict[str, str], recorded_in: Path, stages: str) -> None:
    """Compare files in `folder` with the digests that the file `recorded_in` holds of them.

    Args:
        stages: the stage that wrote the folder, followed by those that have to run after it.

    Raises:
        StageError: a file is missing or has another digest.
    """
    for name, digest in expected.items():
        if file_digest(require_file(folder / name, stages.split()[0])) != digest:
            raise StageError(
                f"{folder / name} is damaged, or not the one that {recorded_in} recorded: "
                f"run `dvc repro --force {stages}`, then `dvc repro`"
            )


@contextlib.contextmanager
def atomic_output(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it replaces `target` atomically.

    `target` is a file or a folder. If the block raises, it keeps its content. If the process is killed, `target` is
    complete, old or new; only between the two renames that replace a folder it is absent, and the next call puts the
    old one back.

    Raises:
        StageError: another process is writing `target`, or the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _only_writer(target):
        yield from _replacement(target)


@contextlib.contextmanager
def _only_writer(target: Path) -> Iterator[None]:
    """Hold the lock of `target`: two processes that write it at once would mix their files at its temporary path."""
    from filelock import FileLock, Timeout  # takes a tenth of a second

    lock = FileLock(lock_folder() / f"{hashlib.sha256(os.fsencode(target.resolve())).hexdigest()}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StageError(f"{target} is being written by another process: wait for it, or end it") from error
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: FileLock takes no lock of a removed file
        lock.release()


def lock_folder() -> Path:
    """Return the folder of the user's locks, which the operating system frees when their process ends."""
    folder = Path(tempfile.gettempdir()) / f"gpt2lora-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _replacement(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; then let it replace `target`."""
    new, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("new", "old"))
    _recover(target, new, old)
    try:
        yield new
        for path in (new, *new.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.chmod(0o666 & ~_UMASK)  # safetensors writes files that nobody else can read
            _fsync(path)
        if target.is_dir():
            target.rename(old)
        new.replace(target)
        _fsync(target.parent)
    except StageError:  # already one clear line
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or DISK_FULL.search(str(error)):
            raise StageError(f"No space left on device for {target}, which is as it was before") from error
        raise
    finally:
        _recover(target, new, old)


def _recover(target: Path, new: Path, old: Path) -> None:
    """Remove `new` and `old`; if `target` is absent, restore it from `old`, which is always complete."""
    _remove(new)
    if old.exists() and target.exists():
        old.rename(new)  # a half-removed folder must never be taken for a complete `old`
        _remove(new)
    elif old.exists():
        old.rename(target)


def _fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk before the next rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
