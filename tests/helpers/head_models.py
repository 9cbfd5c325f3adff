"""Small models whose output head does more than a matrix product: it scales or caps the logits."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# Model types, and the changes of their configuration; other keys are in `write_head_model`.
HEADS = [
    ("gemma2", {"final_logit_softcapping": 2.0}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 5.0}),
    ("hyperclovax", {"logits_scaling": 0.3}),
    ("phi", {}),  # a bias
]


def write_head_model(kind: str, changes: dict) -> PreTrainedModel:
    """Return a model of one layer with 50 tokens, and weights so large that a cap or scale shows in the logits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = CONFIG_MAPPING[kind](
        vocab_size=50,
        num_hidden_layers=1,
        initializer_range=0.5,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
        **({"head_dim": 16} if kind.startswith("gemma") else {}),
        **changes,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model
