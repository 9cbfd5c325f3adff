"""Models and corpora from a Hugging Face hub: at a pinned commit, whole or not at all, and never a long wait.

What the hub client's cache holds whole is taken from there without a request, so a machine that is offline needs
no setting.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gpt2lora.pipeline.cli import Stop
from gpt2lora.sources import hub_download

COMMIT = re.compile(r"[0-9a-f]{40}")
HOST = re.compile(r"[\w.:%-]+")
SPLITS = ("train", "validation", "test")
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
)
FILES = tuple(name for name in MODEL_FILES if not name.startswith("*"))  # beside the weights
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Read when the libraries are imported. Xet, the hub's own protocol for large files, retries for 4.5 minutes in
# silence behind a firewall that lets the hub through and not its storage; plain HTTP gives up in time.
SETTINGS = {
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}


def fetch_model(repo_id: str, revision: str | None) -> Path:
    """Return a folder with the configuration, the tokenizer and the safetensors of a model on the hub.

    The folder belongs to the hub client's cache. Other programs may have put more files of the same commit there,
    pickles among them: copy from it by name, and never write to it.

    Raises:
        Stop: what is wrong with the repository, or with the way to it.
    """
    folder = _snapshot("model", repo_id, revision, MODEL_FILES, ["config.json", "*.safetensors"], but="*/*")
    if not any(folder.glob("*.safetensors")):
        from huggingface_hub import get_cached_repo_tree

        names = [file.path for file in get_cached_repo_tree(repo_id, revision=revision)]
        pickles = ", ".join(name for name in names if name.endswith(PICKLES))
        refused = f" but {pickles}: pickled weights can run code, so they are refused" if pickles else ""
        raise Stop(f"model {repo_id}: expected *.safetensors at {revision}, which has none{refused}")
    return folder


def fetch_dataset(repo_id: str, config: str | None, revision: str | None) -> dict[str, Iterable[str]]:
    """Return the rows of column `text` of each split, unchanged; iterating reads them from disk.

    `load_dataset` gets the fetched folder, never the repository's name: by name it asks the hub even when all is
    cached, and answers any failure of the hub with whatever revision it cached last.

    Raises:
        Stop: what is wrong with the repository, or with the way to it.
    """
    folder = _snapshot("dataset", repo_id, revision, ["README.md"], ["README.md"])
    from datasets import load_dataset  # after the hub's answer: it takes a second
    from datasets.exceptions import DatasetsError

    what = f"dataset {repo_id}, configuration {config}"
    try:
        files = _data_files(folder, config)
        # The client's patterns know no `**`, but their `*` crosses folders. A card without files: fetch everything.
        patterns = [path.replace("**/", "*") for paths in files.values() for path in paths] if files else None
        folder = _snapshot("dataset", repo_id, revision, patterns, patterns or [])
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
    kind: str, repo_id: str, revision: str | None, files: Sequence[str] | None, needed: Sequence[str], but: str = ""
) -> Path:
    """Return the folder of the cache that holds those files of a repository that match `files`, whole.

    Args:
        needed: what an offline cache must hold for `files` where nothing tells what the repository has.
    """
    _check_endpoint()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import constants, set_client_factory

    what = f"{kind} {repo_id}"
    set_client_factory(hub_download.client)
    if not COMMIT.fullmatch(revision or ""):
        advice = _full_hash(kind, repo_id, revision or "main")
        raise Stop(f"{what}: expected a full commit hash as its revision, not {revision!r}: {advice}")
    try:
        return _fetched(kind, repo_id, revision, {"allow_patterns": files, "ignore_patterns": but or None}, needed)
    except OSError as error:
        if not error.errno:
            raise
        # Of this machine: what comes from the hub has no number.
        advice = "make room there, or set HF_HOME to a folder that can be written"
        raise Stop(f"{what}: {error.strerror}: {error.filename or constants.HF_HUB_CACHE}: {advice}") from error


def _check_endpoint() -> None:
    """Stop at an HF_ENDPOINT that is no address, before the hub client trips over it."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # a port above 65535, for one
        good = False
    if not good:
        raise Stop(f"HF_ENDPOINT: expected an address such as https://huggingface.co, not {endpoint!r}")


def _full_hash(kind: str, repo_id: str, revision: str) -> str:
    """Say which full hash to write for a branch, a tag or the beginning of a hash, or where they are listed."""
    from huggingface_hub import HfApi, constants, errors

    with contextlib.suppress(errors.HTTPError, OSError, ValueError):
        try:
            return f"write {_commit(kind, repo_id, revision)}, which {revision} is now"
        except errors.RevisionNotFoundError:  # the hub itself knows no short hashes
            commits = hub_download.in_time(lambda: HfApi().list_repo_commits(repo_id, repo_type=kind))
            found = [commit.commit_id for commit in commits if commit.commit_id.startswith(revision)]
            if found:
                return f"write {' or '.join(found)}"
    return f"see {constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo_id}/commits/main"


def _fetched(kind: str, repo_id: str, revision: str, chosen: dict, needed: Sequence[str]) -> Path:
    """Do as `_snapshot` says. An OSError with a number is one of this machine."""
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    what = f"{kind} {repo_id}"
    fetch = functools.partial(snapshot_download, repo_id, repo_type=kind, revision=revision, **chosen)
    try:
        get_cached_repo_tree(repo_id, repo_type=kind, revision=revision)  # or else `fetch` returns parts for the whole
        return _intact(Path(fetch(local_files_only=True)), what, chosen)
    except errors.HFValidationError as error:
        raise Stop(f"{what}: {error}") from error
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError):
        pass  # not here yet, or not all of it

    try:
        hub_download.patiently(lambda: _commit(kind, repo_id, revision), what)
    except errors.HfHubHTTPError as error:
        raise _explain(error, what, revision) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            folder = Path(fetch(local_files_only=True))
            if all(any(folder.glob(pattern)) for pattern in needed):
                return _intact(folder, what, chosen)
        raise _explain(error, what, revision) from error

    def pull() -> str:
        hub_download.files(kind, repo_id, revision, chosen)
        return fetch()

    try:
        return _intact(Path(hub_download.patiently(pull, what, hub_download.Break)), what, chosen)
    except hub_download.Damaged as error:
        raise Stop(f"{what}: {error} came damaged and was removed: run again") from error
    except errors.LocalEntryNotFoundError as error:
        raise _explain(error.__cause__ or error, what, revision) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        raise _explain(error, what, revision) from error


def _commit(kind: str, repo_id: str, revision: str) -> str:
    """Ask the hub which commit `revision` is, and whether it is there at all."""
    from huggingface_hub import HfApi

    return hub_download.in_time(lambda: HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha)


def _explain(error: Exception, what: str, revision: str) -> Stop:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    hub, reason = constants.ENDPOINT, hub_download.reason(error)
    if isinstance(error, RevisionNotFoundError):
        return Stop(f"{what}: {hub} has no revision {revision} of it: write a commit that its page there lists")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return Stop(f"{what}: {hub} has none by this name, or shows it only after `hf auth login` ({reason})")
    return Stop(
        f"cannot fetch {what} from {hub} ({reason}): run again later, it goes on from what came; "
        "`dvc exp run -S preset=sample` runs without it"
    )


def _intact(folder: Path, what: str, chosen: dict) -> Path:
    """Return `folder` if the digests of the chosen files are right: the hub client compares sizes alone."""
    from huggingface_hub.utils import filter_repo_objects

    links = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink()}
    damaged = []
    for name in filter_repo_objects(links, **chosen):
        # The cache names a content as the hub does. Some mirrors have other names, and a disk without links has none.
        digest = Path(os.readlink(links[name])).name
        if hub_download.DIGEST.fullmatch(digest) and not hub_download.right(links[name], digest):
            damaged.append(name)
    for name in damaged:
        links[name].resolve().unlink()
        links[name].unlink()
    if damaged:
        raise Stop(f"{what}: {', '.join(damaged)} came damaged and was removed from {folder}: run again")
    return folder


def line(row: str) -> str:
    """Return a row of the hub as the line it was in the release, where a blank line holds one space."""
    if not row:
        return " \n"
    return row if row.endswith("\n") else row + "\n"
