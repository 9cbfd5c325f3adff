"""fetch_model and fetch_dataset against a hub on the loopback interface: what is fetched, cached and refused."""

import hashlib
import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
from hub_fetch import (
    COMMIT,
    CORPUS,
    MODEL,
    OLD_COMMIT,
    PICKLED,
    SAMPLE_ADVICE,
    SLOW_NAME_RESOLUTION,
    SPLITS,
    UNKNOWN_COMMIT,
    fetch,
    write_dataset,
)
from hub_server import Fault, Hub, closed_port
from wikitext import ARTICLES, RAW_TEST_DIGEST, WIKITEXT2_RAW, needs_raw

from gpt2lora.dataset.articles import split_articles
from gpt2lora.dataset.documents import read_split
from gpt2lora.sources.hub import restore_line

# What is fetched


def test_a_model_is_fetched_byte_for_byte_and_nothing_else(hub, home, repos, tiny_model):
    folder = Path(fetch("model", hub.url, home).result)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found.pop("README.md", None)  # names the license
    assert found == {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    assert not [line for line in hub.requests if "agent" in line or "bin" in line or "onnx" in line]


def test_a_dataset_is_fetched_unchanged_without_other_configs(hub, home):
    assert fetch("dataset", hub.url, home).result == SPLITS
    assert not [line for line in hub.requests if "large/" in line or line.endswith(".py")]


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


@pytest.mark.slow
def test_an_adapter_beside_a_model_is_refused_before_its_weights_come(hub, home, project, repos, tiny_model):
    folder = shutil.copytree(tiny_model, home.parent / "repository")
    (folder / "adapter_config.json").write_text("{}")
    repos["models/tiny/with-adapter"] = {COMMIT: folder}
    for key, value in {"model": "tiny/with-adapter", "model_revision": COMMIT}.items():
        tiny.set_param(project, f"presets.gpt2.{key}", value)
    tiny.set_param(project, "preset", "gpt2")
    command = [sys.executable, "-m", "stages.base"]
    output = tiny.run(project, *command, HF_ENDPOINT=hub.url, HF_HOME=str(home), fails=True)
    assert "Error: tiny/with-adapter: holds an adapter beside the model (adapter_config.json)" in output
    assert not [line for line in hub.requests if "safetensors" in line]


@pytest.mark.slow
def test_rows_of_another_column_are_documents_and_missing_splits_cut(hub, home, project, repos):
    tiny.set_param(project, "preset", "gpt2")
    texts = [f"A document,\n\nnumber {number}\r\n" for number in range(10)]
    repos["datasets/tiny/documents"] = {COMMIT: write_dataset(home.parent / "documents", {"train": texts}, "body")}
    for key, value in {"dataset": "tiny/documents", "dataset_config": "small", "dataset_revision": COMMIT}.items():
        tiny.set_param(project, f"presets.gpt2.{key}", value)
    command = [sys.executable, "-m", "stages.prepare"]
    line = tiny.run(project, *command, HF_ENDPOINT=hub.url, HF_HOME=str(home), fails=True).splitlines()[-1]
    assert line.endswith("no column `text` of strings in split train, only body: set text_column")
    tiny.set_param(project, "presets.gpt2.text_column", None)
    line = tiny.run(project, *command, HF_ENDPOINT=hub.url, HF_HOME=str(home), fails=True).splitlines()[-1]
    assert "presets.gpt2.text_column: expected one of the columns of dataset tiny/documents" in line
    tiny.set_param(project, "presets.gpt2.text_column", "body")
    output = tiny.run(project, *command, HF_ENDPOINT=hub.url, HF_HOME=str(home))
    assert "cut validation and test from train, by documents at random: train 8, validation 1, test 1" in output
    files = [project / f"data/raw/{split}.jsonl" for split in ("train", "validation", "test")]
    assert sorted(text for file in files for text in read_split(file)) == texts


def test_hub_rows_are_restored_to_lines_of_the_release():
    assert list(map(restore_line, ["", " = A = \n", "no newline"])) == [" \n", " = A = \n", "no newline\n"]


@needs_raw
def test_the_raw_test_split_is_restored_byte_for_byte():
    data = (Path(WIKITEXT2_RAW) / "test.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == RAW_TEST_DIGEST
    lines = [f"{line}\n" for line in data.decode().split("\n")[:-1]]
    hub_rows = ["" if line == " \n" else line for line in lines]
    assert "".join(map(restore_line, hub_rows)).encode() == data
    assert len(split_articles(data.decode())) == ARTICLES["test"]


# The cache


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_cached_repository_needs_no_hub(hub, home, no_hub, kind):
    first = fetch(kind, hub.url, home).result
    assert fetch(kind, no_hub, home).result == first
    # Another program's cache may lack the listing of the repository.
    for listing in home.glob("hub/*/trees/*.json"):
        listing.unlink()
    assert fetch(kind, no_hub, home, HF_HUB_OFFLINE="1").result == first
    # An incomplete cache is not used.
    for path in [*home.glob("hub/*/snapshots/*/*.safetensors"), *home.glob("hub/*/snapshots/*/*/test-*")]:
        path.unlink()
    assert no_hub in fetch(kind, no_hub, home).error


def test_another_cached_revision_is_not_used(hub, home, no_hub):
    assert fetch("dataset", hub.url, home, revision=OLD_COMMIT).result["test"] == ["old\n"]
    assert SAMPLE_ADVICE in fetch("dataset", no_hub, home).error
    assert SAMPLE_ADVICE in fetch("dataset", hub.url, home, HF_HUB_OFFLINE="1").error


def test_the_error_for_a_cache_without_write_access_names_it(hub, home):
    home.write_text("a file in the place of the folder")
    for folder in (home, home / "inside"):
        line = fetch("model", hub.url, home, HF_HOME=str(folder)).error
        assert str(folder) in line
        assert line.endswith("make room there, or set HF_HOME to a folder that can be written")


# The hub is out of reach


@pytest.fixture(scope="module")
def unreachable(tmp_path_factory) -> dict[str, tuple[str, Future]]:
    """Fetches from hubs that do not answer, which all wait at the same time: for each its endpoint and its future."""
    home = tmp_path_factory.mktemp("unreachable") / "home"
    silent = Hub({})
    silent.faults.append(Fault("stall", "/"))
    with silent, ThreadPoolExecutor() as pool:
        refused = f"http://127.0.0.1:{closed_port()}"
        unknown = "http://hub.invalid"
        yield {
            "refused model": (refused, pool.submit(fetch, "model", refused, home)),
            "refused dataset": (refused, pool.submit(fetch, "dataset", refused, home)),
            "silent model": (silent.url, pool.submit(fetch, "model", silent.url, home)),
            "silent dataset": (silent.url, pool.submit(fetch, "dataset", silent.url, home)),
            "unknown name": (unknown, pool.submit(fetch, "model", unknown, home)),
            "slow name": (unknown, pool.submit(fetch, "model", unknown, home, first=SLOW_NAME_RESOLUTION)),
            "offline": (refused, pool.submit(fetch, "model", refused, home, HF_HUB_OFFLINE="1")),
        }


@pytest.mark.parametrize(
    "name",
    ["refused model", "refused dataset", "silent model", "silent dataset", "unknown name", "slow name", "offline"],
)
def test_an_unreachable_hub_ends_in_one_line_within_15_seconds(unreachable, name):
    endpoint, future = unreachable[name]
    done = future.result()
    assert done.seconds < 15
    assert len(done.err.splitlines()) == 1
    assert done.out == ""
    for part in (endpoint, CORPUS if "dataset" in name else MODEL, SAMPLE_ADVICE):
        assert part in done.error


@pytest.mark.parametrize(
    "endpoint",
    ["http://127.0.0.1:99999", "http://127.0.0.1:port", "http://[::1", "ftp://hub", "hub.example", "http://a b", ""],
)
def test_an_endpoint_that_is_not_a_url_is_refused(home, endpoint):
    done = fetch("model", endpoint, home)
    assert done.err == f"Error: HF_ENDPOINT: expected an address such as https://huggingface.co, not {endpoint!r}\n"
    assert done.error


# The repository is not as expected


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_error_names_what_the_hub_does_not_have(hub, home, kind):
    assert f"{kind} tiny/none: {hub.url} has none" in fetch(kind, hub.url, home, repo="tiny/none").error
    assert f"no revision {UNKNOWN_COMMIT}" in fetch(kind, hub.url, home, revision=UNKNOWN_COMMIT).error
    # The last is a gated repository: its listing is public, its files need a login.
    for status, path in ((401, "/"), (403, "/"), (404, "/"), (401, "/resolve/")):
        hub.faults[:] = [Fault("status", path, status=status)]
        assert f"`hf auth login` (HTTP {status})" in fetch(kind, hub.url, home).error


@pytest.mark.parametrize(
    ("revision", "advice"),
    [
        ("main", f"write {COMMIT}, which main is now"),
        ("", f"write {COMMIT}, which main is now"),
        (OLD_COMMIT[:7], f"write {OLD_COMMIT}"),
        ("typo", "/datasets/tiny/wikitext/commits/main"),
    ],
)
def test_the_error_for_an_unpinned_revision_suggests_a_commit(hub, home, revision, advice):
    line = fetch("dataset", hub.url, home, revision=revision).error
    assert f"dataset {CORPUS}: expected a full commit hash as its revision, not {revision!r}: " in line
    assert line.endswith(advice)
    assert not list(home.glob("hub/*/snapshots"))


def test_without_a_hub_the_error_names_the_page_of_commits(home, no_hub):
    assert fetch("model", no_hub, home, revision="main").error.endswith(f"see {no_hub}/{MODEL}/commits/main")


def test_pickled_weights_are_refused(hub, home):
    line = fetch("model", hub.url, home, repo=PICKLED).error
    assert "expected *.safetensors" in line and "pytorch_model.bin" in line
    assert not [line for line in hub.requests if ".bin" in line]


def test_a_dataset_of_another_form_is_refused(hub, home):
    assert fetch("dataset", hub.url, home, repo="tiny/two-splits").result.keys() == {"train", "test"}
    assert "only sentence" in fetch("dataset", hub.url, home, repo="tiny/columns").error
    assert "expected one of large, small" in fetch("dataset", hub.url, home, config="smal").error
