"""Protocol lm-eval against lm-evaluation-harness itself, on a tiny GPT-2 and a tiny Llama whose texts begin with <bos>.

These tests need the package lm-eval: `make test-peers`.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny import write_begin_of_text
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gpt2lora.evaluation import protocols
from gpt2lora.evaluation.metrics import compute_metrics
from gpt2lora.model.loading import load_base
from gpt2lora.scoring.log_likelihood import score_windows

lm_eval = pytest.importorskip("lm_eval", reason="needs the package lm-eval: make test-peers")

CONTEXT = 64
pytestmark = pytest.mark.slow


@pytest.fixture(params=["gpt2", "llama"])
def model(request, tmp_path, tiny_model) -> Path:
    """A folder with a model; the Llama's tokenizer begins a text with a token, as the post-processor says."""
    if request.param == "gpt2":
        return tiny_model
    folder = write_begin_of_text(tmp_path / "llama", tiny_model)
    config = AutoModelForCausalLM.from_pretrained(tiny_model).config
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    return folder


def harness_metrics(model: Path, pages: list[str], folder: Path) -> dict[str, float]:
    """Run the harness's own task `wikitext` on pages read from a file."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext import preprocess_wikitext

    file = folder / "pages.jsonl"
    file.write_text("".join(json.dumps({"page": page}) + "\n" for page in pages), encoding="utf-8")
    task = ConfigurableTask(
        config={
            "task": "wikitext",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
            "process_results": preprocess_wikitext.process_results,
            "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        }
    )
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # Without add_bos_token=False the harness scores <bos> as the first token of each page, too, after its own <bos>.
    wrapped = HFLM(
        pretrained=network, tokenizer=tokenizer, max_length=CONTEXT, device="cpu", add_bos_token=False, batch_size=4
    )
    results = simple_evaluate(model=wrapped, tasks=[task], bootstrap_iters=0)["results"]["wikitext"]
    return {name: results[f"{name},none"] for name in ("word_perplexity", "bits_per_byte")}


def test_word_perplexity_and_bits_per_byte_are_the_harness_own(model, tmp_path, tiny_corpus):
    text = (tiny_corpus / "test.txt").read_text(encoding="utf-8")
    manifest = {"end_of_text_id": 0, "prefix": [], "block_size": CONTEXT, "special_tokens": False}
    task = protocols.build_task("lm-eval", CONTEXT, manifest, text, Path(), model)
    scores = score_windows(load_base(model, None, torch.float32), task.windows, None, torch.float32, "")
    ours = compute_metrics(scores, task)
    theirs = harness_metrics(model, protocols.split_pages(text), tmp_path)
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4 / 4)
