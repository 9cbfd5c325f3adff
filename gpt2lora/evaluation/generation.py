"""Generation of text, also by models for which transformers has no cache of the tokens before."""

import torch
from transformers import GenerationConfig

from gpt2lora.model.errors import COMPUTATION_ERRORS, library_errors
from gpt2lora.model.head import base_network
from gpt2lora.pipeline.cli import out_of_memory_advice


def generate(model: torch.nn.Module, ids: torch.Tensor, end: int, **options) -> torch.Tensor:
    """Return `ids` and the ids generated after them, (rows, tokens); after the id `end` a row holds `end` alone.

    Args:
        ids: (rows, tokens) int64, the prompts; none is padded.
        options: of transformers' `generate`. What generation_config.json says does not count: it could change what
            these options mean, return other things than ids, or ask for a cache whose unfilled places are read.

    Raises:
        StageError: the model cannot generate.
    """
    options |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": end, "eos_token_id": end}
    model.generation_config = GenerationConfig()
    try:
        return model.eval().generate(**options)
    except COMPUTATION_ERRORS as error:
        if out_of_memory_advice(error):
            raise
    if streamer := options.get("streamer"):
        streamer.skip_prompt = streamer.next_tokens_are_prompt = True  # the prompt is printed already
    with library_errors(f"{type(base_network(model)).__name__} cannot generate text", "take another model"):
        return model.generate(**options, use_cache=False)
