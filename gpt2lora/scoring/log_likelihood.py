"""The likelihood of every token that windows score: the one computation behind every figure of `evaluate`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from gpt2lora.dataset.blocks import Rows
from gpt2lora.model.head import autocast, body_and_head, check_head, put
from gpt2lora.scoring.windows import Windows, of_rows, spans

# Tokens whose logits are held at once. With GPT-2's vocabulary that is 0.1 GB in fp32 on a GPU; on a CPU it is 26 MB,
# which fit its cache, and which malloc reuses instead of asking the kernel for fresh pages.
CHUNKS = {"cuda": 512, "cpu": 128}
BATCHES = {"cuda": 32_768, "cpu": 2_048}  # tokens read at once, where no number of windows is asked for
# Rows that a validation reads at once, for each that training does. A GPU would wait for Python with fewer, and takes
# less memory all the same, since nothing is kept for a backward pass.
ROWS = {"cuda": 2, "cpu": 1}


@dataclass
class Likelihood:
    """Of each scored token, in the order of the windows."""

    nll: np.ndarray  # (tokens,) float64, nats
    ranks: np.ndarray  # (tokens,) int64: how many other tokens the model gives at least as much probability


def loss(model: torch.nn.Module, rows: Rows, batch_size: int, dtype: torch.dtype, label: str) -> float:
    """Return the mean negative log-likelihood of every predicted token of a split, each row by itself, nats.

    Args:
        batch_size: rows of a batch of training. ROWS times as many are read at once, or as many as hold the device's
            number of tokens in BATCHES, if that is less.
    """
    device = next(model.parameters()).device
    windows = of_rows(rows)
    batch_size = min(ROWS[device.type] * batch_size, fitting(windows, device))
    with torch.compiler.set_stance("force_eager"):  # or layers compiled for training would be so again, for this
        (nll,) = of_each_token(model, windows, batch_size, dtype, label, (nll_of,))
    return float(nll.mean(dtype=np.float64))


def likelihood(
    model: torch.nn.Module, windows: Windows, batch_size: int | None, dtype: torch.dtype, label: str
) -> Likelihood:
    """Score every window, `batch_size` at once or as many as fill the device's number of tokens in BATCHES."""
    check_head(model, int(windows.lengths.max()) - 1)
    batch_size = batch_size or fitting(windows, next(model.parameters()).device)
    nll, ranks = of_each_token(model, windows, batch_size, dtype, label, (nll_of, rank_of))
    return Likelihood(nll.astype(np.float64), ranks.astype(np.int64))


def fitting(windows: Windows, device: torch.device) -> int:
    """Return how many windows hold the device's number of tokens, one at least."""
    return max(1, BATCHES[device.type] // int(windows.lengths.max() - 1))


@torch.no_grad()
def of_each_token(
    model: torch.nn.Module,
    windows: Windows,
    batch_size: int,
    dtype: torch.dtype,
    label: str,
    figures: tuple[Callable, ...],
) -> list[np.ndarray]:
    """Return figures, such as `nll_of`, of each scored token, each (tokens,), in the order of the windows.

    The model is in evaluation mode meanwhile. Its layers compute in `dtype`, the logits in the type of its weights,
    fp32 or fp64, and only where they are scored, a chunk of tokens at a time. On a GPU in bf16, fp32 logits are
    computed from factors rounded to TF32.
    """
    device = next(model.parameters()).device
    body, head = body_and_head(model)
    chunk, weight = CHUNKS[device.type], head.weight.to(torch.promote_types(head.weight.dtype, torch.float32))
    vocabulary = len(weight)
    if device.type == "cuda":  # a multiple of 64 rows, or the product takes a path that is three times as slow
        weight = F.pad(weight, (0, 0, 0, -vocabulary % 64))
    was_training = model.training
    model.eval()
    # The longest first: windows of like length share a batch, and memory that is too small shows at once.
    order = np.argsort(-windows.lengths, kind="stable")
    parts = np.split(order, range(batch_size, len(order), batch_size))
    found: list[list[torch.Tensor]] = [[] for _ in figures]
    with _tf32(device.type == "cuda" and dtype == torch.bfloat16):
        for places in tqdm(parts, label, unit="batch", position=0, leave=False):
            inputs, scored, targets = (put(array, device) for array in batch(windows, places))
            with autocast(head, dtype):
                hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
            states = hidden.flatten(0, 1)[scored]
            for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
                logits, across = logits_of(weight, vocabulary, part)
                for values, figure in zip(found, figures, strict=True):
                    values.append(figure(logits, wanted.unsqueeze(across), across))
                del logits  # before the next batch is read
    model.train(was_training)
    # Back from the order of the batches into that of the windows.
    ends = np.cumsum(windows.counts)
    places = np.empty(ends[-1], np.int64)
    places[spans((ends - windows.counts)[order], windows.counts[order])] = np.arange(ends[-1])
    return [torch.cat(values).cpu().numpy()[places] for values in found]


def batch(windows: Windows, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the inputs of some windows, where they are scored, and the ids that are wanted there, all int64.

    Inputs are (batch, longest window). Behind a shorter one stands whatever comes next: a causal model never looks
    ahead, and nothing is scored there, so no attention mask is needed. The other two are (scored tokens,), the
    first counted through the flattened inputs.
    """
    lengths, skips, counts = windows.lengths[places], windows.skips[places], windows.counts[places]
    width = int(lengths.max()) - 1
    ids = windows.starts[places][:, None] + np.arange(width)
    inputs = windows.ids[np.minimum(ids, len(windows.ids) - 1)]
    wanted = windows.ids[spans(windows.starts[places] + skips, counts) + 1]
    scored = spans(np.arange(len(places)) * width + skips, counts)
    return inputs.astype(np.int64), scored, wanted.astype(np.int64)


def logits_of(weight: torch.Tensor, vocabulary: int, states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the logits of the tokens that follow these states, and which of its two dimensions is the vocabulary.

    Only the first `vocabulary` rows of `weight` belong to a token.
    """
    states = states.to(weight.dtype)
    if states.device.type == "cpu":
        return weight @ states.T, 0  # the same product transposed: 1.3 times as fast with MKL
    logits = states @ weight.T
    logits[:, vocabulary:] = -torch.inf
    return logits, -1


def nll_of(logits: torch.Tensor, wanted: torch.Tensor, across: int) -> torch.Tensor:
    """Return the negative log-likelihood of the wanted tokens, (tokens,), nats."""
    return -logits.log_softmax(across).gather(across, wanted).squeeze(across)


def rank_of(logits: torch.Tensor, wanted: torch.Tensor, across: int) -> torch.Tensor:
    """Return how many other tokens the model gives at least as much probability, (tokens,) int32."""
    # Not in int64: PyTorch first writes all of what it sums in the type of the sum.
    return (logits >= logits.gather(across, wanted)).sum(across, dtype=torch.int32) - 1


@contextlib.contextmanager
def _tf32(on: bool):
    """Let matrix products of fp32 factors round them to TF32: 10 bits of mantissa, sums in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
