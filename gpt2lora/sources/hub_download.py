"""The way to a Hugging Face hub: every wait ends, every retry is seen, and what came before a break is kept.

The hub client alone would wait in silence, for as long as a server says, and begin a file anew at every start: it keeps
no parts. So the files come into its cache from here, under the names that it gives them, and it only links them.
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

from gpt2lora.pipeline.cli import say

DEADLINE = 8  # seconds for the hub's first answer: where there is no hub, a stage ends within 15
PAUSES = (1, 2, 4, 8)  # seconds between five tries
LONGEST = 300  # seconds that a hub may ask to wait: what huggingface.co counts its rate limits over
BUSY = (408, 429, 500, 502, 503, 504)  # what passes
ENOUGH = 2**20  # bytes: a try that brought as many is not counted
DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class Break(ConnectionError):
    """The way to the hub broke off, or nothing came for too long."""


class Damaged(Exception):
    """A file came whole, and is not the one that the hub lists. It was removed."""


def client():
    """A client whose requests all end, and whose errors the hub client leaves to `patiently`."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import hf_raise_for_status, httpx

    class Client(httpx.Client):
        def send(self, *args, **kwargs):
            with _breaks():
                return super().send(*args, **kwargs)

    def limit(request) -> None:
        if constants.is_offline_mode():
            raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set, and the cache lacks it")
        most = constants.HF_HUB_DOWNLOAD_TIMEOUT  # seconds without a byte: 10 unless the user says otherwise
        waits = request.extensions["timeout"]
        request.extensions["timeout"] = {phase: min(wait or most, most) for phase, wait in waits.items()}

    def refuse(response) -> None:
        if response.status_code in BUSY:
            hf_raise_for_status(response)

    return Client(event_hooks={"request": [limit], "response": [refuse]}, follow_redirects=True, timeout=None)


@contextlib.contextmanager
def _breaks() -> Iterator[None]:
    from huggingface_hub.utils import httpx

    try:
        yield
    except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise Break(str(error) or type(error).__name__) from error


def in_time(ask: Callable):
    """Return what `ask` returns, within DEADLINE.

    In a thread: a socket's time limit covers neither the resolution of names nor an answer that trickles in.

    Raises:
        TimeoutError: no answer within DEADLINE; else whatever `ask` raises.
    """
    answer = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # for the caller to raise
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(timeout=DEADLINE)


def patiently(call: Callable, what: str, *passing: type[Exception]):
    """Return what `call` returns. Where the hub is busy, or at an error that is `passing`, say so, wait, call again."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for pause in PAUSES:
        try:
            return call()
        except (HfHubHTTPError, LocalEntryNotFoundError, *passing) as error:
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else error
            busy = isinstance(cause, HfHubHTTPError) and cause.response.status_code in BUSY
            wait = max(pause, _asked(cause.response)) if busy else pause
            if wait > LONGEST or not (busy or isinstance(cause, passing)):
                raise
            say(f"{what}: {reason(cause)}; trying again in {wait} s")
        time.sleep(wait)
    return call()


def reason(error: BaseException) -> str:
    """What went wrong between here and the hub, in a few words."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return str(error) or f"no answer within {DEADLINE} s"
    asked = _asked(error.response)
    return f"HTTP {error.response.status_code}" + (f", and asks to wait {asked:,} s" if asked else "")


def files(kind: str, repo_id: str, revision: str, chosen: dict) -> None:
    """Put into the hub client's cache what it lacks of the chosen files.

    Args:
        chosen: allow_patterns and ignore_patterns, as `snapshot_download` takes them.

    Raises:
        Damaged: a file that came is not the one that the hub lists.
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
            continue  # a mirror with names of its own: the hub client knows what to do
        blob, lock = cache / name / "blobs" / digest, cache / ".locks" / name / f"{digest}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not blob.exists():
                _fetch(hf_hub_url(repo_id, file.path, **at), blob, file.size, file.path)


def right(file: Path, digest: str) -> bool:
    """Whether a file is the one that a hub names so: git's sha1 of a small file, the sha256 of a large one."""
    git = functools.partial(hashlib.sha1, b"blob %d\0" % file.stat().st_size)
    with file.open("rb") as content:
        return hashlib.file_digest(content, git if len(digest) == 40 else "sha256").hexdigest() == digest


def _fetch(url: str, blob: Path, size: int, name: str) -> None:
    """Fetch what is missing of a file, `size` bytes, and give it its name once it is whole."""
    part = blob.with_name(f"{blob.name}.incomplete")
    part.touch()
    while (held := part.stat().st_size) < size:
        try:
            with part.open("ab") as out, _breaks():
                _append(url, out, size, name)
        except Break as error:
            if part.stat().st_size - held < ENOUGH:
                raise
            say(f"{name}: {error} at {part.stat().st_size / 1e6:,.1f} MB; going on from there")
    if part.stat().st_size > size or not right(part, blob.name):
        part.unlink()
        raise Damaged(name)
    part.rename(blob)


def _append(url: str, out: BinaryIO, size: int, name: str) -> None:
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, tqdm

    held = out.tell()
    # Not compressed: else neither sizes nor ranges are those of the file.
    headers = build_hf_headers() | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={held}-"} if held else {})
    with get_session().stream("GET", url, headers=headers) as response:
        if response.status_code == 416:  # no such range: the hub lists more than there is
            out.truncate(0)
            raise Damaged(name)
        hf_raise_for_status(response)
        if held and response.status_code != 206:  # the whole, not the rest
            out.seek(0)
            out.truncate()
        with tqdm(desc=name, total=size, initial=out.tell(), unit="B", unit_scale=True) as bar:
            for chunk in response.iter_bytes():
                out.write(chunk)
                bar.update(len(chunk))
    if out.tell() < size:
        raise Break(f"{name} cut short at {out.tell():,} of {size:,} bytes")


def _asked(response) -> int:
    """Return the seconds that a busy hub asks to wait, 0 where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = response.headers.get("Retry-After", "").strip()
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit and limit.remaining == 0:
        return limit.reset_in_seconds
    if asked.isdecimal() and asked.isascii():
        return int(asked)
    with contextlib.suppress(ValueError, TypeError):  # a date, the other form that HTTP has
        return max(0, math.ceil((parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds()))
    return 0
