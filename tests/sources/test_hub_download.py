"""Downloads from a hub that is busy, slow or broken: retries, deadlines, resumed and damaged files."""

import contextlib
import hashlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_fetch import KILL_DURING_DOWNLOAD, MODEL, NO_PAUSES, SAMPLE_ADVICE, SPLITS, fetch
from hub_server import Fault, Hub

from gpt2lora.sources import hub_download

# Retries


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/.*safetensors"])
def test_a_failed_request_is_retried_and_each_retry_is_printed(hub, home, path):
    hub.faults.append(Fault("status", path, status=500, times=3))
    done = fetch("model", hub.url, home, first=NO_PAUSES)
    assert Path(done.result, "config.json").is_file()
    *printed, _ = done.out.splitlines()
    assert printed == [f"model {MODEL}: HTTP 500; trying again in {pause} s" for pause in (1, 2, 4)]


def test_a_request_is_sent_at_most_five_times(hub, home):
    hub.faults.append(Fault("status", "/tree/", status=503))
    done = fetch("dataset", hub.url, home, first=NO_PAUSES)
    assert "(HTTP 503)" in done.error
    assert done.out.count("trying again") == 4
    assert len([line for line in hub.requests if "/tree/" in line]) == 5


@pytest.mark.parametrize(
    ("headers", "first"), [({"Retry-After": "2"}, ""), ({"RateLimit": '"api";r=0;t=2'}, NO_PAUSES)]
)
def test_a_retry_waits_as_long_as_the_hub_asks(hub, home, headers, first):
    hub.faults.append(Fault("status", "/resolve/.*safetensors", status=429, headers=headers, times=1))
    done = fetch("model", hub.url, home, first=first)
    assert Path(done.result, "model.safetensors").is_file()
    assert done.out.splitlines()[0] == f"model {MODEL}: HTTP 429, and asks to wait 2 s; trying again in 2 s"
    assert done.seconds > 2 or first


def test_a_date_to_wait_for_is_converted_to_seconds():
    def requested_wait(text: str) -> int:
        return hub_download._requested_wait(SimpleNamespace(status_code=503, headers={"Retry-After": text}))

    assert 88 <= requested_wait(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)) <= 90
    assert requested_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert requested_wait("soon") == 0


def test_a_hub_that_asks_to_wait_an_hour_is_not_retried(hub, home):
    hub.faults.append(Fault("status", "/", status=429, headers={"Retry-After": "3600"}))
    done = fetch("model", hub.url, home)
    assert "(HTTP 429, and asks to wait 3,600 s): run again later" in done.error
    assert done.seconds < 15
    assert len(hub.requests) == 1


def test_every_request_has_a_time_limit(repos, tmp_path):
    faults = {
        "listing": Fault("stall", "/tree/"),
        "head": Fault("stall", "/resolve/"),
        "body": Fault("hang", "gpt2/resolve/"),
    }
    impatient = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "first": NO_PAUSES}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        futures = []
        for name, fault in faults.items():
            hub = stack.enter_context(Hub(repos))
            hub.faults.append(fault)
            futures.append(pool.submit(fetch, "model", hub.url, tmp_path / name, **impatient))
        for future in futures:
            assert "timed out" in future.result().error
            assert future.result().out.count("timed out; trying again in ") == 4
            assert future.result().seconds < 30


# Damaged and resumed downloads


@pytest.mark.parametrize(
    "kind, fault",
    [("model", "truncate"), ("model", "corrupt"), ("model", "loop"), ("model", "size"), ("dataset", "corrupt")],
)
def test_a_damaged_download_is_never_used(hub, home, kind, fault):
    hub.faults.append(Fault(fault, "/tree/" if fault == "size" else r"/resolve/.*(safetensors|parquet)"))
    error = fetch(kind, hub.url, home, first=NO_PAUSES).error
    if fault in ("corrupt", "size"):
        assert "came damaged" in error
    else:
        assert hub.url in error and SAMPLE_ADVICE in error
    hub.faults.clear()
    assert SAMPLE_ADVICE in fetch(kind, hub.url, home, HF_HUB_OFFLINE="1").error
    again = fetch(kind, hub.url, home).result
    assert kind == "model" or again == SPLITS


@pytest.mark.parametrize("end", ["cut short", "killed"])
def test_a_second_run_resumes_the_download(hub, home, tiny_model, end):
    size = (tiny_model / "model.safetensors").stat().st_size
    hub.faults.append(Fault("truncate" if end == "cut short" else "hang", "/resolve/.*safetensors"))
    if end == "cut short":
        assert "it goes on from what came" in fetch("model", hub.url, home, first=NO_PAUSES).error
    else:
        assert fetch("model", hub.url, home, first=KILL_DURING_DOWNLOAD).code == -9
    hub.faults.clear()
    first = len(hub.sent)
    folder = Path(fetch("model", hub.url, home).result)
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    (requested,) = [requested for path, requested, _ in hub.sent[first:] if path.endswith("safetensors")]
    assert requested.startswith("bytes=")
    lost = 2**16 if end == "killed" else 0  # bytes that were not yet written to the file
    assert size <= sum(count for path, _, count in hub.sent if path.endswith("safetensors")) <= size + lost
    assert "/config.json" not in str(hub.sent[first:]), "a complete file was downloaded again"


def test_an_attempt_that_made_progress_is_not_a_failure(tmp_path, monkeypatch):
    """So a large file can be downloaded over a connection that breaks again and again."""
    content = bytes(range(256)) * 256
    offsets = []

    def download_10_kb(url, out, size, name):
        offsets.append(out.tell())
        out.write(content[out.tell() :][:10_000])
        if out.tell() < size:
            raise hub_download.ConnectionBroken("broken off")

    monkeypatch.setattr(hub_download, "_download_rest", download_10_kb)
    monkeypatch.setattr(hub_download, "PROGRESS_BYTES", 10_000)
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    hub_download._download("url", blob, len(content), "name")
    assert blob.read_bytes() == content
    assert offsets == list(range(0, len(content), 10_000))
    monkeypatch.setattr(hub_download, "PROGRESS_BYTES", 10_001)
    blob.unlink()
    with pytest.raises(hub_download.ConnectionBroken):
        hub_download._download("url", blob, len(content), "name")
    assert [path.suffix for path in tmp_path.iterdir()] == [".incomplete"]
