"""The page itself, in Gradio: the tab Continue, and the tab Read."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import gradio
import torch
from tokenizers import Tokenizer

from gpt2lora.inference.continuation import Sampling, continue_prompt
from gpt2lora.inference.prompt import SEEDS, count_room, encode_prompt
from gpt2lora.inference.surprise import draw_legend, draw_surprise, measure_surprise
from gpt2lora.pipeline.cli import StageError, out_of_memory_advice
from gpt2lora.pipeline.context import max_context

MAX_NEW = 4096  # new tokens of a model whose config names no longest context
READERS = 4  # people whose requests run at once; others wait in line
CSS = """
.surprise {white-space: pre-wrap; overflow-wrap: anywhere; background: white; color: black; padding: 0.5em;
  line-height: 1.6; font-size: 15px; border-radius: 4px}
.surprise span {box-shadow: inset -1px 0 white}
.legend span {display: inline-block; width: 10em; height: 0.8em; border: 1px solid gray}
"""
# The fonts of the reader's system: Gradio's own themes load theirs from Google.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


@dataclass
class Models:
    """What the page shows: models by their names, the base first, and what they read."""

    networks: dict[str, torch.nn.Module]
    tokenizer: Tokenizer
    config: dict  # config.json
    prefix: list[int]  # ids that the tokenizer puts before each text
    end: int  # the id that ends a text
    context: int  # tokens of a window in Read


def build_page(models: Models) -> gradio.Blocks:
    """Return the page, which its caller launches with `FONTS` and `CSS`."""
    with gradio.Blocks(title="gpt2lora play", analytics_enabled=False) as page:
        with gradio.Tab("Continue"):
            add_continue(models)
        with gradio.Tab("Read"):
            add_read(models)
    return page


def launch(page: gradio.Blocks, address: str, port: int | None) -> str:
    """Serve the page in the background; return its URL.

    Args:
        port: None for 7860, or the next one that is free.

    Raises:
        StageError: no port is free.
    """
    theme = gradio.themes.Default(**FONTS)
    # Each of these is also a variable of the environment, which must not open the page to others.
    options = {"share": False, "ssr_mode": False, "mcp_server": False, "enable_monitoring": False, "pwa": False}
    try:
        _, url, _ = page.launch(
            server_name=address,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            theme=theme,
            css=CSS,
            **options,
        )
    except OSError as error:
        raise StageError(f"no port of {address} is free ({error}): give a --port") from error
    return url


def add_continue(models: Models) -> None:
    """Add a prompt, both continuations side by side, and the options of sampling."""
    prompt = gradio.Textbox(label="Prompt", lines=3, placeholder="Empty: begin a new text", elem_id="prompt")
    with gradio.Row():
        start = gradio.Button("Continue", variant="primary", scale=4)
        stop = gradio.Button("Stop", variant="stop", scale=1)
    with gradio.Row():
        outputs = [
            gradio.Textbox(label=name, lines=10, max_lines=20, interactive=False, elem_id=f"text-{number}")
            for number, name in enumerate(models.networks)
        ]
    options = add_options(models.config)

    def run(text: str, *values) -> Iterator[list[str]]:
        yield [""] * len(outputs)
        with shown_errors():
            sampling = read_sampling(*values)
            ids = encode_prompt(models.tokenizer, text or "", models.end)
            sampling.max_new_tokens = min(sampling.max_new_tokens, count_room(len(ids), models.config))
            for texts in continue_prompt(models.networks, models.tokenizer, ids, models.end, sampling):
                yield list(texts.values())

    running = gradio.on(
        [start.click, prompt.submit],
        run,
        [prompt, *options],
        outputs,
        concurrency_limit=READERS,
        show_progress="minimal",
        api_visibility="private",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def add_options(config: dict) -> list[gradio.components.Component]:
    """Add the options of sampling, in the order of the fields of `Sampling`; return them."""
    default, most = Sampling(), max_context(config) or MAX_NEW
    with gradio.Row():
        upper = [
            gradio.Slider(1, most - 1, min(most - 1, default.max_new_tokens), step=1, label="New tokens, at most"),
            gradio.Slider(0.01, 2, default.temperature, step=0.01, label="Temperature"),
            gradio.Slider(0, 1000, default.top_k, step=1, label="Top k (0: all)"),
        ]
    with gradio.Row():
        lower = [
            gradio.Slider(0.01, 1, default.top_p, step=0.01, label="Top p"),
            gradio.Slider(1, 3, default.repetition_penalty, step=0.05, label="Repetition penalty"),
            gradio.Checkbox(default.greedy, label="Greedy: always the likeliest token", container=True),
            gradio.Number(default.seed, precision=0, label="Seed, the same for both models"),
        ]
    return upper + lower


def add_read(models: Models) -> None:
    """Add a text, and its tokens coloured by how surprising they are to each model."""
    text = gradio.Textbox(label="Text", lines=6, elem_id="text", placeholder="Type or paste a text")
    start = gradio.Button("Read", variant="primary")
    gradio.HTML(draw_legend())
    with gradio.Row():
        outputs = [gradio.HTML(elem_id=f"surprise-{number}") for number in range(len(models.networks))]

    def run(text: str) -> list[str]:
        with shown_errors():
            surprise = measure_surprise(
                models.networks, models.tokenizer, text or "", models.prefix, models.end, models.context
            )
            return [draw_surprise(surprise, name) for name in models.networks]

    start.click(run, text, outputs, concurrency_limit=READERS, show_progress="minimal", api_visibility="private")


def read_sampling(*values: float | None) -> Sampling:
    """Return the values of `add_options`; a browser sends 1.0 as the integer 1."""
    if None in values:
        raise StageError("an option is empty: give a number")
    new, temperature, top_k, top_p, penalty, greedy, seed = values
    if not 0 <= seed < SEEDS:
        raise StageError(f"Seed: expected an integer from 0 to {SEEDS - 1:,}, not {seed:,}")
    return Sampling(int(new), float(temperature), int(top_k), float(top_p), float(penalty), greedy, int(seed))


@contextlib.contextmanager
def shown_errors() -> Iterator[None]:
    """Show an error that the reader can mend in the page, as the line that a command would print."""
    try:
        yield
    except StageError as error:
        raise gradio.Error(error.format_message(), print_exception=False, title="") from error
    except (RuntimeError, MemoryError) as error:
        if advice := out_of_memory_advice(error):
            raise gradio.Error(f"out of memory {advice}", print_exception=False, title="") from error
        raise
