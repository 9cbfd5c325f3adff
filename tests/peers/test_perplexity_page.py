"""Protocol hf against the loop of transformers' documentation, https://huggingface.co/docs/transformers/perplexity."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols
from gpt2lora.model.loading import load_base
from gpt2lora.scoring.log_likelihood import score_windows

CONTEXT = 64
pytestmark = pytest.mark.slow


def page_loss(model: torch.nn.Module, ids: torch.Tensor, stride: int) -> float:
    """Return the mean loss in nats as that page computes it."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + CONTEXT, ids.shape[1])
        inputs = ids[:, begin:end]
        labels = inputs.clone()
        labels[:, : previous_end - end] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        weight = int((labels != -100).sum()) - 1
        total, count, previous_end = total + float(loss) * weight, count + weight, end
        if end == ids.shape[1]:
            break
    return total / count


@pytest.mark.parametrize("stride", [16, 40])
@pytest.mark.parametrize("prefix", [[], [0]], ids=["no prefix", "bos"])
def test_hf_is_the_page_s_loop_but_for_the_weights_of_its_windows(tiny_model, tiny_corpus, stride, prefix):
    text = (tiny_corpus / "test.txt").read_text(encoding="utf-8")
    # A window of the page has as many tokens as inputs here, and one of them is only a target.
    task = protocols.hf_task(text, load_tokenizer(tiny_model), CONTEXT - 1, stride, prefix)
    scores = score_windows(load_base(tiny_model, None, torch.float32), task.windows, None, torch.float32, "")
    means = [part.mean() for part in np.split(scores.nll, np.cumsum(task.windows.counts)[:-1])]
    weights = task.windows.counts - 1
    weights[0] += 1  # the page's first window cannot predict its first token, and weighs what it predicts
    rows = "\n\n".join(protocols.hub_rows(text))
    ids = torch.tensor([prefix + load_tokenizer(tiny_model).encode(rows, add_special_tokens=False).ids])
    expected = page_loss(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), ids, stride)
    assert len(ids[0]) - 1 == len(scores.nll)
    assert np.average(means, weights=weights) == pytest.approx(expected, rel=1e-6)
    assert scores.nll.mean() == pytest.approx(expected, rel=0.02)
