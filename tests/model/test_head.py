"""The check that a model does not look ahead."""

import pytest
from small_models import load, write_bloom

from gpt2lora.model import attention, head
from gpt2lora.pipeline.cli import StageError


def test_bloom_looks_ahead_with_our_attention_not_with_its_own(tmp_path):
    network = load(write_bloom(tmp_path))
    assert network.config._attn_implementation != attention.ATTENTION_NAME
    head.check_head(network, width=8)
    network.config._attn_implementation = attention.ATTENTION_NAME  # for which Bloom makes no mask
    with pytest.raises(StageError, match=r"^Bloom\w+ looks ahead"):
        head.check_head(network, width=8)
