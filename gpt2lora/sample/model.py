"""The base of the embedded sample: a GPT-2 of 1M parameters, trained here on the standard library's docstrings."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2lora.dataset import blocks
from gpt2lora.pipeline.cli import say
from gpt2lora.sample import corpus
from gpt2lora.training.config import Train
from gpt2lora.training.loop import fit

END = "<|endoftext|>"
VOCABULARY, POSITIONS, LAYERS, WIDTH, HEADS = 2048, 128, 4, 128, 4
TRAINING = Train(
    epochs=1,
    batch_size=8,
    accumulation_steps=1,
    learning_rate=4e-3,
    lora_plus_ratio=1.0,
    warmup_fraction=0.05,
    weight_decay=0.01,
    clip_norm=1.0,
    base_dropout=0.0,
    precision="fp32",
    compile="never",
    deterministic=False,
    validations=4,
    checkpoint_every=0,
)


def make(folder: Path, seed: int) -> None:
    """Write a trained base model, config and tokenizer into `folder`, from nothing but installed documentation."""
    texts = corpus.articles(corpus.STANDARD_LIBRARY)
    say(f"base: making the sample's model from {sum(map(len, texts)):,} characters of documentation")
    tokenizer = train_tokenizer(texts)
    end = tokenizer.token_to_id(END)
    encoded = [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(texts)]
    held_out = encoded[49::50]
    rest = [ids for place, ids in enumerate(encoded, start=1) if place % 50]

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=POSITIONS,
            n_layer=LAYERS,
            n_embd=WIDTH,
            n_head=HEADS,
            bos_token_id=end,
            eos_token_id=end,
            activation_function="gelu_pytorch_tanh",
        )
    )
    fit(model, *(blocks.pack(np.concatenate(part), POSITIONS, end) for part in (rest, held_out)), TRAINING, seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE in GPT-2's manner (Radford et al., 2019)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
