"""The page of `gpt2lora play` in a headless Chromium, as its readers use it.

These tests need Gradio, Playwright and a Chromium (Debian's package chromium): `make test-web`.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def needs(package: str) -> pytest.MarkDecorator:
    """Skip without a package. It is not imported here: that takes seconds, also for those who run other tests."""
    return pytest.mark.skipif(not find_spec(package), reason=f"needs the package {package}: make test-web")


pytestmark = [
    pytest.mark.slow,
    needs("gradio"),
    needs("playwright"),
    pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt install chromium"),
]

POSITIONS = 2048  # enough that a reader can press Stop
WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_corpus) -> Path:
    """A folder with data/base and data/adapter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("page")
    base = tiny.write_model(folder / "data/base", tiny_corpus, spread=0.1)
    config = GPT2Config.from_pretrained(base, n_positions=POSITIONS)
    config.initializer_range = 0.1
    GPT2LMHeadModel(config).save_pretrained(base)
    tiny.write_adapter(folder / "data/adapter", base)
    return folder


@contextlib.contextmanager
def serving(project: Path, *arguments: str, **variables: str):
    """Run `gpt2lora play`; yield the process and what it printed up to the line with its address."""
    command = [sys.executable, "-m", "gpt2lora", "play", *arguments]
    environment = tiny.environment() | {"PYTHONPATH": str(tiny.ROOT), "PYTHONUNBUFFERED": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    with subprocess.Popen(command, cwd=project, env=environment, **pipes) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "play: open " in line:
                break
        try:
            yield process, lines
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(project) -> str:
    with serving(project) as (_, lines):
        yield re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0]


@pytest.fixture(scope="module")
def browser():
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """A function that opens the page as a new person, and fails the test on an error of the page's own scripts."""
    contexts, errors = [], []

    def open_it():
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.get_by_role("button", name="Continue").wait_for()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert errors == []


def start(page, prompt: str, new: int = 20, **numbers: float) -> None:
    page.locator("#prompt textarea").fill(prompt)
    for label, value in {"New tokens": new, **numbers}.items():
        page.get_by_label(label).first.fill(str(value))
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Continue").click()


def shown(page) -> list[str]:
    return [page.locator(f"#text-{number} textarea").input_value() for number in (0, 1)]


def finished(page) -> list[str]:
    """Return both texts once they have not changed for two seconds."""
    before, since = shown(page), time.monotonic()
    deadline = since + WAIT / 1000
    while time.monotonic() < min(since + 2, deadline) or not all(before):
        page.wait_for_timeout(100)
        if shown(page) != before:
            before, since = shown(page), time.monotonic()
        assert time.monotonic() < deadline, before
    return before


def read(page, text: str) -> None:
    page.get_by_role("tab", name="Read").click()
    page.locator("#text textarea").fill(text)
    page.get_by_role("button", name="Read").click()


def test_a_prompt_is_continued_by_both_models(open_page, project, tmp_path):
    page = open_page()
    start(page, "the river reached")
    base, tuned = finished(page)
    assert base != tuned
    for text, flags in ((base, ["--base"]), (tuned, [])):
        command = [sys.executable, "-m", "gpt2lora", "generate", "the river reached", "--max-new-tokens", "20", *flags]
        printed = tiny.run(project, *command, PYTHONPATH=str(tiny.ROOT))
        assert text.strip() in printed
    picture = tmp_path / "continue.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000


def test_the_seed_decides_the_text(open_page):
    page = open_page()
    texts = []
    for seed in (0, 7, 0):
        start(page, "the river", Seed=seed)
        page.wait_for_timeout(1000)
        texts.append(finished(page))
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize("prompt", ["", "a 🦆 swims"], ids=["empty", "emoji"])
def test_any_prompt_is_continued(open_page, prompt):
    page = open_page()
    start(page, prompt)
    assert all(finished(page))


def test_a_prompt_that_is_too_long_is_refused_in_one_line(open_page):
    page = open_page()
    start(page, ("the river reached the old town . " * 700)[:20_000])
    page.get_by_text("the model has 2,048 positions: shorten the prompt").first.wait_for()
    assert shown(page) == ["", ""]


def test_stop_ends_both_texts_in_the_midst(open_page):
    page = open_page()
    start(page, "the river", new=POSITIONS // 2 - 1)
    page.wait_for_function("[0, 1].every(n => document.querySelector(`#text-${n} textarea`).value.length > 20)")
    page.get_by_role("button", name="Stop").click()
    page.wait_for_timeout(1000)
    texts = shown(page)
    page.wait_for_timeout(3000)
    assert shown(page) == texts
    whole = open_page()
    start(whole, "the river", new=POSITIONS // 2 - 1)
    assert all(long.startswith(short) and long != short for long, short in zip(finished(whole), texts, strict=True))


def test_two_people_at_once_get_the_texts_that_each_gets_alone(open_page):
    prompts = ["the river", "the old town"]
    alone = []
    for prompt in prompts:
        page = open_page()
        start(page, prompt, new=300)
        alone.append(finished(page))
    pages = [open_page(), open_page()]
    for page, prompt in zip(pages, prompts, strict=True):
        start(page, prompt, new=300)
    assert [finished(page) for page in pages] == alone


def test_a_text_is_read_by_both_models(open_page, tmp_path):
    page = open_page()
    text = 'The river reached\n\n🦆 <b>"boats"</b>.'
    read(page, text)
    page.locator("#surprise-1 .surprise").wait_for()
    for number, name in ((0, "base"), (1, "tuned")):
        panel = page.locator(f"#surprise-{number}")
        assert re.search(rf"{name}.*: perplexity [\d,.]+ \([\d.]+ nats/token, \d+ tokens\)", panel.inner_text())
        assert panel.locator(".surprise").text_content() == text.replace("\n", "↵\n")
        colors = panel.locator(".surprise span").evaluate_all("all => all.map(each => each.style.background)")
        assert len(set(colors)) > 3
    picture = tmp_path / "read.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000


def test_texts_begin_as_the_tokenizer_begins_them(browser, project, tmp_path):
    base = tiny.write_begin_of_text(tmp_path / "data/base", project / "data/base", f"{tiny.END} {tiny.END} $A")
    tiny.write_adapter(tmp_path / "data/adapter", base)
    text = "the river reached"
    command = [sys.executable, "-m", "gpt2lora", "generate", text, "--base", "--max-new-tokens", "20"]
    printed = tiny.run(tmp_path, *command, PYTHONPATH=str(tiny.ROOT))
    ids = torch.tensor([AutoTokenizer.from_pretrained(base)(text).input_ids])
    assert ids[0, :2].tolist() == [0, 0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits[0]
    loss = float(torch.nn.functional.cross_entropy(logits[1:-1], ids[0, 2:]))
    with serving(tmp_path) as (_, lines):
        page = browser.new_page()
        page.set_default_timeout(WAIT)
        page.goto(re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0])
        start(page, text)
        assert finished(page)[0].strip() in printed
        read(page, text)
        page.locator("#surprise-0 .surprise").wait_for()
        assert f"({loss:.4f} nats/token, " in page.locator("#surprise-0").inner_text()
        page.close()


def test_a_long_text_is_read_and_an_empty_one_refused(open_page):
    page = open_page()
    read(page, "")
    page.get_by_text("there is no text: type or paste one").first.wait_for()
    read(page, ("the river reached the old town . " * 700)[:20_000])
    page.locator("#surprise-1 .surprise").wait_for()
    assert len(page.locator("#surprise-1 .surprise").text_content()) == 20_000


def test_what_others_continue_does_not_change_what_is_read(open_page):
    def perplexity() -> str:
        page = open_page()
        read(page, f"one{tiny.END}two")
        return page.locator("#surprise-0 p").inner_text()

    first = perplexity()
    page = open_page()
    start(page, "the river")
    finished(page)
    assert perplexity() == first


def test_a_seed_out_of_range_is_refused_and_leaves_no_earlier_text(open_page):
    page = open_page()
    start(page, "the river")
    finished(page)
    start(page, "the river", Seed=-1)
    page.get_by_text("Seed: expected an integer from 0 to 4,294,967,295, not -1").first.wait_for()
    assert shown(page) == ["", ""]


def test_the_page_asks_no_other_machine_for_anything(browser, url):
    context = browser.new_context()
    page = context.new_page()
    hosts = set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else "inline"))
    page.goto(url)
    page.get_by_role("button", name="Continue").wait_for()
    start(page, "the river")
    finished(page)
    context.close()
    assert hosts - {"inline"} == {url.split("/")[2]}


def test_it_listens_on_this_machine_alone_whatever_the_environment_says(project):
    variables = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_ANALYTICS_ENABLED": "True"}
    proxies = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    with serving(project, **variables, **proxies) as (process, lines):
        assert re.fullmatch(r"play: open http://127\.0\.0\.1:\d+/ on this machine \(.*\); Ctrl-C ends it\n", lines[-1])
        assert listening_addresses(process.pid) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().split() == ["play:", "ended"]
    assert process.returncode == 0


def test_ctrl_c_while_models_compute_ends_it_at_once(project, browser):
    with serving(project) as (process, lines):
        context = browser.new_context()
        page = context.new_page()
        page.goto(re.search(r"http://127\.0\.0\.1:\d+/", lines[-1])[0])
        page.get_by_role("button", name="Continue").wait_for()
        start(page, "the river", new=POSITIONS // 2)
        page.wait_for_function("document.querySelector('#text-0 textarea').value.length > 20")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stdout.read().split() == ["play:", "ended"]
        context.close()


def listening_addresses(pid: int) -> set[str]:
    """Return the IPv4 addresses on which a process listens; it listens on none of IPv6."""
    own = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = set()
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:  # 0A: listening
                address = bytes.fromhex(fields[1].split(":")[0])[::-1]
                found.add(".".join(map(str, address)) if kind == "tcp" else "IPv6")
    return found


def test_a_port_that_is_taken_is_refused_in_one_line(project, url):
    port = url.rstrip("/").rpartition(":")[2]
    with serving(project, "--port", port) as (process, lines):
        assert process.wait(60) == 1
    assert lines[-1] == f"Error: port {port} of 127.0.0.1: Address already in use: give another --port\n"
