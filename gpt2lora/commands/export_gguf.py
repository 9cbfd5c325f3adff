"""Write a model as one GGUF file, for llama.cpp and Ollama, with a Modelfile beside it, and read the file back.

Names of tensors and keys are those of the package gguf, and of llama.cpp's converter, whose file of the same model
computes the same. What a GGUF file cannot express is refused, by the base's files alone, before anything is loaded.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2lora.dataset.tokenizer import end_of_text_id, load_tokenizer, text_prefix
from gpt2lora.pipeline.artifacts import read_json
from gpt2lora.pipeline.cli import StageError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedModel

GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # the same function, that of llama.cpp's gpt2
ROPE_TYPES = ("default", "linear", "llama3")  # each divides the frequencies by constant factors
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # of GPT-2's Conv1D, which holds (in, out)
BLOCK = 32  # values of a row that share a scale in Q8_0
LLAMA3_SPLIT = (  # the pattern of Llama 3's tokenizer, llama.cpp's "llama-bpe"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def check_base(base: Path) -> None:
    """Refuse a base whose architecture or tokenizer a GGUF file cannot express.

    Raises:
        StageError: says what is missing; also if the package gguf is.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise StageError("--gguf needs the package gguf: pip install 'gguf>=0.17', or '.[gguf]' here") from error
    if reason := unsupported_model(read_json(base / "config.json", "base", "model_type", "vocab_size")):
        raise StageError(f"--gguf writes GPT-2- and Llama-like models, and {base} has {reason}: leave --gguf out")
    content = read_json(base / "tokenizer.json", "base", "model")
    if reason := unsupported_tokenizer(content):
        raise StageError(f"--gguf: llama.cpp has no tokenizer with {reason}, as {base} has: leave --gguf out")
    if len(prefix := text_prefix(load_tokenizer(base))) > 1:
        raise StageError(f"--gguf: llama.cpp puts one token before a text at most, {base} has {len(prefix)}")


def unsupported_model(config: dict) -> str | None:
    """Return what llama.cpp's gpt2 and llama lack of a model, None if nothing."""
    kind = config["model_type"]
    if kind == "gpt2":
        others = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
        wrong = [f"{key} {config[key]}" for key, value in others.items() if config.get(key, value) != value]
        activation = config.get("activation_function", "gelu_new")
        return next(iter(wrong), None if activation in GELUS else f"activation_function {activation}")
    if kind not in ("llama", "mistral"):
        return f"model_type {kind}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    others = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}
    wrong = [f"{key} {config[key]}" for key, value in others.items() if config.get(key, value) != value]
    return next(iter(wrong), None if rope_type in ROPE_TYPES else f"rope_type {rope_type}")


def unsupported_tokenizer(content: dict) -> str | None:
    """Return what llama.cpp's byte-level BPE lacks of a tokenizer.json, None if nothing."""
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre_tokenizer(content) is None:
        return "another splitting of words than GPT-2's or Llama 3's byte-level BPE"
    if content.get("normalizer"):
        return f"a normalizer ({content['normalizer'].get('type')})"
    if bool(model.get("ignore_merges")) != (pre_tokenizer(content) == "llama-bpe"):
        return f"ignore_merges {model.get('ignore_merges')}"
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            return f"{key} {model[key]}"
    strips = ("lstrip", "rstrip", "single_word")
    odd = [token["content"] for token in content.get("added_tokens", ()) if any(token.get(key) for key in strips)]
    return f"spaces stripped beside {odd[0]}" if odd else None


def pre_tokenizer(content: dict) -> str | None:
    """Return llama.cpp's name for how a tokenizer.json splits a text into words, None if it has none."""
    found = content.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers") if found.get("type") == "Sequence" else [found]
    *splits, last = parts or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not splits:
        return "gpt-2" if last.get("use_regex", True) else None
    known = len(splits) == 1 and splits[0].get("pattern") == {"Regex": LLAMA3_SPLIT}
    return "llama-bpe" if known and splits[0].get("behavior") == "Isolated" and not last.get("use_regex") else None


def write_gguf(network: "PreTrainedModel", base: Path, kind: str, file: Path) -> int:
    """Write a model in fp32, with the tokenizer of `base`, as a GGUF file; return its number of tensors.

    Args:
        kind: "f16" or "q8_0". Vectors, and GPT-2's positions, stay in fp32, as in llama.cpp's own converter.
    """
    import gguf

    config = network.config
    arch = gguf.MODEL_ARCH.GPT2 if config.model_type == "gpt2" else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(base.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if kind == "f16" else gguf.LlamaFileType.MOSTLY_Q8_0)
    add_sizes(writer, config)
    add_tokenizer(writer, base, config.vocab_size)
    count = 0
    for name, values in named_arrays(network, arch):
        encoding = tensor_encoding(name, values, kind)
        writer.add_tensor(name, gguf.quants.quantize(values, encoding), raw_dtype=encoding)
        count += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


def add_sizes(writer: "gguf.GGUFWriter", config: object) -> None:
    """Write the hyperparameters of the architecture."""
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for add in (writer.add_rope_dimension_count, writer.add_key_length, writer.add_value_length):
        add(width)


def add_tokenizer(writer: "gguf.GGUFWriter", base: Path, rows: int) -> None:
    """Write the byte-level BPE of tokenizer.json. rows: of the embedding; those without a token get a name."""
    import gguf

    content = read_json(base / "tokenizer.json", "base", "model")
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    tokens, types = [f"[PAD{number}]" for number in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, gguf.TokenType.NORMAL
    for token in content.get("added_tokens", ()):
        special = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], special
    config, tokenizer = read_json(base / "config.json", "base"), load_tokenizer(base)
    end, prefix = end_of_text_id(base, config, tokenizer), text_prefix(tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(prefix[0] if prefix else end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(bool(prefix))
    writer.add_add_eos_token(False)


def named_arrays(network: "PreTrainedModel", arch: "gguf.MODEL_ARCH") -> Iterator[tuple[str, np.ndarray]]:
    """Yield the names and values of all tensors, in GGUF's layout; an output head tied to the embedding is left out."""
    import gguf

    config = network.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in network.named_parameters():
        values = parameter.detach().cpu().float().numpy()
        if config.model_type == "gpt2" and name.endswith(TRANSPOSED):
            values = values.T
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = interleave(values, config.num_key_value_heads if "k_proj" in name else config.num_attention_heads)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values)
    if config.model_type != "gpt2" and config.rope_parameters.get("rope_type", "default") != "default":
        frequencies = network.model.rotary_emb.inv_freq.cpu().double().numpy()
        usual = config.rope_parameters["rope_theta"] ** (-np.arange(len(frequencies)) / len(frequencies))
        yield "rope_freqs.weight", (usual / frequencies).astype(np.float32)


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in the order of llama.cpp, which rotates neighbours and not the two halves of a head."""
    return values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)


def tensor_encoding(name: str, values: np.ndarray, kind: str) -> "gguf.GGMLQuantizationType":
    """Return how a tensor is stored. Rows that Q8_0's blocks do not fill are stored in fp16."""
    from gguf import GGMLQuantizationType as Encoding

    if values.ndim == 1 or name == "position_embd.weight":
        return Encoding.F32
    return Encoding.Q8_0 if kind == "q8_0" and values.shape[-1] % BLOCK == 0 else Encoding.F16


def check_file(file: Path, network: "PreTrainedModel") -> None:
    """Read a GGUF file back, and compare each tensor with the model's.

    Raises:
        StageError: one is missing, or differs by more than its type rounds.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    arch = gguf.MODEL_ARCH.GPT2 if network.config.model_type == "gpt2" else gguf.MODEL_ARCH.LLAMA
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name, values in named_arrays(network, arch):
        tensor = stored.pop(name, None)
        found = None if tensor is None else gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if found is None or found.shape != values.shape or not is_rounded(found, values, tensor.tensor_type.name):
            raise StageError(f"export: {name} is not in the file as it was trained; nothing was written")
    if stored:
        raise StageError(f"export: {min(stored)} is in the file, and not in the model; nothing was written")


def is_rounded(found: np.ndarray, values: np.ndarray, encoding: str) -> bool:
    """Tell whether `found` is `values` as rounded by an encoding; false for NaN and for what fp16 cannot hold."""
    if encoding != "Q8_0":
        exact = values.astype(np.float16).astype(np.float32) if encoding == "F16" else values
        return bool(np.isfinite(found).all()) and np.array_equal(found, exact)
    blocks, difference = values.reshape(-1, BLOCK), np.abs(found - values).reshape(-1, BLOCK)
    # Half a step of the scale absmax / 127, and the scale itself is rounded to fp16.
    return bool((difference <= 0.6 * np.abs(blocks).max(1, keepdims=True) / 127 + 4e-6).all())


def modelfile(file: Path, base: Path) -> str:
    """Return the Modelfile with which `ollama create` takes the GGUF file that lies beside it."""
    config = read_json(base / "config.json", "base")
    context = config.get("n_positions") or config.get("max_position_embeddings") or math.inf
    end = load_tokenizer(base).id_to_token(end_of_text_id(base, config, load_tokenizer(base)))
    lines = [f"FROM ./{file.name}", 'TEMPLATE """{{ .Prompt }}"""', f"PARAMETER stop {json.dumps(end)}"]
    return "\n".join([*lines, f"PARAMETER num_ctx {min(context, 4096)}", ""])
