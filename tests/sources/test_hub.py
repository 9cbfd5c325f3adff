"""The hub client against a hub on the loopback interface that answers as the real one does, or misbehaves as told."""

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import tiny
from hub_server import Fault, Hub, closed_port

from gpt2lora.sources import hub_download

MODEL, PICKLED, CORPUS = "tiny/gpt2", "tiny/pickled", "tiny/wikitext"
COMMIT, OLD, NONE = "1" * 40, "0" * 40, "f" * 40
WITHOUT = "`dvc exp run -S preset=sample` runs without it"
SPLITS = {
    # As on the hub: blank lines came out empty, every other line kept its spaces and its newline.
    "train": ["", " = River = \n", "", ' The river , 12 @.@ 5 km long , is “ quiet ” . \n", said no one \n', ""],
    "validation": ["", " = Bridge = \n", "", " A broken bridge \u2028 of 1 @,@ 200 stones . \n"],
    "test": ["", " = 東京 = \n", "", " <unk> crossed the coast . \n"],
}

# HF_ENDPOINT is read when huggingface_hub is imported, so each fetch is a process of its own, as a stage is.
FETCH = """
import json, sys
from gpt2lora.sources import hub
from gpt2lora.pipeline.cli import command
assert not {"huggingface_hub", "datasets"} & set(sys.modules)

@command
def main():
    kind, repo, config, revision = sys.argv[1:]
    if kind == "model":
        print(json.dumps(str(hub.fetch_model(repo, revision))))
    else:
        print(json.dumps({name: list(rows) for name, rows in hub.fetch_dataset(repo, config, revision).items()}))
    assert "torch" not in sys.modules

main(args=[])
"""
NO_PAUSE = "import time; time.sleep = lambda _: None\n"  # the hub client's retries wait for nothing
KILLED = """
import os, pathlib, signal, threading, time
def kill():
    part = next(iter(pathlib.Path(os.environ["HF_HOME"]).glob("hub/*/blobs/" + "?" * 64 + ".incomplete")), None)
    if part and part.stat().st_size > 200_000:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)

def watch():
    while True:
        kill()
threading.Thread(target=watch, daemon=True).start()
"""
SLOW_NAMES = "import socket, time; socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"


@dataclass
class Done:
    code: int
    out: str
    err: str
    seconds: float

    @property
    def result(self):
        assert self.code == 0, self.err
        return json.loads(self.out.splitlines()[-1])

    @property
    def error(self) -> str:
        """The one line that a failure ends in."""
        *before, line = self.err.splitlines()
        assert self.code == 1
        assert line.startswith("Error: ")
        assert "Traceback" not in self.err
        assert all("%|" in text or "Generating" in text for text in before if text), self.err  # progress bars
        return line


def fetch(kind, url, home, repo=None, revision=COMMIT, config="small", first="", **variables) -> Done:
    repo = repo or {"model": MODEL, "dataset": CORPUS}[kind]
    environment = {**tiny.environment(), "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": str(tiny.ROOT)}
    start = time.monotonic()
    command = [sys.executable, "-c", first + FETCH, kind, repo, config, revision]
    environment |= variables
    done = subprocess.run(command, cwd=home.parent, env=environment, capture_output=True, text=True, timeout=60)
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - start)


def write_dataset(folder: Path, splits: dict[str, list[str]], column: str = "text") -> Path:
    """Write a dataset in the form of WikiText's: a card that lists the parquet files of two configurations."""
    lines = ["---", "configs:"]
    for config in ("large", "small"):
        (folder / config).mkdir(parents=True)
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            name = f"{config}/{split}-00000-of-00001.parquet"
            pyarrow.parquet.write_table(pyarrow.table({column: rows if config == "small" else ["x"]}), folder / name)
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    lines += ["dataset_info:"]
    for config in ("large", "small"):
        lines += [f"- config_name: {config}", "  features:", f"  - name: {column}", "    dtype: string", "  splits:"]
        for split, rows in splits.items():
            count = len(rows) if config == "small" else 1
            lines += [f"  - name: {split}", f"    num_bytes: {count}", f"    num_examples: {count}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", "# A corpus"]))
    return folder


@pytest.fixture(scope="session")
def repos(tiny_model, tmp_path_factory) -> dict[str, dict[str, Path]]:
    root = tmp_path_factory.mktemp("repos")
    model, pickled = root / "model", root / "pickled"
    for folder in (model, model / "onnx", pickled):
        folder.mkdir()
    for path in tiny_model.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".json":
            (pickled / path.name).write_bytes(path.read_bytes())
    for name in ("pytorch_model.bin", "rust_model.ot", "README.md", "onnx/decoder.onnx", "onnx/more.safetensors"):
        (model / name).write_bytes(b"no one asked for this")
    (pickled / "pytorch_model.bin").write_bytes(b"a pickle")
    cut = {split: SPLITS[split] for split in ("train", "test")}
    return {
        f"models/{MODEL}": {COMMIT: model},
        f"models/{PICKLED}": {COMMIT: pickled},
        f"datasets/{CORPUS}": {
            OLD: write_dataset(root / "old", {split: ["old\n"] for split in SPLITS}),
            COMMIT: write_dataset(root / "new", SPLITS),
        },
        "datasets/tiny/cut": {COMMIT: write_dataset(root / "cut", cut)},
        "datasets/tiny/columns": {COMMIT: write_dataset(root / "columns", SPLITS, column="sentence")},
    }


@pytest.fixture
def hub(repos):
    with Hub(repos) as hub:
        yield hub


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def nowhere() -> str:
    return f"http://127.0.0.1:{closed_port()}"


def test_a_model_comes_byte_for_byte_and_nothing_more(hub, home, repos, tiny_model):
    folder = Path(fetch("model", hub.url, home).result)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in tiny_model.iterdir()
    }
    assert not [line for line in hub.requests if "agent" in line or "bin" in line or "onnx" in line]


def test_a_dataset_comes_row_for_row_and_no_other_configuration(hub, home):
    assert fetch("dataset", hub.url, home).result == SPLITS
    assert not [line for line in hub.requests if "large/" in line or line.endswith(".py")]


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_cached_needs_no_hub(hub, home, nowhere, kind):
    first = fetch(kind, hub.url, home).result
    assert fetch(kind, nowhere, home).result == first
    # What another program cached came without the listing of the repository.
    for listing in home.glob("hub/*/trees/*.json"):
        listing.unlink()
    assert fetch(kind, nowhere, home, HF_HUB_OFFLINE="1").result == first
    # A part of the repository does not pass for the whole.
    for path in [*home.glob("hub/*/snapshots/*/*.safetensors"), *home.glob("hub/*/snapshots/*/*/test-*")]:
        path.unlink()
    assert nowhere in fetch(kind, nowhere, home).error


def test_another_revision_never_stands_in(hub, home, nowhere):
    assert fetch("dataset", hub.url, home, revision=OLD).result["test"] == ["old\n"]
    assert WITHOUT in fetch("dataset", nowhere, home).error
    assert WITHOUT in fetch("dataset", hub.url, home, HF_HUB_OFFLINE="1").error


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory) -> dict[str, tuple[str, Future]]:
    """Fetches from hubs that do not answer, all at once since they wait: the name of each, its endpoint, its end."""
    home = tmp_path_factory.mktemp("unreachable") / "home"
    silent = Hub({})
    silent.faults.append(Fault("stall", "/"))
    with silent, ThreadPoolExecutor() as pool:
        refused = f"http://127.0.0.1:{closed_port()}"
        names = "http://hub.invalid"
        yield {
            "refused model": (refused, pool.submit(fetch, "model", refused, home)),
            "refused dataset": (refused, pool.submit(fetch, "dataset", refused, home)),
            "silent model": (silent.url, pool.submit(fetch, "model", silent.url, home)),
            "silent dataset": (silent.url, pool.submit(fetch, "dataset", silent.url, home)),
            "unknown name": (names, pool.submit(fetch, "model", names, home)),
            "slow name": (names, pool.submit(fetch, "model", names, home, first=SLOW_NAMES)),
            "offline": (refused, pool.submit(fetch, "model", refused, home, HF_HUB_OFFLINE="1")),
        }


@pytest.mark.parametrize(
    "name",
    ["refused model", "refused dataset", "silent model", "silent dataset", "unknown name", "slow name", "offline"],
)
def test_a_hub_out_of_reach_ends_in_one_line_within_15_seconds(unreachable, name):
    endpoint, attempt = unreachable[name]
    done = attempt.result()
    assert done.seconds < 15
    assert len(done.err.splitlines()) == 1
    assert done.out == ""
    for part in (endpoint, CORPUS if "dataset" in name else MODEL, WITHOUT):
        assert part in done.error


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_the_hub_does_not_have_is_named(hub, home, kind):
    assert f"{kind} tiny/none: {hub.url} has none" in fetch(kind, hub.url, home, repo="tiny/none").error
    assert f"no revision {NONE}" in fetch(kind, hub.url, home, revision=NONE).error
    # The last is shown to all and given to some.
    for status, path in ((401, "/"), (403, "/"), (404, "/"), (401, "/resolve/")):
        hub.faults[:] = [Fault("status", path, status=status)]
        assert f"`hf auth login` (HTTP {status})" in fetch(kind, hub.url, home).error


@pytest.mark.parametrize(
    ("revision", "advice"),
    [
        ("main", f"write {COMMIT}, which main is now"),
        ("", f"write {COMMIT}, which main is now"),
        (OLD[:7], f"write {OLD}"),
        ("typo", "/datasets/tiny/wikitext/commits/main"),
    ],
)
def test_only_a_full_commit_hash_pins_and_the_line_says_which_to_write(hub, home, revision, advice):
    line = fetch("dataset", hub.url, home, revision=revision).error
    assert f"dataset {CORPUS}: expected a full commit hash as its revision, not {revision!r}: " in line
    assert line.endswith(advice)
    assert not list(home.glob("hub/*/snapshots"))


def test_without_a_hub_the_line_says_where_commits_are_listed(home, nowhere):
    assert fetch("model", nowhere, home, revision="main").error.endswith(f"see {nowhere}/{MODEL}/commits/main")


def test_pickled_weights_are_refused(hub, home):
    line = fetch("model", hub.url, home, repo=PICKLED).error
    assert "expected *.safetensors" in line and "pytorch_model.bin" in line
    assert not [line for line in hub.requests if ".bin" in line]


def test_a_dataset_of_another_form_is_named(hub, home):
    assert "no split validation, only train, test" in fetch("dataset", hub.url, home, repo="tiny/cut").error
    assert "only sentence" in fetch("dataset", hub.url, home, repo="tiny/columns").error
    assert "expected one of large, small" in fetch("dataset", hub.url, home, config="smal").error


@pytest.mark.parametrize(
    "kind, fault",
    [("model", "truncate"), ("model", "corrupt"), ("model", "loop"), ("model", "size"), ("dataset", "corrupt")],
)
def test_a_broken_download_is_never_taken_for_whole(hub, home, kind, fault):
    hub.faults.append(Fault(fault, "/tree/" if fault == "size" else r"/resolve/.*(safetensors|parquet)"))
    error = fetch(kind, hub.url, home, first=NO_PAUSE).error
    assert ("came damaged" in error) if fault in ("corrupt", "size") else (hub.url in error and WITHOUT in error)
    hub.faults.clear()
    assert WITHOUT in fetch(kind, hub.url, home, HF_HUB_OFFLINE="1").error
    again = fetch(kind, hub.url, home).result
    assert kind == "model" or again == SPLITS


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/.*safetensors"])
def test_a_hub_that_recovers_is_good_enough_and_every_retry_is_seen(hub, home, path):
    hub.faults.append(Fault("status", path, status=500, times=3))
    done = fetch("model", hub.url, home, first=NO_PAUSE)
    assert Path(done.result, "config.json").is_file()
    *said, _ = done.out.splitlines()
    assert said == [f"model {MODEL}: HTTP 500; trying again in {pause} s" for pause in (1, 2, 4)]


def test_a_hub_that_does_not_recover_is_asked_five_times(hub, home):
    hub.faults.append(Fault("status", "/tree/", status=503))
    done = fetch("dataset", hub.url, home, first=NO_PAUSE)
    assert "(HTTP 503)" in done.error
    assert done.out.count("trying again") == 4
    assert len([line for line in hub.requests if "/tree/" in line]) == 5


@pytest.mark.parametrize(("headers", "first"), [({"Retry-After": "2"}, ""), ({"RateLimit": '"api";r=0;t=2'}, NO_PAUSE)])
def test_a_hub_that_asks_to_wait_is_waited_for_and_the_user_sees_it(hub, home, headers, first):
    hub.faults.append(Fault("status", "/resolve/.*safetensors", status=429, headers=headers, times=1))
    done = fetch("model", hub.url, home, first=first)
    assert Path(done.result, "model.safetensors").is_file()
    assert done.out.splitlines()[0] == f"model {MODEL}: HTTP 429, and asks to wait 2 s; trying again in 2 s"
    assert done.seconds > 2 or first


def test_a_time_to_wait_until_is_turned_into_seconds():
    def asked(text: str) -> int:
        return hub_download._requested_wait(SimpleNamespace(status_code=503, headers={"Retry-After": text}))

    assert 88 <= asked(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)) <= 90
    assert asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert asked("soon") == 0


def test_a_hub_that_asks_to_wait_for_an_hour_is_not_waited_for(hub, home):
    hub.faults.append(Fault("status", "/", status=429, headers={"Retry-After": "3600"}))
    done = fetch("model", hub.url, home)
    assert "(HTTP 429, and asks to wait 3,600 s): run again later" in done.error
    assert done.seconds < 15
    assert len(hub.requests) == 1


@pytest.mark.parametrize("end", ["cut short", "killed"])
def test_a_second_start_goes_on_from_the_bytes_that_came(hub, home, tiny_model, end):
    size = (tiny_model / "model.safetensors").stat().st_size
    hub.faults.append(Fault("truncate" if end == "cut short" else "hang", "/resolve/.*safetensors"))
    if end == "cut short":
        assert "it goes on from what came" in fetch("model", hub.url, home, first=NO_PAUSE).error
    else:
        assert fetch("model", hub.url, home, first=KILLED).code == -9
    hub.faults.clear()
    first = len(hub.sent)
    folder = Path(fetch("model", hub.url, home).result)
    assert (folder / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    (asked,) = [asked for path, asked, _ in hub.sent[first:] if path.endswith("safetensors")]
    assert asked.startswith("bytes=")
    lost = 2**16 if end == "killed" else 0  # what was still in memory
    assert size <= sum(count for path, _, count in hub.sent if path.endswith("safetensors")) <= size + lost
    assert "/config.json" not in str(hub.sent[first:]), "what was whole came again"


def test_a_break_after_many_bytes_is_not_counted(tmp_path, monkeypatch):
    """So a large file comes over a line that breaks off again and again."""
    content = bytes(range(256)) * 256
    asked = []

    def append(url, out, size, name):
        asked.append(out.tell())
        out.write(content[out.tell() :][:10_000])
        if out.tell() < size:
            raise hub_download.ConnectionBroken("broken off")

    monkeypatch.setattr(hub_download, "_download_rest", append)
    monkeypatch.setattr(hub_download, "PROGRESS_BYTES", 10_000)
    blob = tmp_path / hashlib.sha256(content).hexdigest()
    hub_download._download("url", blob, len(content), "name")
    assert blob.read_bytes() == content
    assert asked == list(range(0, len(content), 10_000))
    monkeypatch.setattr(hub_download, "PROGRESS_BYTES", 10_001)
    blob.unlink()
    with pytest.raises(hub_download.ConnectionBroken):
        hub_download._download("url", blob, len(content), "name")
    assert [path.suffix for path in tmp_path.iterdir()] == [".incomplete"]


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1", "ftp://hub", "hub.example", "http://a b", ""],
)
def test_an_endpoint_that_is_no_address_is_one_line(home, endpoint):
    done = fetch("model", endpoint, home)
    assert done.err == f"Error: HF_ENDPOINT: expected an address such as https://huggingface.co, not {endpoint!r}\n"
    assert done.error


def test_a_cache_that_cannot_be_written_is_one_line_that_names_it(hub, home):
    home.write_text("a file where the folder should be")
    for folder in (home, home / "inside"):
        line = fetch("model", hub.url, home, HF_HOME=str(folder)).error
        assert str(folder) in line
        assert line.endswith("make room there, or set HF_HOME to a folder that can be written")


def test_no_request_waits_for_ever(repos, tmp_path):
    faults = {
        "listing": Fault("stall", "/tree/"),
        "head": Fault("stall", "/resolve/"),
        "body": Fault("hang", "gpt2/resolve/"),
    }
    impatient = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "first": NO_PAUSE}
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        attempts = []
        for name, fault in faults.items():
            hub = stack.enter_context(Hub(repos))
            hub.faults.append(fault)
            attempts.append(pool.submit(fetch, "model", hub.url, tmp_path / name, **impatient))
        for attempt in attempts:
            assert "timed out" in attempt.result().error
            assert attempt.result().out.count("timed out; trying again in ") == 4
            assert attempt.result().seconds < 30


def test_base_and_prepare_write_what_the_hub_serves(hub, home, project, repos, tiny_model):
    tiny.set_param(project, "preset", "gpt2")
    for key, value in {
        "model": MODEL,
        "model_revision": COMMIT,
        "dataset": CORPUS,
        "dataset_config": "small",
        "dataset_revision": COMMIT,
    }.items():
        tiny.set_param(project, f"presets.gpt2.{key}", value)
    for stage in ("base", "prepare"):
        tiny.run(project, sys.executable, "-m", f"stages.{stage}", HF_ENDPOINT=hub.url, HF_HOME=str(home))
    base = {path.name: path.read_bytes() for path in (project / "data/base").iterdir()}
    assert set(json.loads(base.pop("manifest.json"))["files"]) == base.keys()
    assert base == {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    for split, rows in SPLITS.items():
        text = (project / f"data/raw/{split}.txt").read_bytes().decode()
        assert text == "".join(row or " \n" for row in rows)
