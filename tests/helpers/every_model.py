"""A small model of every type that transformers maps to a causal language model, for the tests of all of them."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, POSITIONS, WIDTH, HEADS = 300, 64, 128, 8
EXPERTS, STATE = 4, 16  # STATE: of a recurrent layer; also the width of a sliding window
MAX_PARAMETERS = 35_000_000  # a type whose sizes cannot be set is larger
# Keys of config.json by the names of their values: those that a configuration has are set.
KEYS = {
    "width": """hidden_size d_model n_embd emb_dim decoder_hidden_size embedding_size word_embed_proj_dim dim
        lru_width""",
    "two": """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_key_value_heads n_mamba_heads num_experts_per_tok moe_k moe_top_k""",
    "heads": """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads""",
    "head width": """head_dim kv_lora_rank q_lora_rank v_head_dim mamba_d_head mamba_head_dim""",
    "mlp": """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff dff d_inner""",
    "expert": """moe_intermediate_size shared_expert_intermediate_size""",
    "experts": """num_experts num_local_experts n_routed_experts moe_num_experts""",
    "one": """n_group topk_group mamba_n_groups""",
    "mamba heads": """mamba_n_heads mamba_num_heads""",
    "state": """mamba_d_state ssm_state_size state_size sliding_window attention_window_size window_size
        qk_rope_head_dim qk_nope_head_dim rotary_dim""",
    "positions": """max_position_embeddings n_positions n_ctx max_seq_len""",
}
VALUES = {
    "width": WIDTH,
    "two": 2,
    "heads": HEADS,
    "head width": WIDTH // HEADS,
    "mlp": 2 * WIDTH,
    "expert": WIDTH // 2,
    "experts": EXPERTS,
    "one": 1,
    "mamba heads": 2 * WIDTH // (WIDTH // HEADS),
    "state": STATE,
    "positions": POSITIONS,
}
SIZES = {key: VALUES[name] for name, keys in KEYS.items() for key in keys.split()}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
LAYER_TYPES = ("layer_types", "layers_block_type", "mlp_layer_types")
DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
PER_LAYER_INPUTS = {"vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
# What a type needs beside or instead of SIZES.
CHANGES = {
    "bert": {"is_decoder": True},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 2 * WIDTH},
    "gemma3n": PER_LAYER_INPUTS,
    "gemma3n_text": PER_LAYER_INPUTS,
    "gemma4": PER_LAYER_INPUTS,
    "gemma4_text": PER_LAYER_INPUTS,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "helium": {"head_dim": WIDTH // HEADS},
    "hunyuan_v1_dense": DEFAULT_ROPE | {"head_dim": WIDTH // HEADS},
    "hunyuan_v1_moe": DEFAULT_ROPE | {"head_dim": WIDTH // HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": HEADS, "head_dim": 2 * WIDTH // HEADS},
    "ministral": DEFAULT_ROPE | {"head_dim": WIDTH // HEADS},
    "nemotron": {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS},
    "prophetnet": {"num_hidden_layers": None},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "zaya": {"num_experts_per_tok": 1},
}
LATENT_ATTENTION = """axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa
    kimi_linear longcat_flash minicpm3 youtu"""  # whose head_dim is that of the rotary part
CHANGES |= {kind: {"head_dim": STATE, "num_key_value_heads": HEADS} for kind in LATENT_ATTENTION.split()}
CHANGES["deepseek_v2"] |= {"num_experts_per_tok": 2}
# Types that have no small model: transformers maps them, but does not build a model of their configuration alone; they
# have no fixed context; or parts of fixed size make them larger than MAX_PARAMETERS.
NOT_BUILT = set(
    """blt cohere_compass_text dbrx dots3_note dots3_note_text emu3 gemma4_assistant git longcat_flash mllama musicgen
    musicgen_melody phi4_multimodal qwen4_exp qwen4_exp_text xlnet xmod zamba""".split()  # noqa: SIM905
)


def small_config(kind: str) -> PreTrainedConfig:
    """Return the configuration of a small model of a type: two layers, or one of each kind of layer."""
    default = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    values = {key: value for key, value in SIZES.items() if _is_set(default, key)} | TOKENS
    for key in LAYER_TYPES:
        if _is_set(default, key):
            kinds = list(dict.fromkeys(getattr(default, key)))
            values[key] = (kinds * 2)[: max(2, len(kinds))]
            values |= {name: len(values[key]) for name in ("num_hidden_layers", "n_layer") if name in values}
    changes = CHANGES.get(kind, {})
    values = {key: value for key, value in (values | changes).items() if value is not None}
    return type(default)(**values)


def _is_set(config: PreTrainedConfig, key: str) -> bool:
    """Tell whether a configuration has a value at a key that can be changed."""
    kind_of = getattr(type(config), type(config).attribute_map.get(key, key), None)
    if isinstance(kind_of, property) and kind_of.fset is None:
        return False
    try:
        return getattr(config, key, None) is not None
    except Exception:  # values that differ from layer to layer
        return False


def write_small_model(kind: str, folder: Path, tokenizer: Path) -> Path:
    """Write a small model of a type with random weights, and the tokenizer of another folder.

    Raises:
        Exception: transformers cannot build or run it at this size.
    """
    config = small_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size:,} parameters although its sizes are set")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        assert model(input_ids=torch.arange(1, 33)[None], use_cache=False).logits.shape == (1, 32, VOCABULARY)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


ALL_TYPES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
