"""The base model of the embedded sample: a GPT-2 of 1M parameters, trained on the standard library's docstrings.

The loop shares nothing with gpt2lora/training on purpose: an edit of the training loop does not remake this model.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2lora.pipeline.cli import echo
from gpt2lora.pipeline.progress_bar import progress_bar
from gpt2lora.sample import corpus

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, POSITIONS, LAYERS, WIDTH, HEADS = 2048, 128, 4, 128, 4
STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP_NORM = 520, 4, 2e-3, 0.05, 0.01, 1.0


def make_sample_model(folder: Path, seed: int) -> None:
    """Write a trained base model, its config and its tokenizer into `folder`, from installed documentation alone."""
    texts = corpus.docstring_articles(corpus.STANDARD_LIBRARY)
    echo(f"base: training the sample's model on {sum(map(len, texts)):,} characters of documentation")
    tokenizer = train_tokenizer(texts)
    end = tokenizer.token_to_id(END_OF_TEXT)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(sample_config(end))
    stream = np.concatenate([[*encoding.ids, end] for encoding in tokenizer.encode_batch_fast(texts)])
    train(model, torch.from_numpy(stream), seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT).save_pretrained(
        folder
    )


def sample_config(end: int = 0) -> GPT2Config:
    """Return the model's configuration. end: id of the end-of-text token."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_layer=LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        bos_token_id=end,
        eos_token_id=end,
        activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer, as GPT-2's (Radford et al., 2019)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train(model: GPT2LMHeadModel, stream: torch.Tensor, seed: int) -> None:
    """Train all weights in fp32 for STEPS steps, each on other blocks: AdamW, linear warm-up, cosine decay to 0.

    Args:
        stream: (tokens,) int64, all texts one after the other. What does not fill the last block is left out.
    """
    blocks = stream[: (len(stream) - 1) // POSITIONS * POSITIONS + 1].unfold(0, POSITIONS + 1, POSITIONS)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))[: STEPS * BATCH_SIZE]
    batches = order.split(BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    warmup = math.ceil(WARMUP * len(batches))
    bar = progress_bar("base", len(batches), "steps", iterable=batches, leave=False)
    for step, rows in enumerate(bar, start=1):
        decay = 0.5 * (1 + math.cos(math.pi * max(0, step - 1 - warmup) / (len(batches) - warmup)))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / warmup, decay)
        logits = model(input_ids=blocks[rows, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), blocks[rows, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
