"""Waiting for rank 0, which may write a file for longer than a collective operation may take, as long as it lives.

A thread of rank 0 counts up in the group's store. A process that is stopped or hangs counts no more.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch.distributed as dist

from gpt2lora.distributed import failure

BEAT = 2.0  # seconds between two counts
LEAVE_SECONDS = 30.0  # in which all others have seen that rank 0 is done


@contextlib.contextmanager
def beating(store: dist.Store) -> Iterator[None]:
    """Count up in the store as long as the context lasts, if this process is rank 0."""
    ended = threading.Event()

    def beat() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: the main thread notices
            while not ended.wait(BEAT):
                store.add("beats", 1)

    thread = threading.Thread(target=beat, daemon=True)
    if os.environ["RANK"] == "0":
        thread.start()
    try:
        yield
    finally:
        ended.set()


def wait_for_key(store: dist.Store, key: str, limit: timedelta) -> None:
    """Wait until rank 0 has set a key; end this process if another one failed.

    Raises:
        PeerError: rank 0 has not counted for as long as `limit`.
        RuntimeError: the store is gone.
    """
    beats, since, pause = -1, time.monotonic(), 0.001
    while not store.check([key]):
        if store.check(["failures"]):
            failure.exit_silently()
        now = store.add("beats", 0)
        if now != beats:
            beats, since = now, time.monotonic()
        elif time.monotonic() - since > limit.total_seconds():
            raise failure.PeerError("rank 0 is still writing, or hangs")
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def finish(store: dist.Store, limit: timedelta) -> None:
    """End together: the others wait until rank 0 has written the results, so that its failure is theirs, too."""
    if os.environ["RANK"] != "0":
        wait_for_key(store, "written", limit)
        store.add("left", 1)
        return
    store.set("written", "")
    if failure.holds_store():
        deadline = time.monotonic() + LEAVE_SECONDS
        while store.add("left", 0) < int(os.environ["WORLD_SIZE"]) - 1 and time.monotonic() < deadline:
            time.sleep(0.01)
