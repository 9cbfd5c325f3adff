"""play: a page on this machine that shows base and tuned model side by side, until Ctrl-C.

in   data/base, data/adapter
out  http://127.0.0.1:PORT, for programs of this machine alone
"""

import importlib.util
import os
import socket
import threading
from pathlib import Path

import click

from gpt2lora.dataset.tokenizer import text_prefix
from gpt2lora.inference.prompt import read_base
from gpt2lora.pipeline.adapter_files import verify_adapter
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.context import MAX_DEFAULT, max_context

BASE, ADAPTER = Path("data/base"), Path("data/adapter")
ADDRESS = "127.0.0.1"


@command
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 7860, or the next one that is free.")
def main(port: int | None) -> None:
    """Open a page to continue prompts, and to read a text's surprises, with the base and the tuned model."""
    if importlib.util.find_spec("gradio") is None:
        raise StageError("play needs the package gradio: pip install -c constraints.txt -e '.[web]'")
    check_port(port)
    config, tokenizer, end = read_base(BASE)
    verify_adapter(ADAPTER)
    context = min(max_context(config) or MAX_DEFAULT, MAX_DEFAULT)
    stay_on_this_machine()
    echo("play: loading the models")
    import torch

    from gpt2lora.inference import page
    from gpt2lora.model import device, loading

    tuned = loading.load_tuned(BASE, ADAPTER, torch.float32)
    networks = {
        "base": loading.load_base(BASE, None, torch.float32),
        f"tuned ({loading.read_method(ADAPTER)[0]})": tuned,
    }
    models = page.Models(networks, tokenizer, config, text_prefix(tokenizer), end, context)
    url = page.launch(page.build_page(models), ADDRESS, port)
    echo(f"play: open {url} on this machine ({device.device_name(device.pick_device())}); Ctrl-C ends it")
    wait_for_interrupt()
    echo("play: ended")
    os._exit(0)  # Python's own end aborts if a thread still computes


def check_port(port: int | None) -> None:
    """Refuse a port that is taken, before the models are loaded."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, port or 0))
        except OSError as error:
            raise StageError(f"port {port} of {ADDRESS}: {error.strerror}: give another --port") from error


def stay_on_this_machine() -> None:
    """Set what Gradio and the hub's client read when they are imported: no telemetry, no hub, no proxy."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ADDRESS  # else Gradio looks for its own page through a proxy


def wait_for_interrupt() -> None:
    """Return when the user presses Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        echo("")
