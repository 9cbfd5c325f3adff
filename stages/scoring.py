"""The negative log-likelihood of token rows under a model: the loss that is trained, and the one that is reported."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from stages.command import Stop
from stages.cross_entropy import IGNORED, LinearCrossEntropy
from stages.rows import Rows

CHUNK = 2048  # tokens whose logits are held at once while scoring


@dataclass
class Score:
    """Sums over all predicted tokens of a split."""

    nll: float  # nats
    correct: int  # targets that are the model's first choice
    tokens: int

    @property
    def loss(self) -> float:
        return self.nll / self.tokens


def batch(rows: Rows, places: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets of some rows, both (batch, longest row - 1) int64; padding is IGNORED in targets.

    No attention mask is needed: padding stands last, and a causal model never looks ahead.
    """
    lengths = torch.from_numpy(rows.lengths[places]).long()
    ids = torch.from_numpy(rows.ids[places].astype(np.int64))[:, : int(lengths.max())]
    padding = torch.arange(1, ids.shape[1]) >= lengths[:, None]
    targets = ids[:, 1:].masked_fill(padding, IGNORED)
    return ids[:, :-1].contiguous().to(device, non_blocking=True), targets.to(device, non_blocking=True)


def nll_sum(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the summed negative log-likelihood of the targets in nats, fp32, with gradients."""
    body, head = body_and_head(model)
    with autocast(head, dtype):
        states = body(input_ids=inputs, use_cache=False).last_hidden_state
    return LinearCrossEntropy.apply(states.flatten(0, 1), head.weight, targets.flatten(), dtype)


def autocast(head: torch.nn.Linear, dtype: torch.dtype) -> torch.autocast:
    """Let layers compute in `dtype`; weights that are held in it need no casts."""
    return torch.autocast(head.weight.device.type, dtype, enabled=dtype == torch.bfloat16 != head.weight.dtype)


def body_and_head(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Linear]:
    """Return what makes states of tokens, adapters included, and the head that makes logits of states."""
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return network.base_model, network.get_output_embeddings()


@torch.no_grad()
def check_head(model: torch.nn.Module) -> None:
    """Stop at a model that does more to its logits than its last layer does: a bias, a scale or a cap, say."""
    body, head = body_and_head(model)
    inputs = torch.arange(min(8, len(head.weight)), device=head.weight.device)[None]
    was_training = model.training
    model.eval()
    whole = model(input_ids=inputs, use_cache=False).logits.float()
    ours = body(input_ids=inputs, use_cache=False).last_hidden_state.to(head.weight.dtype) @ head.weight.T
    model.train(was_training)
    if (ours.float() - whole).abs().max() > 1e-3 * whole.abs().max():
        name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
        raise Stop(f"{name} does more to its logits than its last layer does: expected a model like GPT-2 or Llama")


@torch.no_grad()
def score(model: torch.nn.Module, rows: Rows, batch_size: int, dtype: torch.dtype, label: str) -> Score:
    """Score every predicted token of a split once, in evaluation mode, and put the model back into its mode.

    The layers compute in `dtype`; logits in fp32, a chunk of tokens at a time; sums in fp64.
    """
    device = next(model.parameters()).device
    body, head = body_and_head(model)
    weight = head.weight.float()
    nll = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    parts = np.split(np.arange(len(rows)), range(batch_size, len(rows), batch_size))
    for places in tqdm(parts, label, unit="batch", position=0, leave=False):
        inputs, targets = batch(rows, places, device)
        with autocast(head, dtype):
            hidden = body(input_ids=inputs, use_cache=False).last_hidden_state
        scored = targets != IGNORED
        for states, wanted in zip(hidden[scored].split(CHUNK), targets[scored].split(CHUNK), strict=True):
            logits = states.float() @ weight.T
            nll += F.cross_entropy(logits, wanted, reduction="none").double().sum()
            correct += (logits.argmax(-1) == wanted).sum()
    model.train(was_training)
    return Score(float(nll), int(correct), rows.targets)
