"""The likelihood of every token that windows score: the one computation behind every figure of `evaluate`."""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from stages.rows import Rows
from stages.scoring import autocast, body_and_head, check_head, put
from stages.windows import Windows, of_rows, spans

# Tokens whose logits are held at once. With GPT-2's vocabulary that is 0.1 GB in fp32 on a GPU; on a CPU it is 26 MB,
# which fit its cache, and which malloc reuses instead of asking the kernel for fresh pages.
CHUNKS = {"cuda": 512, "cpu": 128}
BATCHES = {"cuda": 32_768, "cpu": 2_048}  # tokens read at once, where no number of windows is asked for


@dataclass
class Likelihood:
    """Of each scored token, in the order of the windows."""

    nll: np.ndarray  # (tokens,) float64, nats
    ranks: np.ndarray  # (tokens,) int64: how many other tokens the model gives at least as much probability


@dataclass
class Score:
    """Sums over all predicted tokens of a split."""

    nll: float  # nats
    correct: int  # targets that are the model's first choice
    tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens


def score(model: torch.nn.Module, rows: Rows, batch_size: int, dtype: torch.dtype, label: str) -> Score:
    """Score every predicted token of a split once, each row by itself, as it is trained.

    Args:
        batch_size: rows read at once, or fewer where those hold more than the device's number of tokens in BATCHES.
    """
    windows = of_rows(rows)
    batch_size = min(batch_size, fitting(windows, next(model.parameters()).device))
    with torch.compiler.set_stance("force_eager"):  # or layers compiled for training would be so again, for this
        found = likelihood(model, windows, batch_size, dtype, label)
    return Score(float(found.nll.sum()), int((found.ranks == 0).sum()), len(found.nll))


def fitting(windows: Windows, device: torch.device) -> int:
    """Return how many windows hold the device's number of tokens, one at least."""
    return max(1, BATCHES[device.type] // int(windows.lengths.max() - 1))


@torch.no_grad()
def likelihood(
    model: torch.nn.Module, windows: Windows, batch_size: int | None, dtype: torch.dtype, label: str
) -> Likelihood:
    """Score every window, `batch_size` at once, in evaluation mode, and put the model back into its mode.

    Without a `batch_size`, as many windows are read at once as fill the device's number of tokens in BATCHES.
    The layers compute in `dtype`, the logits in the type of the model's weights, fp32 or fp64, and only where they
    are scored, a chunk of tokens at a time. On a GPU in bf16, fp32 logits are computed from factors rounded to TF32.
    """
    device = next(model.parameters()).device
    body, head = body_and_head(model)
    chunk, weight = CHUNKS[device.type], head.weight.to(torch.promote_types(head.weight.dtype, torch.float32))
    vocabulary = len(weight)
    if device.type == "cuda":  # a multiple of 64 rows, or the product takes a path that is three times as slow
        weight = F.pad(weight, (0, 0, 0, -vocabulary % 64))
    nll = torch.empty(int(windows.counts.sum()), dtype=weight.dtype, device=device)
    ranks = torch.empty(len(nll), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    check_head(model, int(windows.lengths.max()) - 1)
    # The longest first: windows of like length share a batch, and memory that is too small shows at once.
    order = np.argsort(-windows.lengths, kind="stable")
    batch_size = batch_size or fitting(windows, device)
    parts = np.split(order, range(batch_size, len(order), batch_size))
    done = 0
    with _tf32(device.type == "cuda" and dtype == torch.bfloat16):
        for places in tqdm(parts, label, unit="batch", position=0, leave=False):
            inputs, scored, targets = (put(array, device) for array in batch(windows, places))
            with autocast(head, dtype):
                hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
            states = hidden.flatten(0, 1)[scored]
            for part, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
                part_of = slice(done, done + len(wanted))
                nll[part_of], ranks[part_of] = score_tokens(weight, vocabulary, part, wanted)
                done += len(wanted)
    model.train(was_training)
    # Back from the order of the batches into that of the windows.
    ends = np.cumsum(windows.counts)
    places = spans((ends - windows.counts)[order], windows.counts[order])
    found = Likelihood(np.empty(done), np.empty(done, np.int64))
    found.nll[places], found.ranks[places] = nll.cpu().numpy(), ranks.cpu().numpy()
    return found


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


def score_tokens(
    weight: torch.Tensor, vocabulary: int, states: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return negative log-likelihood and rank of some tokens, each (tokens,), from the states they are predicted by.

    Only the first `vocabulary` rows of `weight` belong to a token.
    """
    states, across = states.to(weight.dtype), -1
    if states.device.type == "cpu":
        logits, across = weight @ states.T, 0  # the same product transposed: 1.3 times as fast with MKL
    else:
        logits = states @ weight.T
        logits[:, vocabulary:] = -torch.inf
    wanted = wanted.unsqueeze(across)
    nll = -logits.log_softmax(across).gather(across, wanted)
    # In int32: PyTorch first writes all of what it sums in the type of the sum.
    ranks = (logits >= logits.gather(across, wanted)).sum(across, dtype=torch.int32) - 1
    return nll.squeeze(across), ranks


@contextlib.contextmanager
def _tf32(on: bool):
    """Let matrix products of fp32 factors round them to TF32: 10 bits of mantissa, sums in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
