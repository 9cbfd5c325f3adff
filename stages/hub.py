"""Models and corpora from a Hugging Face hub: at a pinned commit, whole or not at all, and never a long wait.

What the hub client's cache holds whole is taken from there without a request, so a machine that is offline needs
no setting.
"""

import functools
import hashlib
import os
import queue
import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from stages.command import Stop, say

DEADLINE = 8  # seconds for the hub's first answer: on a machine without a hub, a stage ends within 15
COMMIT = re.compile(r"[0-9a-f]{40}")
SPLITS = ("train", "validation", "test")
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)


def fetch_model(repo_id: str, revision: str | None) -> Path:
    """Return a folder with the configuration, the tokenizer and the safetensors of a model on the hub.

    The folder belongs to the hub client's cache. Other programs may have put more files of the same commit there,
    pickles among them: copy from it by name, and never write to it.

    Raises:
        Stop: what is wrong with the repository, or with the way to it.
    """
    folder = _snapshot("model", repo_id, revision, MODEL_FILES, but=["*/*"])
    if not any(folder.glob("*.safetensors")):
        from huggingface_hub import get_cached_repo_tree

        names = [file.path for file in get_cached_repo_tree(repo_id, revision=revision)]
        pickles = ", ".join(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
        refused = f" but {pickles}: pickled weights can run code, so they are refused" if pickles else ""
        raise Stop(f"model {repo_id}: expected *.safetensors at {revision}, which has none{refused}")
    if not (folder / "config.json").is_file():
        raise Stop(f"model {repo_id}: no config.json at {revision}")
    return folder


def fetch_dataset(repo_id: str, config: str | None, revision: str | None) -> dict[str, Iterable[str]]:
    """Return the rows of column `text` of each split, unchanged; iterating reads them from disk.

    `load_dataset` gets the fetched folder, never the repository's name: by name it asks the hub even when all is
    cached, and answers any failure of the hub with whatever revision it cached last.

    Raises:
        Stop: what is wrong with the repository, or with the way to it.
    """
    folder = _snapshot("dataset", repo_id, revision, ["README.md"])
    from datasets import load_dataset  # after the hub's answer: it takes a second
    from datasets.exceptions import DatasetsError

    what = f"dataset {repo_id}, configuration {config}"
    try:
        files = _data_files(folder, config)
        # The client's patterns know no `**`, and their `*` crosses folders. A card without files: fetch everything.
        patterns = [path.replace("**/", "*") for paths in files.values() for path in paths] if files else None
        folder = _snapshot("dataset", repo_id, revision, patterns)
        splits = load_dataset(str(folder), config, data_files=files)
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise Stop(f"{what}: {error.__cause__ or error}") from error
    for name in SPLITS:
        if name not in splits:
            raise Stop(f"{what}: no split {name}, only {', '.join(splits)}")
        columns = splits[name].features
        if getattr(columns.get("text"), "dtype", None) not in ("string", "large_string"):
            raise Stop(f"{what}: no column `text` of strings in split {name}, only {', '.join(columns)}")
    return {name: splits[name]["text"] for name in SPLITS}


def _data_files(folder: Path, config: str | None) -> dict[str, list[str]] | None:
    """Return the files of each split as the dataset card lists them for `config`, or None where it lists none."""
    from datasets.data_files import sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not (folder / "README.md").is_file():
        return None
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(folder / "README.md").data)
    name = config or configs.get_default_config_name()
    if configs and name not in configs:
        raise ValueError(f"expected one of {', '.join(configs)}")
    files = configs.get(name, {}).get("data_files")
    return sanitize_patterns(files) if files else None


def _snapshot(
    kind: str, repo_id: str, revision: str | None, patterns: Sequence[str] | None, but: Sequence[str] = ()
) -> Path:
    """Return the folder of the cache with a repository's files that match `patterns`, whole."""
    for library in ("HF_HUB", "DATASETS"):  # they speak of every retry; what matters they raise
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from huggingface_hub import get_cached_repo_tree, set_client_factory, snapshot_download
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    set_client_factory(_client)
    chosen = {"allow_patterns": patterns, "ignore_patterns": but}
    fetch = functools.partial(snapshot_download, repo_id, repo_type=kind, revision=revision, **chosen)
    try:
        if not COMMIT.fullmatch(revision or ""):
            raise Stop(_pin(kind, repo_id, revision))
        # Without the repository's listing, a folder in the cache may well be a part of it.
        get_cached_repo_tree(repo_id, repo_type=kind, revision=revision)
        return _intact(Path(fetch(local_files_only=True)), repo_id, chosen)
    except HFValidationError as error:
        raise Stop(f"{kind} {repo_id}: {error}") from error
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        pass

    unreachable = None
    try:
        _commit(kind, repo_id, revision)
    except HfHubHTTPError as error:
        if error.response.status_code < 500 and error.response.status_code not in (408, 429):
            raise _explain(error, kind, repo_id, revision) from error
        say(f"the hub answers HTTP {error.response.status_code} for {kind} {repo_id}: trying for a while")
    except (HTTPError, OSError, ValueError) as error:
        unreachable = error
    try:
        # Without a hub, a folder that came without a listing is better than none.
        return _intact(Path(fetch(local_files_only=bool(unreachable))), repo_id, chosen)
    except LocalEntryNotFoundError as error:
        raise _explain(unreachable or error.__cause__ or error, kind, repo_id, revision) from error
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise  # of this machine: a full disk, for one
        raise _explain(error, kind, repo_id, revision) from error


def _client():
    """A client whose requests all end: the hub client sets no time limit on listing a repository, and 60 s on others."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    def limit(request) -> None:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        most = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte: 10 unless the user says otherwise
        waits = request.extensions["timeout"]
        request.extensions["timeout"] = {phase: min(wait or most, most) for phase, wait in waits.items()}

    return httpx2.Client(event_hooks={"request": [limit]}, follow_redirects=True, timeout=None)


def _commit(kind: str, repo_id: str, revision: str | None) -> str:
    """Ask the hub which commit `revision` is.

    In a thread: a socket's time limit covers neither the resolution of names nor an answer that trickles in.

    Raises:
        TimeoutError: no answer within DEADLINE; or whatever the hub client raises.
    """
    from huggingface_hub import HfApi

    answers = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha, None))
        except BaseException as error:  # for the caller to raise
            answers.put((None, error))

    threading.Thread(target=ask, daemon=True).start()
    try:
        commit, error = answers.get(timeout=DEADLINE)
    except queue.Empty:
        raise TimeoutError(f"no answer in {DEADLINE} s") from None
    if error:
        raise error
    return commit


def _pin(kind: str, repo_id: str, revision: str | None) -> str:
    from huggingface_hub.errors import HTTPError

    line = f"{kind} {repo_id}: expected a full commit hash (40 hexadecimal digits) as its revision, not {revision!r}"
    try:
        return f"{line}; the hub has it at {_commit(kind, repo_id, revision)}"
    except (HTTPError, OSError, ValueError):
        return line


def _explain(error: Exception, kind: str, repo_id: str, revision: str) -> Stop:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    hub, reason = constants.ENDPOINT, str(error) or type(error).__name__
    if isinstance(error, RevisionNotFoundError):
        return Stop(f"{kind} {repo_id}: {hub} has no revision {revision}")
    if isinstance(error, HfHubHTTPError):
        reason = f"HTTP {error.response.status_code}"
        if error.response.status_code in (401, 403, 404):
            return Stop(f"{kind} {repo_id}: {hub} has none by this name, or shows it only after `hf auth login` ({reason})")
    return Stop(f"{kind} {repo_id}: cannot be had from {hub} ({reason}); `dvc exp run -S preset=sample` runs without it")


def _intact(folder: Path, repo_id: str, chosen: dict) -> Path:
    """Return `folder` if the digests of the chosen files are right: the hub client compares sizes alone."""
    from huggingface_hub.utils import filter_repo_objects

    links = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink()}
    damaged = []
    for name in filter_repo_objects(links, **chosen):
        # The cache names a content by its digest: git's sha1 of a small file, sha256 of a large one.
        digest = Path(os.readlink(links[name])).name
        git = functools.partial(hashlib.sha1, b"blob %d\0" % links[name].stat().st_size)
        with links[name].open("rb") as file:
            if hashlib.file_digest(file, git if len(digest) == 40 else "sha256").hexdigest() == digest:
                continue
        damaged.append(name)
        links[name].resolve().unlink()
        links[name].unlink()
    if damaged:
        raise Stop(f"{repo_id}: {', '.join(damaged)} came damaged and was removed from {folder}: run again")
    return folder
