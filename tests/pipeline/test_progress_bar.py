"""Progress bars: a bar in a terminal, lines in a pipe."""

import io
import sys

import pytest

from gpt2lora.pipeline import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(monkeypatch, stream: io.StringIO) -> str:
    """Count to 40 in four seconds of a clock of our own; return what is written."""
    now = [0.0]
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar.progress_bar("train", 40, "steps", leave=False) as bar:
        bar._time = lambda: now[0]
        for _ in range(40):
            now[0] += 1.0
            bar.set_postfix_str("loss 1.5 nats/token", False)
            bar.update()
    return stream.getvalue()


def test_in_a_pipe_there_is_a_line_every_10_seconds(monkeypatch):
    lines = show(monkeypatch, io.StringIO()).split("\n")
    assert lines.pop() == ""
    assert lines == [
        f"train: {done} of 40 steps, 00:{40 - done:02} left, loss 1.5 nats/token" for done in (10, 20, 30, 40)
    ]


def test_a_terminal_gets_a_bar_that_is_cleared(monkeypatch):
    shown = show(monkeypatch, Terminal())
    assert "train: 100%|" in shown
    assert "\n" not in shown
    assert shown.endswith("\r")
    assert shown.rstrip("\r").endswith(" ")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_what_ends_soon_leaves_nothing_in_a_pipe(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", file := stream())
    assert list(progress_bar.progress_bar("test", 3, "batches", iterable=range(3), leave=False)) == [0, 1, 2]
    assert bool(file.getvalue()) == file.isatty()
