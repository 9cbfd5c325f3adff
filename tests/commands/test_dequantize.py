"""The command that converts an adapter of 8 or 4 bits into a standard one."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from small_models import IDS, logits, random_adapter, write_gpt2, write_llama
from transformers import AutoModelForCausalLM

from gpt2lora.commands import dequantize
from gpt2lora.model import loading, lora


@pytest.fixture(params=[write_gpt2, write_llama], ids=["gpt2", "llama"])
def base(request, tmp_path) -> Path:
    return request.param(tmp_path / "base")


@pytest.mark.parametrize("changes", [{"bits": 8}, {"bits": 4, "use_dora": True}], ids=str)
def test_a_dequantized_adapter_is_a_standard_one(base, tmp_path, changes):
    network, lora_params, _ = random_adapter(base, **changes)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, lora_params, {}, tmp_path / "adapter")
    loading.write_method(tmp_path / "adapter", "lora", None, base)
    done = CliRunner().invoke(
        dequantize.main, ["--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "standard")]
    )
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "standard").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    by_peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base).to(IDS.device), tmp_path / "standard"
    )
    expected = logits(network)
    torch.testing.assert_close(logits(by_peft), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_standard_adapter_and_an_existing_folder_are_refused(base, tmp_path):
    network, lora_params, _ = random_adapter(base)
    (tmp_path / "adapter").mkdir()
    lora.save_adapter(network, lora_params, {}, tmp_path / "adapter")
    options = ["--adapter", str(tmp_path / "adapter"), "--out"]
    done = CliRunner().invoke(dequantize.main, [*options, str(tmp_path / "standard")])
    assert (done.exit_code, "lora.bits 8 or 4" in done.output) == (1, True)
    assert not (tmp_path / "standard").exists()
    done = CliRunner().invoke(dequantize.main, [*options, str(tmp_path)])
    assert (done.exit_code, "expected the name of a new folder" in done.output) == (1, True)
