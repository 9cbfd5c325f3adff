"""What stages hand to each other: whole outputs or none, and digests that tell whether they are still the same."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from gpt2lora.pipeline.cli import Stop

# What NumPy and safetensors say, in errors without a number, when a disk is full.
FULL = re.compile(r"\d+ requested and \d+ written|No space left on device")
MANIFEST = "manifest.json"


def need(path: Path, maker: str) -> Path:
    """Return `path`, an output of the stage `maker`; stop where it does not exist."""
    if not path.exists():
        raise Stop(f"{path} is missing: run `dvc repro {maker}`, or python -m stages.{maker}")
    return path


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, as hex digits: neither safetensors nor .npy hold a checksum."""
    state = path.stat()
    return _digest(path.resolve(), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.cache  # half a gigabyte of weights is asked for several times by one stage
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests(folder: Path, pattern: str = "*") -> dict[str, str]:
    """Return the digest of each file in `folder`, by name."""
    return {path.name: file_digest(path) for path in sorted(folder.glob(pattern)) if path.is_file()}


def read_ahead(folder: Path) -> None:
    """Begin to compute the digests of a folder's files, in a thread that ends with the process."""

    def read() -> None:
        with contextlib.suppress(OSError):  # who asks for the digests meets it, too
            digests(folder)

    threading.Thread(target=read, daemon=True).start()


def read_json(file: Path, maker: str, *keys: str) -> dict:
    """Return what the stage `maker` wrote into a JSON file; stop where it is missing, damaged or lacks a key."""
    try:
        found = json.loads(need(file, maker).read_text(encoding="utf-8"))
        for key in keys:
            found[key]
        return dict(found)
    except (ValueError, KeyError, TypeError) as error:
        raise Stop(f"{file} is damaged ({error}): run `dvc repro --force {maker}`") from error


def recorded(folder: Path, maker: str, *keys: str) -> dict:
    """Return the manifest of a folder that the stage `maker` wrote; stop unless its files are still those."""
    file = folder / MANIFEST
    manifest = read_json(file, maker, "files", *keys)
    same(folder, manifest["files"], file, maker)
    return manifest


def unchanged(folder: Path, maker: str) -> None:
    """Stop at a file that is not as the stage `maker` recorded it. A folder of another maker holds no record."""
    if (folder / MANIFEST).exists():
        recorded(folder, maker)


def same(folder: Path, expected: dict[str, str], since: Path, maker: str) -> None:
    """Stop at a file in `folder` that is not the one whose digest the file `since` holds.

    Args:
        maker: the stage that wrote the folder, and behind it those that have to run after it.
    """
    for name, digest in expected.items():
        if file_digest(need(folder / name, maker.split()[0])) != digest:
            raise Stop(
                f"{folder / name} is damaged, or not the one that {since} recorded: run `dvc repro --force {maker}`, "
                f"then `dvc repro`"
            )


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `target`, a file or folder to be; it takes the place of `target` at the end.

    Until then, and for good when the block raises, `target` stays as it was. Wherever the process is killed, `target`
    is whole, the old one or the new one; or it is absent, for the moment between two renames of a folder, and the next
    run puts the old one back before it begins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    new, old = (target.with_name(f".{target.name}.{word}") for word in ("new", "old"))
    _settle(target, new, old)
    try:
        yield new
        for path in (new, *new.rglob("*")):
            _sync(path)
        if target.is_dir():
            target.rename(old)
        new.replace(target)
        _sync(target.parent)
    except Stop:  # says what is wrong already, maybe with another output
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error)):
            raise Stop(f"No space left on device for {target}, which is as it was before") from error
        raise
    finally:
        _settle(target, new, old)


def _settle(target: Path, new: Path, old: Path) -> None:
    """Leave of the three only `target`: `old`, always whole, takes its place where it is absent."""
    _remove(new)
    if old.exists() and target.exists():
        old.rename(new)  # a folder that is half removed must never pass for the old one
        _remove(new)
    elif old.exists():
        old.rename(target)


def _sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, reach the disk before the next rename does."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
