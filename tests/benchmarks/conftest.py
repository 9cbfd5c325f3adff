import math
import random
import re
from pathlib import Path

import brute_force
import pytest
from tiny import POSITIONS

from gpt2lora.dataset.tokenizer import load_tokenizer
from gpt2lora.evaluation import protocols


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Two pages of words of few tokens each, so that an untrained model's perplexity per word is not too large."""
    random_words = random.Random(0)
    pages = [" ".join(random_words.choices(("the", "old", "a", "this", ","), k=length)) for length in (150, 30)]
    file = tmp_path_factory.mktemp("text") / "test.txt"
    file.write_text("".join(f" \n = Title {number} = \n \n {page} . \n" for number, page in enumerate(pages)))
    return file


@pytest.fixture(scope="session")
def expected_perplexities(tiny_model, text_file) -> list[float]:
    """The tiny model's perplexities by hf at two strides, and by lm-eval per word; each token is scored by itself."""
    text = text_file.read_text()
    tokenizer = load_tokenizer(tiny_model)
    rows = "\n\n".join("" if line.isspace() else line for line in text.splitlines(keepends=True))
    stream = tokenizer.encode(rows).ids
    perplexities = []
    for stride in (POSITIONS, POSITIONS // 2):
        contexts = brute_force.sliding_contexts(len(stream), POSITIONS, stride)
        nll, ranks = brute_force.score_folder(tiny_model, [stream], [contexts])
        perplexities.append(math.exp(nll / len(ranks)))
    pages = protocols.split_pages(text)
    texts = [[0, *tokenizer.encode(protocols.detokenize(page)).ids] for page in pages]
    contexts = [brute_force.rolling_contexts(len(text), POSITIONS) for text in texts]
    nll, _ = brute_force.score_folder(tiny_model, texts, contexts)
    return [*perplexities, math.exp(nll / sum(len(re.split(r"\s+", page)) for page in pages))]
