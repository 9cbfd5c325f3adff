"""The files of a model: copied without pickles and code, and checked before any of its weights are loaded."""

import shutil
from pathlib import Path

from gpt2lora.pipeline.adapter_files import ADAPTER_CONFIG
from gpt2lora.pipeline.artifacts import read_json
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.context import read_config
from gpt2lora.sources.hub import CONFIG_FILES, PICKLES
from gpt2lora.sources.local import read_license

SLOW_TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.model",))
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def copy_model(source: Path, folder: Path) -> dict:
    """Copy the needed files of a model unchanged: no pickles, code, other frameworks' weights. Return its license."""
    weights = [path for pattern in WEIGHT_FILES for path in sorted(source.glob(pattern))]
    if not any(path.suffix == ".safetensors" for path in weights):
        pickles = sorted(path.name for path in source.iterdir() if path.suffix in PICKLES)
        refused = f" ({', '.join(pickles)}: pickled weights can run code, so they are refused)" if pickles else ""
        raise StageError(f"{source}: no *.safetensors{refused}: save the model with save_pretrained of transformers")
    others = [path for pattern in CONFIG_FILES for path in sorted(source.glob(pattern)) if path.is_file()]
    for path in [*weights, *others]:
        shutil.copyfile(path, folder / path.name)
    return read_license(source)


def check_no_adapter(source: Path, name: str) -> None:
    """Refuse an adapter beside a model: transformers loads it with the model, of which only the weights are copied."""
    if (source / ADAPTER_CONFIG).is_file():
        raise StageError(
            f"{name}: holds an adapter beside the model ({ADAPTER_CONFIG}), which transformers would load with it: "
            "merge it into the model, or give the model alone and set lora.start_from to the adapter"
        )


def check_weights(folder: Path, name: str) -> None:
    """Refuse weights that are truncated or missing, or only the pointer file of a clone without Git LFS."""
    from safetensors import SafetensorError, safe_open

    for index in folder.glob("*.safetensors.index.json"):
        shards = set(read_json(index, "base", "weight_map")["weight_map"].values())
        if lacking := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise StageError(f"{name}: {lacking[0]} is missing, one of {len(shards)} files that {index.name} names")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy"):
                pass
        except SafetensorError as error:
            raise StageError(f"{name}: {file.name} is damaged, or a pointer of Git LFS: {error}") from error


def write_fast_tokenizer(folder: Path, name: str) -> None:
    """Write tokenizer.json, which `tokenize` reads, if the model has its tokenizer only in another form."""
    if (folder / "tokenizer.json").is_file():
        return
    if not any(all((folder / file).is_file() for file in files) for files in SLOW_TOKENIZERS):
        # transformers would silently create an empty tokenizer
        raise StageError(f"{name}: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt")
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).save_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise StageError(f"{name}: the tokenizer's files are damaged: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise StageError(f"{name}: the tokenizer has no fast form (tokenizer.json), which `tokenize` needs")


def check_vocabulary(folder: Path, name: str) -> dict[str, int]:
    """Return the tokenizer's vocabulary; refuse a model whose embedding lacks a row for one of its ids."""
    from tokenizers import Tokenizer

    rows = read_config(folder, name)["vocab_size"]
    try:
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception as error:  # tokenizers raises plain Exception
        raise StageError(f"{name}: tokenizer.json is damaged: {error}") from error
    if (highest := max(vocabulary.values(), default=-1)) >= rows:
        raise StageError(f"{name}: the tokenizer has an id {highest:,}, the embedding only {rows:,} rows: not a pair")
    return vocabulary


def check_added_tokens(folder: Path, name: str, vocabulary: dict[str, int]) -> None:
    """Refuse tokens that only another file than tokenizer.json adds: `tokenize` would take them for letters.

    Args:
        vocabulary: of tokenizer.json.
    """
    for file, tokens in read_added_tokens(folder).items():
        if lacking := [token for token in tokens if token not in vocabulary]:
            raise StageError(
                f"{name}: tokenizer.json lacks the token {lacking[0]!r}, which {file} adds: save the tokenizer again, "
                "with save_pretrained of AutoTokenizer"
            )


def check_type(config: dict, name: str) -> None:
    """Refuse a model that is no causal language model, or one that needs its own code, which is never run.

    Args:
        config: config.json.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # takes torch, and seconds

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise StageError(
            f"{name}: transformers has no causal language model {kind!r}, and code that comes with a model is never run"
        )
    if config.get("is_encoder_decoder"):
        raise StageError(f"{name}: {kind} has an encoder and a decoder: expected a causal language model")


def read_added_tokens(folder: Path) -> dict[str, list[str]]:
    """Return the tokens that files beside tokenizer.json add to a tokenizer, by the file's name."""
    found = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = read_json(folder / name, "base")
            tokens = content if name == "added_tokens.json" else content.get("added_tokens_decoder") or {}
            found[name] = [each["content"] if isinstance(each, dict) else token for token, each in tokens.items()]
    return found
