"""generate: a prompt, continued by the tuned model or by its base.

in   data/base, data/adapter
out  the prompt and its continuation on stdout, as the tokens come; which model on which device on stderr
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpt2lora.dataset.tokenizer import end_of_text, load_tokenizer, longest_context
from gpt2lora.pipeline.artifacts import read_json, unchanged
from gpt2lora.pipeline.cli import Stop, stage

if TYPE_CHECKING:
    from tokenizers import Tokenizer


BASE, ADAPTER = Path("data/base"), Path("data/adapter")


def number(context: click.Context, option: click.Parameter, value: float) -> float:
    if math.isnan(value):  # which is outside no range
        raise click.BadParameter("nan is not a number")
    return value


@stage
@click.argument("prompt")
@click.option("--base", is_flag=True, help="Ask the base model in floats, as it was before training.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="Fewer if the text ends."
)
@click.option(
    "--temperature",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    callback=number,
    help="Divides the logits: below 1 the likely tokens gain, above 1 the unlikely ones.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="Draw among the k likeliest; 0: all."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    callback=number,
    help="Draw among the likeliest that hold this share of the probability.",
)
@click.option(
    "--repetition-penalty",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    callback=number,
    help="Above 1, tokens that occurred already lose.",
)
@click.option("--greedy", is_flag=True, help="Always the likeliest token: no temperature, top-k, top-p or seed.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Same seed, same text.")
def main(prompt: str, base: bool, max_new_tokens: int, greedy: bool, seed: int, **sampling: float) -> None:
    """Continue PROMPT with the tuned model. An empty PROMPT begins a new text."""
    unchanged(BASE, "base")
    config = read_json(BASE / "config.json", "base", "vocab_size")
    tokenizer = load_tokenizer(BASE)
    end = end_of_text(BASE, config, tokenizer)
    ids = encode(tokenizer, prompt) or [end]  # each text but a corpus's first follows the end of another
    check_length(len(ids), max_new_tokens, config)
    import torch
    from transformers import TextStreamer

    from gpt2lora.model import device, loading

    network = loading.load_base(BASE, None, torch.float32) if base else loading.load_tuned(BASE, ADAPTER, torch.float32)
    place = device.pick_device()
    name = "base model" if base else f"tuned model ({loading.load_method(ADAPTER)[0]})"
    click.echo(f"generate: {name} on {device.describe(place)}, {'greedy' if greedy else f'seed {seed}'}", err=True)
    torch.manual_seed(seed)
    inputs = torch.tensor([ids], device=place)
    network.eval().generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        pad_token_id=end,
        eos_token_id=end,
        max_new_tokens=max_new_tokens,
        repetition_penalty=sampling.pop("repetition_penalty"),
        do_sample=not greedy,
        streamer=TextStreamer(tokenizer),
        **({} if greedy else sampling),
    )


def encode(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """Return the ids of a prompt, in which the characters <|endoftext|>, unlike in a corpus, are the token."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise Stop("the prompt is not UTF-8") from error
    tokenizer.encode_special_tokens = False
    return tokenizer.encode(prompt, add_special_tokens=False).ids


def check_length(prompt: int, new: int, config: dict) -> None:
    positions = longest_context(config) or math.inf
    if prompt + new > positions:
        advice = f"at most --max-new-tokens {positions - prompt}" if prompt < positions else "shorten the prompt"
        raise Stop(
            f"{prompt:,} tokens of the prompt and {new:,} new ones are {prompt + new:,}, the model has {positions:,} "
            f"positions: {advice}"
        )


if __name__ == "__main__":
    main()
