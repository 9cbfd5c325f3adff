"""Blocks of token ids: packed streams, padded texts, and their files."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2lora.dataset import blocks

PAD = 9999
streams = st.integers(0, 200).map(lambda length: np.arange(length, dtype=np.uint16))


@given(streams, st.integers(1, 50))
def test_every_token_of_a_stream_but_the_first_is_a_target_once(stream, block_size):
    packed = blocks.pack_blocks(stream, block_size, PAD)
    assert packed.ids.shape == (len(packed), block_size + 1)
    inputs = [ids[: length - 1] for ids, length in zip(packed.ids, packed.lengths, strict=True)]
    targets = [ids[1:length] for ids, length in zip(packed.ids, packed.lengths, strict=True)]
    assert np.concatenate([*inputs, stream[:0]]).tolist() == stream[:-1].tolist()
    assert np.concatenate([*targets, stream[:0]]).tolist() == stream[1:].tolist()
    assert packed.targets == max(0, len(stream) - 1)


@given(streams, st.integers(1, 50))
def test_only_the_last_packed_row_is_padded(stream, block_size):
    packed = blocks.pack_blocks(stream, block_size, PAD)
    assert (packed.lengths[:-1] == block_size + 1).all()
    assert (packed.lengths >= 2).all()
    padding = np.arange(block_size + 1) >= packed.lengths[:, None]
    assert (packed.ids[padding] == PAD).all()
    assert (packed.ids[~padding] != PAD).all()


@given(streams, st.integers(2, 50), st.sampled_from([(7,), (7, 8)]))
def test_with_a_prefix_every_token_of_a_stream_is_a_target_once(stream, block_size, prefix):
    packed = blocks.pack_blocks(stream, block_size, PAD, prefix)
    assert packed.ids.shape == (len(packed), block_size + 1)
    assert (packed.ids[:, : len(prefix)] == prefix).all()
    rows = [ids[len(prefix) : length] for ids, length in zip(packed.ids, packed.lengths, strict=True)]
    assert np.concatenate([*rows, stream[:0]]).tolist() == stream.tolist()
    assert packed.targets == len(stream)


@given(st.lists(st.integers(1, 30), max_size=8), st.integers(2, 20))
def test_with_a_prefix_a_padded_row_holds_it_and_one_text(lengths, block_size):
    texts = [np.arange(length, dtype=np.uint16) for length in lengths]
    padded = blocks.pad_texts(texts, block_size, PAD, (7, 8))
    for ids, length, text in zip(padded.ids, padded.lengths, texts, strict=True):
        assert ids.tolist() == [7, 8, *text[: block_size - 1], *[PAD] * (block_size + 1 - length)]
    assert padded.targets == sum(min(length, block_size - 1) for length in lengths)


@given(st.lists(st.integers(2, 30), max_size=8), st.integers(1, 20))
def test_a_padded_row_holds_one_text_truncated_to_the_row(lengths, block_size):
    texts = [np.arange(length, dtype=np.uint16) for length in lengths]
    padded = blocks.pad_texts(texts, block_size, PAD)
    assert padded.ids.shape == (len(texts), block_size + 1)
    for ids, length, text in zip(padded.ids, padded.lengths, texts, strict=True):
        assert length == min(len(text), block_size + 1)
        assert ids.tolist() == text[:length].tolist() + [PAD] * (block_size + 1 - length)


@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.data())
def test_every_token_of_a_row_but_the_first_counts_as_a_target(lengths, data):
    split = blocks.pad_texts([np.zeros(length, np.uint16) for length in lengths], 8, PAD)
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True))
    assert split.count_targets(np.array(rows, dtype=int)) == sum(lengths[row] - 1 for row in rows)
    assert split.targets == sum(lengths) - len(lengths)


def test_saved_blocks_are_loaded_unchanged(tmp_path):
    saved = blocks.pack_blocks(np.arange(100, dtype=np.uint32), 16, PAD)
    blocks.save_blocks(saved, tmp_path, "test")
    loaded = blocks.load_blocks(tmp_path, "test", ())
    assert loaded.ids.dtype == np.uint32
    assert (loaded.ids == saved.ids).all()
    assert (loaded.lengths == saved.lengths).all()
    assert isinstance(loaded.ids, np.memmap)


@given(streams, st.integers(2, 30), st.integers(1, 40), st.booleans(), st.sampled_from([(), (7,), (7, 8)]))
def test_a_stream_packed_in_pieces_gives_the_same_files(tmp_path_factory, stream, block_size, size, four_bytes, prefix):
    folder, dtype = tmp_path_factory.mktemp("rows"), np.uint32 if four_bytes else np.uint16
    stream = stream.astype(dtype)
    blocks.save_blocks(blocks.pack_blocks(stream, block_size, PAD, prefix), folder, "at_once")
    pieces = (stream[start : start + size] for start in range(0, len(stream), size))
    packed = blocks.pack_stream(pieces, block_size, PAD, prefix)
    blocks.save_stream(packed, block_size + 1, dtype, folder, "in_pieces")
    for suffix in ("", ".lengths"):
        assert (folder / f"in_pieces{suffix}.npy").read_bytes() == (folder / f"at_once{suffix}.npy").read_bytes()


def test_ids_have_two_bytes_if_the_vocabulary_fits():
    assert [blocks.token_dtype(size) for size in (300, 50_257, 65_536, 65_537)] == [np.uint16] * 3 + [np.uint32]
