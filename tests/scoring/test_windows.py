"""Windows: each token is scored once, from as many tokens before it as the protocol gives it."""

import brute_force
import numpy as np
import pytest

from gpt2lora.dataset import blocks
from gpt2lora.scoring import windows

CONTEXT, VOCABULARY = 12, 50
LENGTHS = (0, 1, 2, 3, 11, 12, 13, 14, 25, 37)
TEXTS = [np.random.default_rng(length).integers(VOCABULARY, size=length).astype(np.uint16) for length in LENGTHS]


@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
def test_sliding_windows_score_each_token_once(stride):
    sliding = windows.sliding_windows(TEXTS, CONTEXT, stride)
    assert sliding.contexts.tolist() == [
        context for length in LENGTHS for context in brute_force.sliding_contexts(length, CONTEXT, stride)
    ]
    assert sliding.targets.tolist() == [id for text in TEXTS for id in text[1:]]
    assert sliding.lengths.max() <= CONTEXT + 1
    assert sliding.counts.min() >= 1


def test_rolling_windows_score_each_token_once_and_end_full():
    rolling = windows.rolling_windows(TEXTS, CONTEXT)
    assert rolling.contexts.tolist() == [
        context for length in LENGTHS for context in brute_force.rolling_contexts(length, CONTEXT)
    ]
    assert rolling.targets.tolist() == [id for text in TEXTS for id in text[1:]]
    assert brute_force.rolling_contexts(2 * CONTEXT + 4, CONTEXT)[-4:] == [12, 10, 11, 12]


@pytest.mark.parametrize("texts", [[], [TEXTS[0]], [TEXTS[1]], TEXTS[:2]], ids=["none", "empty", "one token", "both"])
def test_texts_without_a_target_have_no_window(texts):
    for empty in (windows.sliding_windows(texts, CONTEXT, 3), windows.rolling_windows(texts, CONTEXT)):
        assert (len(empty), empty.counts.sum(), len(empty.targets), len(empty.contexts)) == (0, 0, 0, 0)


@pytest.mark.parametrize("length", LENGTHS[2:])
def test_a_stride_of_the_context_gives_the_blocks_of_training(length):
    stream = TEXTS[LENGTHS.index(length)]
    packed = blocks.pack_blocks(stream, CONTEXT, pad=0)
    assert windows.unpack_stream(packed, ()).tolist() == stream.tolist()
    sliding, training = windows.sliding_windows([stream], CONTEXT, CONTEXT), windows.block_windows(packed)
    assert sliding.lengths.tolist() == training.lengths.tolist()
    assert sliding.targets.tolist() == training.targets.tolist()
    assert (sliding.skips == 1).all()


@pytest.mark.parametrize("prefix", [(7,), (8, 9)], ids=str)
@pytest.mark.parametrize("stride", range(1, CONTEXT + 1))
def test_with_a_prefix_the_first_token_is_scored_too(prefix, stride):
    sliding = windows.sliding_windows(TEXTS, CONTEXT, stride, prefix)
    assert sliding.targets.tolist() == [id for text in TEXTS for id in text]
    assert sliding.reads.max() <= CONTEXT
    assert sliding.counts.min() >= 1
    assert sliding.contexts.min() == len(prefix)
    if stride == 1:  # every other token has as many before it as fit
        longest = windows.sliding_windows([TEXTS[-1]], CONTEXT, 1, prefix).contexts
        assert longest.tolist() == [min(len(prefix) + index, CONTEXT) for index in range(len(TEXTS[-1]))]


@pytest.mark.parametrize("prefix", [(7,), (8, 9)], ids=str)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_with_a_prefix_a_stride_of_the_context_gives_the_blocks(length, prefix):
    stream = TEXTS[LENGTHS.index(length)]
    packed = blocks.pack_blocks(stream, CONTEXT, 0, prefix)
    assert windows.unpack_stream(packed, prefix).tolist() == stream.tolist()
    sliding = windows.sliding_windows([stream], CONTEXT, CONTEXT, prefix)
    training = windows.block_windows(packed)
    assert sliding.targets.tolist() == training.targets.tolist() == stream.tolist()
    assert sliding.contexts.tolist() == training.contexts.tolist()
