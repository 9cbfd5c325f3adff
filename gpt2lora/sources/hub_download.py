"""Requests to a Hugging Face hub with deadlines, visible retries, and downloads that resume.

The hub client waits silently for as long as a server asks, and starts an interrupted file from the beginning. So this
module downloads the files into the client's cache, under the client's own names, and the client only links them.
"""

import contextlib
import functools
import hashlib
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO

from gpt2lora.pipeline.cli import echo
from gpt2lora.pipeline.progress_bar import progress_bar

DEADLINE = 8  # seconds to the hub's first answer: without a hub, a stage ends within 15 s
RETRY_PAUSES = (1, 2, 4, 8)  # seconds between five attempts
MAX_WAIT = 300  # seconds that a hub may ask to wait: the period of huggingface.co's rate limits
RETRY_STATUS = (408, 429, 500, 502, 503, 504)  # worth a retry
PROGRESS_BYTES = 2**20  # bytes: an attempt that brought as many does not count as a failed one
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class ConnectionBroken(ConnectionError):
    """The connection to the hub broke, or was silent for too long."""


class DamagedFile(Exception):
    """A file arrived completely, but is not the one that the hub lists. It was removed."""


def make_client():
    """Return an HTTP client whose requests have time limits, and whose errors `with_retries` handles."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import hf_raise_for_status, httpx

    class Client(httpx.Client):
        def send(self, *args, **kwargs):
            with _connection_errors():
                return super().send(*args, **kwargs)

    def limit(request) -> None:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set, and the cache lacks it")
        most = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte, 10 by default
        waits = request.extensions["timeout"]
        request.extensions["timeout"] = {phase: min(wait or most, most) for phase, wait in waits.items()}

    def refuse(response) -> None:
        if response.status_code in RETRY_STATUS:
            hf_raise_for_status(response)

    return Client(event_hooks={"request": [limit], "response": [refuse]}, follow_redirects=True, timeout=None)


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    from huggingface_hub.utils import httpx

    try:
        yield
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise ConnectionBroken(str(error) or type(error).__name__) from error


def with_deadline(call: Callable):
    """Return the result of `call`, which runs in a thread.

    A socket's time limit covers neither name resolution nor a response that arrives byte by byte.

    Raises:
        TimeoutError: no result within DEADLINE. Otherwise, whatever `call` raises.
    """
    answer = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # raised again in the caller's thread
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=DEADLINE)


def with_retries(call: Callable, what: str, *passing: type[Exception]):
    """Return the result of `call`; retry after a line and a pause if the hub is busy, or at an error in `passing`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for pause in RETRY_PAUSES:
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, *passing) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            busy = isinstance(cause, HfHubHTTPError) and cause.response.status_code in RETRY_STATUS
            wait = max(pause, _requested_wait(cause.response)) if busy else pause
            if wait > MAX_WAIT or not (busy or isinstance(cause, passing)):
                raise
            echo(f"{what}: {describe_error(cause)}; trying again in {wait} s")
        time.sleep(wait)
    return call()


def describe_error(error: BaseException) -> str:
    """Return an error of the connection or of the hub in a few words."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return str(error) or f"no answer within {DEADLINE} s"
    asked = _requested_wait(error.response)
    return f"HTTP {error.response.status_code}" + (f", and asks to wait {asked:,} s" if asked else "")


def download_files(kind: str, repo_id: str, revision: str, chosen: dict) -> None:
    """Download the chosen files that the hub client's cache lacks.

    Args:
        chosen: allow_patterns and ignore_patterns of `snapshot_download`.

    Raises:
        DamagedFile: a downloaded file is not the one that the hub lists.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import WeakFileLock, filter_repo_objects

    at = {"repo_type": kind, "revision": revision}
    listed = [entry for entry in HfApi().list_repo_tree(repo_id, recursive=True, **at) if isinstance(entry, RepoFile)]
    cache, name = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo_id, repo_type=kind)
    for file in filter_repo_objects(listed, **chosen, key=lambda file: file.path):
        digest = file.lfs.sha256 if file.lfs else file.blob_id
        if not DIGEST.fullmatch(digest):
            continue  # a mirror with its own names: left to the hub client
        blob, lock = cache / name / "blobs" / digest, cache / ".locks" / name / f"{digest}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                _download(hf_hub_url(repo_id, file.path, **at), blob, file.size, file.path)


def matches_digest(file: Path, digest: str) -> bool:
    """Tell whether a file has the digest that the hub lists: git's SHA-1 of a small file, SHA-256 of a large one."""
    git = functools.partial(hashlib.sha1, b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        return hashlib.file_digest(content, git if len(digest) == 40 else "sha256").hexdigest() == digest


def _download(url: str, blob: Path, size: int, name: str) -> None:
    """Download a file of `size` bytes; an earlier partial download is resumed."""
    part = blob.with_name(f"{blob.name}.incomplete")
    part.touch()
    while (held := part.stat().st_size) < size:
        try:
            with part.open("ab") as out, _connection_errors():
                _download_rest(url, out, size, name)
        except ConnectionBroken as error:
            if part.stat().st_size - held < PROGRESS_BYTES:
                raise
            echo(f"{name}: {error} at {part.stat().st_size / 1e6:,.1f} MB; resuming from there")
    if part.stat().st_size > size or not matches_digest(part, blob.name):
        part.unlink()
        raise DamagedFile(name)
    part.rename(blob)


def _download_rest(url: str, out: BinaryIO, size: int, name: str) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    held = out.tell()
    # Ask for no compression: sizes and ranges must be those of the file.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    with get_session().stream("GET", url, headers=headers) as response:
        if response.status_code == 416:  # range not satisfiable: the hub lists a larger size than the file has
            out.truncate(0)
            raise DamagedFile(name)
        hf_raise_for_status(response)
        if held and response.status_code != 206:  # the server sent the whole file, not the rest
            out.seek(0)
            out.truncate()
        with progress_bar(name, size, "B", initial=out.tell(), unit_scale=True) as bar:
            for chunk in response.iter_bytes():
                out.write(chunk)
                bar.update(len(chunk))
    if out.tell() < size:
        raise ConnectionBroken(f"{name} cut short at {out.tell():,} of {size:,} bytes")


def _requested_wait(response) -> int:
    """Return the seconds that a busy hub asks to wait (Retry-After or RateLimit), or 0."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = response.headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit and limit.remaining == 0:
        return limit.reset_in_seconds
    if asked.isdecimal() and asked.isascii():
        return int(asked)
    with contextlib.suppress(ValueError, TypeError):  # Retry-After may also be a date
        return max(0, math.ceil((parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()))
    return 0
