"""Continue a prompt with several models at once, token by token, until all have ended or the reader stops them."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue

import torch
from tokenizers import Tokenizer
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gpt2lora.evaluation.generation import generate
from gpt2lora.inference.prompt import DEFAULT_NEW


@dataclass
class Sampling:
    """How the next token is chosen: the options of `gpt2lora generate`."""

    max_new_tokens: int = DEFAULT_NEW
    temperature: float = 1.0
    top_k: int = 50  # 0: all tokens
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    greedy: bool = False
    seed: int = 0


class SampleToken(LogitsProcessor):
    """Leave one token, drawn from a generator of its own: models that run at once would disturb a common one."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class Stopped(StoppingCriteria):
    """End generation after the token during which an event was set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **options) -> torch.Tensor:
        return torch.full((len(ids),), self.event.is_set(), device=ids.device)


class QueueStreamer(TextStreamer):
    """Put each piece of new text into a queue, under the name of its model."""

    def __init__(self, tokenizer: Tokenizer, name: str, queue: Queue):
        super().__init__(tokenizer, skip_prompt=True)
        self.name, self.queue = name, queue

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.queue.put((self.name, text))


def continue_prompt(
    models: dict[str, torch.nn.Module], tokenizer: Tokenizer, ids: list[int], end: int, sampling: Sampling
) -> Iterator[dict[str, str]]:
    """Yield the continuation of each model so far, whenever one has grown; close the iterator to stop the models.

    The same seed gives the same text, that of `gpt2lora generate`.

    Args:
        ids: of the prompt, at least one.
        end: the id that ends a text.

    Raises:
        StageError: a model cannot generate.
    """
    queue: Queue[tuple[str, str | BaseException | None]] = Queue()
    stop = threading.Event()

    def run(name: str, model: torch.nn.Module) -> None:
        result = None
        try:
            generate_into(QueueStreamer(tokenizer, name, queue), model, ids, end, sampling, stop)
        except Exception as error:  # raised where the iterator is read
            result = error
        queue.put((name, result))

    threads = [threading.Thread(target=run, args=item, daemon=True) for item in models.items()]
    texts, running = dict.fromkeys(models, ""), len(threads)
    for thread in threads:
        thread.start()
    try:
        while running:
            name, piece = queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                running -= 1
            elif piece:
                texts[name] += piece
                yield dict(texts)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def generate_into(
    streamer: QueueStreamer,
    model: torch.nn.Module,
    ids: list[int],
    end: int,
    sampling: Sampling,
    stop: threading.Event,
) -> None:
    """Generate after `ids`, and put the text into the streamer, until the text ends or `stop` is set."""
    device = next(model.parameters()).device
    processors = []
    if not sampling.greedy:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
        processors.append(SampleToken(sampling.seed, device))
    generate(
        model,
        torch.tensor([ids], device=device),
        end,
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=False,  # SampleToken samples
        logits_processor=processors,
        stopping_criteria=[Stopped(stop)],
        streamer=streamer,
    )
