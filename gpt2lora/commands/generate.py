"""generate: continue a prompt with the tuned model or with its base.

in   data/base, data/adapter
out  stdout: the prompt and its continuation, without special tokens; stderr: the model and the device
"""

import math
from pathlib import Path

import click

from gpt2lora.inference.prompt import DEFAULT_NEW, SEEDS, choose_length, encode_prompt, read_base
from gpt2lora.pipeline.adapter_files import verify_adapter
from gpt2lora.pipeline.cli import command

BASE, ADAPTER = Path("data/base"), Path("data/adapter")


def reject_nan(context: click.Context, option: click.Parameter, value: float) -> float:
    """Refuse NaN, which click.FloatRange accepts."""
    if math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


@command
@click.argument("prompt")
@click.option("--base", is_flag=True, help="Use the base model, in floats, as before training.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help=f"Fewer if the text ends.  [default: {DEFAULT_NEW}, or what the context has room for]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    callback=reject_nan,
    help="Divides the logits: below 1 makes likely tokens likelier, above 1 unlikely ones.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="Sample among the k likeliest; 0: all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    callback=reject_nan,
    help="Sample among the likeliest that hold this share of the probability.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    callback=reject_nan,
    help="Above 1, tokens that occurred already become less likely.",
)
@click.option("--greedy", is_flag=True, help="Always take the likeliest token: no temperature, top-k, top-p or seed.")
@click.option("--seed", type=click.IntRange(0, SEEDS - 1), default=0, show_default=True, help="Same seed, same text.")
def main(prompt: str, base: bool, max_new_tokens: int | None, greedy: bool, seed: int, **sampling: float) -> None:
    """Continue PROMPT with the tuned model. An empty PROMPT begins a new text. Special tokens are read, not shown."""
    config, tokenizer, end = read_base(BASE)
    ids = encode_prompt(tokenizer, prompt, end)
    max_new_tokens = choose_length(len(ids), max_new_tokens, config)
    if not base:
        verify_adapter(ADAPTER)
    import torch
    from transformers import TextStreamer

    from gpt2lora.evaluation.generation import generate
    from gpt2lora.model import device, loading

    model = loading.load_base(BASE, None, torch.float32) if base else loading.load_tuned(BASE, ADAPTER, torch.float32)
    target = device.pick_device()
    name = "base model" if base else f"tuned model ({loading.read_method(ADAPTER)[0]})"
    click.echo(f"generate: {name} on {device.device_name(target)}, {'greedy' if greedy else f'seed {seed}'}", err=True)
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=target)
    generate(
        model,
        inputs,
        end,
        max_new_tokens=max_new_tokens,
        repetition_penalty=sampling.pop("repetition_penalty"),
        do_sample=not greedy,
        streamer=TextStreamer(tokenizer),
        **({} if greedy else sampling),
    )
