"""The model card, and the name of the base in adapter_config.json: what others need to load an adapter elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from hub_server import Hub
from huggingface_hub import ModelCard

from gpt2lora.pipeline.schemas import QuantizationParams
from gpt2lora.training import model_card

COMMIT = "1" * 40
HUB_BASE = {"model": "tiny/gpt2", "revision": COMMIT}
HUB_DATA = {"dataset": "tiny/wikitext", "config": "wikitext-2-raw-v1", "revision": COMMIT}
NF4 = QuantizationParams(bits=4, quant_type="nf4", double_quant=True)
RECORD = {
    "trainable_parameters": 10,
    "frozen_parameters": 90,
    "steps": 3,
    "tokens": 1000,
    "start_validation_loss": 2.0,
    "best_validation_loss": 1.0,
    "best_step": 3,
}


def folder_from(path: Path, source: dict | None) -> Path:
    """Make a folder with a manifest that says where its content came from."""
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"source": source, "files": {}}))
    return path


def write_card(
    folder: Path, base: dict | None, data: dict | None, method="lora", quantization=None, config=None, **lora
) -> str:
    folders = folder_from(folder / "base", base), folder_from(folder / "tokens", data)
    (folder / "base/config.json").write_text(json.dumps(config or {}))
    arguments = method, quantization, tiny.low_rank(**lora), tiny.train_params(), RECORD
    model_card.write_card(folder, *folders, *arguments)
    return (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (HUB_BASE, ("tiny/gpt2", COMMIT)),
        ({"model": "/home/me/model", "revision": None}, ("/home/me/model", None)),
        (None, ("BASE", None)),  # of the sample, or of a folder that another program wrote
    ],
)
def test_the_adapter_names_where_its_base_is_to_be_had(tmp_path, source, expected):
    base = folder_from(tmp_path / "base", source)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"r": 4, "base_model_name_or_path": str(base), "revision": None}))
    model_card.name_base(tmp_path, base)
    config = json.loads(file.read_text())
    assert (config["base_model_name_or_path"].replace(str(base), "BASE"), config["revision"]) == expected
    assert config["r"] == 4


def test_the_figures_and_the_license_are_where_the_hub_reads_them(tmp_path):
    licensed = HUB_BASE | {"license": {"license": "other", "license_name": "mine"}}
    card = ModelCard(write_card(tmp_path, licensed, HUB_DATA), ignore_metadata_errors=False)
    assert (card.data.license, card.data.license_name, card.data.model_name) == ("other", "mine", "gpt2-lora")
    found = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in found.items()} == {"loss": 1.0, "perplexity": 2.7183}
    each = found["perplexity"]
    assert (each.task_type, each.dataset_type, each.dataset_split) == ("text-generation", "tiny/wikitext", "validation")
    assert (each.dataset_config, each.dataset_revision) == ("wikitext-2-raw-v1", COMMIT)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize("base", [None, {"model": "/my model", "revision": None}])
@pytest.mark.parametrize("data", [None, {"dataset": "/texts/a, b.txt", "revision": None}])
def test_a_card_of_what_is_not_on_the_hub_names_no_ids(tmp_path, base, data):
    found = ModelCard(write_card(tmp_path, base, data), ignore_metadata_errors=False).data
    assert (found.base_model, found.datasets) == (None, None)
    assert {each.dataset_name for each in found.eval_results} == {"a, b.txt" if data else "unknown"}


def test_a_card_of_a_hub_s_model_names_everything(tmp_path):
    card = write_card(tmp_path, HUB_BASE, HUB_DATA)
    data = ModelCard(card).data
    assert (data.base_model, data.base_model_relation, data.datasets) == ("tiny/gpt2", "adapter", ["tiny/wikitext"])
    assert (data.library_name, data.pipeline_tag, data.tags) == ("peft", "text-generation", ["lora"])
    assert "license" not in card
    assert "\n---\n\n# A LoRA adapter for gpt2\n" in card
    assert f"| base | `tiny/gpt2`, at commit `{COMMIT}` of the hub |" in card
    assert f"| data | `tiny/wikitext`, wikitext-2-raw-v1, at commit `{COMMIT}` of the hub |" in card
    assert "| method | rank 4, alpha 8, dropout 0, all-linear |" in card
    assert "| validation perplexity | 7.39 before training, 2.72 after |" in card
    assert f'AutoTokenizer.from_pretrained("tiny/gpt2", revision="{COMMIT}")' in card


def test_a_card_says_what_transformers_does_to_rwkv_s_weights(tmp_path):
    for rescale_every, expected in ((6, True), (0, False)):
        folder = tmp_path / str(rescale_every)
        folder.mkdir()
        card = write_card(folder, HUB_BASE, HUB_DATA, config={"rescale_every": rescale_every})
        assert ("model.config.rescale_every = 0" in card) == expected


def test_a_card_of_a_folder_names_no_repository_of_the_hub(tmp_path):
    card = write_card(tmp_path, {"model": "/home/me/model", "revision": None}, {"dataset": "own.txt"})
    assert "base_model:" not in card and "datasets:" not in card
    assert "| base | `/home/me/model` |" in card
    assert "The base is a folder of the machine that trained" in card


def test_a_card_survives_a_strange_path_and_a_loss_beyond_all_perplexities(tmp_path, monkeypatch):
    monkeypatch.setitem(RECORD, "start_validation_loss", 1000.0)
    card = write_card(tmp_path, {"model": "/a|b\n\"c'", "revision": None}, {"dataset": "own|text.txt"})
    assert "| base | `/a\\|b \"c'` |\n| data | `own\\|text.txt` |\n" in card
    assert "| validation perplexity | above 1e307 before training, 2.72 after |" in card
    compile(re.search(r"```python\n(.*?)```", card, re.S)[1], "card", "exec")


def test_a_card_of_the_sample_says_that_its_base_is_here_alone(tmp_path):
    card = write_card(tmp_path, {"model": None, "revision": None}, {"dataset": "sample"})
    assert f"This base exists only where the run was made: as `{tmp_path}/base`" in card
    assert f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path}/adapter")' in card


@pytest.mark.parametrize(
    ("method", "quantization", "lora", "expected"),
    [
        ("qlora", NF4, {}, ("on a base in 4 bits (nf4)", "load_in_4bit=True", 'quant_type="nf4"')),
        (
            "qlora",
            replace(NF4, bits=8, double_quant=False),
            {},
            ("on a base in 8 bits |", "BitsAndBytesConfig(load_in_8bit=True)"),
        ),
        ("lora", None, {"bits": 8}, ("the adapter itself in 8 bits", "First run `gpt2lora dequantize --out FOLDER`")),
        ("lora", None, {"use_dora": True, "init": "pissa"}, ("DoRA, init pissa",)),
        ("full", None, {}, ("| method | all weights |", "AutoModelForCausalLM.from_pretrained(", "transformers\n")),
    ],
)
def test_a_card_says_how_each_method_is_loaded(tmp_path, method, quantization, lora, expected):
    card = write_card(tmp_path, HUB_BASE, HUB_DATA, method, quantization, **lora)
    assert all(text in card for text in expected)
    compile(re.search(r"```python\n(.*?)```", card, re.S)[1], "card", "exec")


@pytest.mark.slow
def test_the_card_s_code_loads_the_adapter_in_another_folder(training_folder, tiny_model, tmp_path):
    """The base comes from a hub, and the tuned model is the one that `evaluate` loads."""
    import torch
    from training_runs import run_stage

    from gpt2lora.model import loading
    from stages import train

    manifest = json.loads(Path("data/base/manifest.json").read_text())
    Path("data/base/manifest.json").write_text(json.dumps(manifest | {"source": HUB_BASE}))
    tokens = json.loads(Path("data/tokens/manifest.json").read_text())
    tokens["base"] = {name: digest for name, digest in tokens["base"].items() if name != "manifest.json"}
    Path("data/tokens/manifest.json").write_text(json.dumps(tokens))
    run_stage(train.main)
    tuned = loading.load_tuned(Path("data/base"), Path("data/adapter"), torch.float32).eval()
    ids = torch.arange(32)[None]
    expected = tuned(input_ids=ids).logits

    elsewhere = shutil.copytree("data/adapter", tmp_path / "elsewhere")
    code = re.search(r"```python\n(.*?)```", (elsewhere / "README.md").read_text(), re.S)[1]
    code += "import torch\ntorch.save(model.eval()(input_ids=torch.arange(32)[None]).logits, 'logits.pt')\n"
    with Hub({"models/tiny/gpt2": {COMMIT: tiny_model, "2" * 40: tmp_path}}) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=elsewhere, env=os.environ | settings, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(elsewhere / "logits.pt"), expected, atol=1e-4, rtol=1e-4)
