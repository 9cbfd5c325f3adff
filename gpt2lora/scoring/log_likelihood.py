"""The log-likelihood of tokens under a model: the computation behind every validation loss and all of `evaluate`."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.distributed import group
from gpt2lora.model.computation_errors import computation_errors
from gpt2lora.model.head import (
    OutputHead,
    autocast,
    body_and_head,
    body_outputs,
    check_head,
    finish_logits,
    to_device,
)
from gpt2lora.pipeline.progress_bar import progress_bar
from gpt2lora.scoring.windows import Windows, block_windows, concatenate_ranges

# Tokens whose logits are held at once. With GPT-2's vocabulary they take 0.1 GB in fp32 on a GPU. On a CPU they take
# 26 MB, which fit its cache, and which malloc reuses instead of asking the kernel for new pages.
CHUNK_TOKENS = {"cuda": 512, "cpu": 128}
BATCH_TOKENS = {"cuda": 32_768, "cpu": 2_048}  # tokens that the model reads at once, unless a batch size is given
# A validation batch has so many rows for each row of a training batch. With fewer, a GPU would wait for Python; more
# fit, since nothing is kept for a backward pass.
VALIDATION_ROWS = {"cuda": 2, "cpu": 1}


@dataclass
class TokenScores:
    """Scores of each scored token, in the order of the windows."""

    nll: np.ndarray  # (tokens,) float64, negative log-likelihood in nats
    ranks: np.ndarray  # (tokens,) int64, how many other tokens the model gives at least as much probability


class ScoringStopped(Exception):
    """A signal ended the scoring before all tokens had a score."""


def validation_loss(
    model: torch.nn.Module,
    blocks: Blocks,
    batch_size: int,
    dtype: torch.dtype,
    label: str,
    stops: Callable[[], bool] | None = None,
) -> float:
    """Return the mean negative log-likelihood of all target tokens of a split, each row by itself, in nats.

    Args:
        batch_size: rows of a training batch. VALIDATION_ROWS times as many are read at once, at most BATCH_TOKENS.
        label: of the progress bar.
        stops: tells before each batch whether to stop; None in a group, whose processes do not stop by themselves.

    Raises:
        ScoringStopped: `stops` returned true.
    """
    device = next(model.parameters()).device
    windows = block_windows(blocks)
    batch_size = min(VALIDATION_ROWS[device.type] * batch_size, max_windows(windows, device))
    # Without this, layers that were compiled for training would be compiled again for the shapes of a validation.
    with torch.compiler.set_stance("force_eager"):
        (nll,) = score_tokens(model, windows, batch_size, dtype, label, (token_nll,), stops)
    return float(nll.mean(dtype=np.float64))


def score_windows(
    model: torch.nn.Module, windows: Windows, batch_size: int | None, dtype: torch.dtype, label: str
) -> TokenScores:
    """Score all windows, `batch_size` at once, or by default as many as hold BATCH_TOKENS tokens."""
    batch_size = batch_size or max_windows(windows, next(model.parameters()).device)
    with computation_errors(model, dtype, "evaluate.precision"):
        check_head(model, int(windows.reads.max()))
        nll, ranks = score_tokens(model, windows, batch_size, dtype, label, (token_nll, token_rank))
    return TokenScores(nll.astype(np.float64), ranks.astype(np.int64))


def max_windows(windows: Windows, device: torch.device) -> int:
    """Return how many windows hold BATCH_TOKENS tokens, at least one."""
    return max(1, BATCH_TOKENS[device.type] // int(windows.reads.max()))


@torch.no_grad()
def score_tokens(
    model: torch.nn.Module,
    windows: Windows,
    batch_size: int,
    dtype: torch.dtype,
    label: str,
    scores: tuple[Callable, ...],
    stops: Callable[[], bool] | None = None,
) -> list[np.ndarray]:
    """Return for each function in `scores`, such as `token_nll`, its value for each scored token, (tokens,).

    The tokens are in the order of the windows. The model is in evaluation mode, and its layers compute in `dtype`.
    Logits are computed in the type of its weights, fp32 or fp64, and only for scored tokens, CHUNK_TOKENS at a time. On
    a GPU in bf16, fp32 logits are computed from factors rounded to TF32. In a group, the batches are dealt out: they do
    not depend on the number of processes, and the scores of all are put together before they are summed.
    """
    device = next(model.parameters()).device
    body, head = body_and_head(model)
    chunk, sample = CHUNK_TOKENS[device.type], next(model.parameters())
    float_type = torch.promote_types(sample.dtype, torch.float32)
    if head is None:
        batch_size = max(1, min(batch_size, chunk // int(windows.reads.max())))  # all logits are held at once
    else:
        weight = head.weight.to(float_type)
        if device.type == "cuda":  # without a multiple of 64 rows, the product is three times as slow
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 64))
    was_training = model.training
    model.eval()
    # The longest windows first: windows of similar length share a batch, and too little memory shows at once.
    order = np.argsort(-windows.lengths, kind="stable")
    batches = np.split(order, range(batch_size, len(order), batch_size))
    # Allocate results at once: many small ones between large logits keep the CPU's memory from being given back.
    counts = windows.counts
    values = torch.zeros(len(scores), int(counts.sum()), dtype=float_type, device=device)
    starts = np.cumsum([0, *(counts[batch].sum() for batch in batches)])  # of each batch's scores in `values`
    own = range(group.rank(), len(batches), group.size())
    with _allow_tf32(device.type == "cuda" and dtype == torch.bfloat16):
        for number in progress_bar(label, len(own), "batches", iterable=own, position=0, leave=False):
            if stops and stops():
                model.train(was_training)
                raise ScoringStopped
            batch, done = batches[number], int(starts[number])
            inputs, positions, targets = (to_device(array, device) for array in window_batch(windows, batch))
            with autocast(sample, dtype):
                outputs = body_outputs(body, inputs)
            scored = outputs.flatten(0, 1)[positions]
            for states, wanted in zip(scored.split(chunk), targets.split(chunk), strict=True):
                logits, vocab_dim = compute_logits(weight, head, states) if head else (states.to(float_type), -1)
                for row, score in enumerate(scores):
                    values[row, done : done + len(states)] = score(logits, wanted.unsqueeze(vocab_dim), vocab_dim)
                done += len(states)
                del logits  # before the next batch is read
    model.train(was_training)
    # Sort the scores from the order of the batches into that of the windows.
    ends = np.cumsum(counts)
    sources = np.empty(ends[-1], np.int64)
    sources[concatenate_ranges((ends - counts)[order], counts[order])] = np.arange(ends[-1])
    return list(group.combine(values).cpu().numpy()[:, sources])


def window_batch(windows: Windows, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the inputs of some windows, the positions that are scored, and their targets, all int64.

    Inputs are (windows, longest window), the prefix included. Shorter windows are padded on the right with tokens that
    are never scored; causal attention needs no mask. Positions and targets are (scored tokens,); positions index the
    flattened inputs.
    """
    starts, skips, counts = windows.starts[batch], windows.skips[batch], windows.counts[batch]
    width, lead = int(windows.reads[batch].max()), len(windows.prefix)
    indices = starts[:, None] + np.arange(width - lead)
    inputs = np.empty((len(batch), width), np.int64)
    inputs[:, :lead] = windows.prefix
    inputs[:, lead:] = windows.ids[np.minimum(indices, len(windows.ids) - 1)]
    targets = windows.ids[concatenate_ranges(starts + skips, counts)].astype(np.int64)
    # The input at position p of a window predicts its id number p + 1 - lead.
    positions = concatenate_ranges(np.arange(len(batch)) * width + lead + skips - 1, counts)
    return inputs, positions, targets


def compute_logits(weight: torch.Tensor, head: OutputHead, states: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the logits of the tokens that follow `states`, and which of their two dimensions is the vocabulary.

    Args:
        weight: that of `head` in fp32 or fp64, (at least vocabulary, width); rows beyond the vocabulary are padding.
        states: (tokens, width).
    """
    states = states.to(weight.dtype)
    if states.device.type == "cpu":  # the transposed product: 1.3 times as fast with MKL
        return finish_logits(weight @ states.T, head, vocab_dim=0), 0
    logits = finish_logits(states @ weight.T, head, vocab_dim=-1)
    logits[:, len(head.weight) :] = -torch.inf
    return logits, -1


def token_nll(logits: torch.Tensor, targets: torch.Tensor, vocab_dim: int) -> torch.Tensor:
    """Return the negative log-likelihood of the targets, (tokens,), in nats.

    On a CPU `log_softmax` over the first dimension sums term after term in fp32, which is off by 4e-4 nats for 262,144
    terms; `logsumexp` sums in pairs.
    """
    at_targets = logits.gather(vocab_dim, targets).squeeze(vocab_dim)
    return logits.logsumexp(vocab_dim) - at_targets


def token_rank(logits: torch.Tensor, targets: torch.Tensor, vocab_dim: int) -> torch.Tensor:
    """Return how many other tokens the model gives at least as much probability as the target, (tokens,) int32."""
    # Sum in int32: for int64, PyTorch first writes all summands as int64.
    return (logits >= logits.gather(vocab_dim, targets)).sum(vocab_dim, dtype=torch.int32) - 1


@contextlib.contextmanager
def _allow_tf32(enabled: bool):
    """Let fp32 matrix products round their factors to TF32 (10 bits of mantissa); they are summed in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if enabled else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
