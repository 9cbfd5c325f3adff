"""Download models and datasets from a Hugging Face hub at a pinned commit: complete or not at all, without long waits.

A repository that the hub client's cache holds completely is used without a request, so an offline machine needs no
setting.
"""

import contextlib
import functools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from gpt2lora.pipeline import params
from gpt2lora.pipeline.adapter_files import ADAPTER_CONFIG
from gpt2lora.pipeline.cli import StageError
from gpt2lora.sources import hub_download

COMMIT = re.compile(r"[0-9a-f]{40}")
HOST = re.compile(r"[\w.:%-]+")
MODEL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model"),
    "README.md",
)
CONFIG_FILES = tuple(name for name in MODEL_FILES if name[0] != "*" and name != "README.md")  # to be copied
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Set before the libraries are imported. Xet, the hub's protocol for large files, retries silently for 4.5 minutes
# behind a firewall that blocks its storage but not the hub; plain HTTP fails in time.
ENVIRONMENT = {
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
}


def fetch_model(repo_id: str, revision: str | None) -> Path:
    """Return a folder with the configuration, the tokenizer and the safetensors of a model on the hub.

    The folder belongs to the hub client's cache. It may hold more files of the same commit, pickles for instance, that
    other programs downloaded: copy files from it by name, and never write to it.

    Raises:
        StageError: says what is wrong with the repository or the connection.
    """
    folder = _snapshot("model", repo_id, revision, MODEL_FILES, ["config.json", "*.safetensors"], ignore="*/*")
    if not any(folder.glob("*.safetensors")):
        from huggingface_hub import get_cached_repo_tree

        names = [file.path for file in get_cached_repo_tree(repo_id, revision=revision)]
        pickles = ", ".join(name for name in names if name.endswith(PICKLES))
        refused = f" but {pickles}: pickled weights can run code, so they are refused" if pickles else ""
        raise StageError(f"model {repo_id}: expected *.safetensors at {revision}, which has none{refused}")
    return folder


def fetch_config(repo_id: str, revision: str | None) -> Path:
    """Return a folder with the config.json of a model on the hub, to be checked before its weights are downloaded.

    It also holds adapter_config.json, if there is one.
    """
    return _snapshot("model", repo_id, revision, ["config.json", ADAPTER_CONFIG], ["config.json"])


def fetch_dataset(
    repo_id: str, config: str | None, revision: str | None, column: str | None
) -> dict[str, Iterable[str | None]]:
    """Return the unchanged rows of a column of texts of each split; iterating reads them from disk.

    `load_dataset` gets the downloaded folder, never the repository's name: given a name it asks the hub even if
    everything is cached, and if the hub fails it silently returns whatever revision it cached last.

    Raises:
        StageError: says what is wrong with the repository or the connection.
    """
    folder = _snapshot("dataset", repo_id, revision, ["README.md"], ["README.md"])
    from datasets import load_dataset  # after the hub answered: the import takes a second
    from datasets.exceptions import DatasetsError

    what = f"dataset {repo_id}, configuration {config}"
    try:
        files = _data_files(folder, config)
        # In the hub client's patterns `*` also matches `/`, and `**` is unknown. A card may list no files: fetch all.
        patterns = [path.replace("**/", "*") for paths in files.values() for path in paths] if files else None
        folder = _snapshot("dataset", repo_id, revision, patterns, patterns or [])
        splits = load_dataset(str(folder), config, data_files=files)
    except (DatasetsError, ValueError, FileNotFoundError) as error:
        raise StageError(f"{what}: {error.__cause__ or error}") from error
    for name, rows in splits.items():
        columns = rows.features
        if column is None:
            raise params.null_column(columns, what)
        if getattr(columns.get(column), "dtype", None) not in ("string", "large_string"):
            names = ", ".join(columns)
            raise StageError(f"{what}: no column `{column}` of strings in split {name}, only {names}: set text_column")
    return {name: rows[column] for name, rows in splits.items()}


def _data_files(folder: Path, config: str | None) -> dict[str, list[str]] | None:
    """Return the files of each split that the dataset card lists for `config`, or None if it lists none."""
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
    kind: str, repo_id: str, revision: str | None, files: Sequence[str] | None, needed: Sequence[str], ignore: str = ""
) -> Path:
    """Download the files of a repository that match `files`; return their folder in the hub client's cache.

    Args:
        files: glob patterns; None stands for all files.
        needed: glob patterns that an offline cache must match if it does not know which files the repository has.
        ignore: a glob pattern of files to leave out.
    """
    _set_up_client()
    check_revision(kind, repo_id, revision)
    from huggingface_hub import constants

    what = f"{kind} {repo_id}"
    try:
        return _download_snapshot(
            kind, repo_id, revision, {"allow_patterns": files, "ignore_patterns": ignore or None}, needed
        )
    except OSError as error:
        if not error.errno:
            raise
        # An error of this machine: errors from the hub have no errno.
        advice = "make room there, or set HF_HOME to a folder that can be written"
        raise StageError(f"{what}: {error.strerror}: {error.filename or constants.HF_HUB_CACHE}: {advice}") from error


def check_revision(kind: str, repo_id: str, revision: str | None) -> None:
    """Refuse a revision that is no full commit hash; only then the hub is asked, for the hash to write.

    Raises:
        StageError: says also that `repo_id` is no path on this machine, which may be what was meant.
    """
    if COMMIT.fullmatch(revision or ""):
        return
    _set_up_client()
    advice = _suggest_commit(kind, repo_id, revision or "main")
    path = f"; if a path was meant: {repo_id!r} is no file or folder, seen from {Path.cwd()}"
    line = f"{kind} {repo_id}: expected a full commit hash as its revision, not {params.in_yaml(revision)}: {advice}"
    raise StageError(line + path * (revision is None))


def _set_up_client() -> None:
    _check_endpoint()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import set_client_factory

    set_client_factory(hub_download.make_client)


def _check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that is not a URL, which the hub client would fail on with a traceback."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:  # a port above 65535, for one
        good = False
    if not good:
        raise StageError(f"HF_ENDPOINT: expected an address such as https://huggingface.co, not {endpoint!r}")


def _suggest_commit(kind: str, repo_id: str, revision: str) -> str:
    """Return advice: the full hash of a branch, a tag or an abbreviated hash, or the page that lists all commits."""
    from huggingface_hub import HfApi, constants, errors

    with contextlib.suppress(errors.HTTPError, OSError, ValueError):
        try:
            return f"write {_resolve_commit(kind, repo_id, revision)}, which {revision} is now"
        except errors.RevisionNotFoundError:  # the hub does not resolve abbreviated hashes
            commits = hub_download.with_deadline(lambda: HfApi().list_repo_commits(repo_id, repo_type=kind))
            found = [commit.commit_id for commit in commits if commit.commit_id.startswith(revision)]
            if found:
                return f"write {' or '.join(found)}"
    return f"see {constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo_id}/commits/main"


def _download_snapshot(kind: str, repo_id: str, revision: str, chosen: dict, needed: Sequence[str]) -> Path:
    """Do what `_snapshot` says.

    Raises:
        OSError: with an errno, an error of this machine.
    """
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download

    what = f"{kind} {repo_id}"
    fetch = functools.partial(snapshot_download, repo_id, repo_type=kind, revision=revision, **chosen)
    try:
        get_cached_repo_tree(repo_id, repo_type=kind, revision=revision)  # without it, `fetch` may return only parts
        return _verify_snapshot(Path(fetch(local_files_only=True)), what, chosen)
    except errors.HFValidationError as error:
        raise StageError(f"{what}: {error}") from error
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError):
        pass  # not cached, or not completely

    try:
        hub_download.with_retries(lambda: _resolve_commit(kind, repo_id, revision), what)
    except errors.HfHubHTTPError as error:
        raise _explain_error(error, what, revision) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            folder = Path(fetch(local_files_only=True))
            if all(any(folder.glob(pattern)) for pattern in needed):
                return _verify_snapshot(folder, what, chosen)
        raise _explain_error(error, what, revision) from error

    def pull() -> str:
        hub_download.download_files(kind, repo_id, revision, chosen)
        return fetch()

    try:
        return _verify_snapshot(
            Path(hub_download.with_retries(pull, what, hub_download.ConnectionBroken)), what, chosen
        )
    except hub_download.DamagedFile as error:
        raise StageError(f"{what}: {error} came damaged and was removed: run again") from error
    except errors.LocalEntryNotFoundError as error:
        raise _explain_error(error.__cause__ or error, what, revision) from error
    except (errors.HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None):
            raise
        raise _explain_error(error, what, revision) from error


def _resolve_commit(kind: str, repo_id: str, revision: str) -> str:
    """Ask the hub for the commit of `revision`; it raises if there is none."""
    from huggingface_hub import HfApi

    return hub_download.with_deadline(lambda: HfApi().repo_info(repo_id, repo_type=kind, revision=revision).sha)


def _explain_error(error: Exception, what: str, revision: str) -> StageError:
    """Return the one line for an error of the hub or of the connection."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    hub, reason = constants.ENDPOINT, hub_download.describe_error(error)
    if isinstance(error, RevisionNotFoundError):
        return StageError(f"{what}: {hub} has no revision {revision} of it: write a commit that its page there lists")
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
        return StageError(f"{what}: {hub} has none by this name, or shows it only after `hf auth login` ({reason})")
    return StageError(
        f"cannot fetch {what} from {hub} ({reason}): run again later, it goes on from what came; "
        "`dvc exp run -S preset=sample` runs without it"
    )


def _verify_snapshot(folder: Path, what: str, chosen: dict) -> Path:
    """Return `folder` if the chosen files have the right digests; the hub client compares only sizes."""
    from huggingface_hub.utils import filter_repo_objects

    links = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_symlink()}
    damaged = []
    for name in filter_repo_objects(links, **chosen):
        # The cache names a file's content by its digest. Some mirrors use other names; a disk without links has none.
        digest = Path(os.readlink(links[name])).name
        if hub_download.DIGEST.fullmatch(digest) and not hub_download.matches_digest(links[name], digest):
            damaged.append(name)
    for name in damaged:
        links[name].resolve().unlink()
        links[name].unlink()
    if damaged:
        raise StageError(f"{what}: {', '.join(damaged)} came damaged and was removed from {folder}: run again")
    return folder


def restore_line(row: str) -> str:
    """Return a row of the hub as its line in the original release, where a blank line holds one space."""
    if not row:
        return " \n"
    return row if row.endswith("\n") else row + "\n"
