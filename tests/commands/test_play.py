"""The command play without its page: what it needs, and what it says without it."""

import importlib.util
import socket

from click.testing import CliRunner

from gpt2lora.commands import play


def play_errors(*arguments: str) -> str:
    result = CliRunner().invoke(play.main, arguments, catch_exceptions=False)
    assert result.exit_code, result.output
    return result.output


def test_without_gradio_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = play_errors().splitlines()
    assert line.startswith("Error: play needs the package gradio: pip install ")
    assert line.endswith("'.[web]'")


def test_elsewhere_one_line_says_where_to_run_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.chdir(tmp_path)
    (line,) = play_errors().splitlines()
    assert line.startswith("Error: data/base") and "run it from the repository's root" in line


def test_a_port_that_is_none_is_refused():
    assert "Invalid value for '--port'" in play_errors("--port", "70000")


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        expected = f"Error: port {port} of 127.0.0.1: Address already in use: give another --port\n"
        assert play_errors("--port", str(port)) == expected
