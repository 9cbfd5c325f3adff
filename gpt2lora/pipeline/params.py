"""Read params.yaml: values are typed, unknown keys are refused, and every value is checked before any work is done."""

from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2lora.pipeline.cli import StageError

FILE = Path("params.yaml")
PRECISIONS = ("auto", "bf16", "fp32")  # here, and not with the code that uses them, so that checking needs no torch
Schema = TypeVar("Schema")


@dataclass
class PresetParams:
    """presets.NAME: a base model and a corpus. `base` reads the keys of the model, `prepare` those of the dataset."""

    model: str | None
    model_revision: str | None
    dataset: str | None
    dataset_config: str | None
    dataset_revision: str | None
    text_column: str | None


def section(key: str, schema: type[Schema]) -> Schema:
    """Return the section at the dotted `key` of params.yaml, for instance "train" or "presets.gpt2".

    Args:
        schema: a dataclass with the name and the type of each key. Its `__post_init__` may check values with `require`.

    Raises:
        StageError: names the key, its value and what was expected.
    """
    values = _lookup(key)
    if not isinstance(values, dict):
        known = ", ".join(field.name for field in fields(schema)) or "no keys"
        raise StageError(f"{FILE}: {key}: expected a section with {known}, not {values!r}")
    return _to_dataclass(values, schema, key)


def value(key: str, kind: type[Schema]) -> Schema:
    """Return the value at the top-level `key` of params.yaml as a `kind` (`str` or `int`)."""
    return getattr(_to_dataclass({key: _lookup(key)}, make_dataclass("one", [(key, kind)]), ""), key)


def seed() -> int:
    """Return the seed of every random choice."""
    number = value("seed", int)
    require(0 <= number < 2**64, "seed", number, "an integer of at least 0, below 2**64")
    return number


def choice(key: str, variants: str) -> str:
    """Return the value of `key` ("preset" or "method"), which must be a key of the section `variants`."""
    name = value(key, str)
    known = _lookup(variants)
    if not isinstance(known, dict) or name not in known:
        raise invalid(key, name, f"one of {', '.join(map(str, known or ()))}")
    return name


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raise StageError unless `condition` holds."""
    if not condition:
        raise invalid(key, value, expected)


def invalid(key: str, value: Any, expected: str) -> StageError:
    """Return the error for a value of params.yaml that is not as expected."""
    return StageError(f"{FILE}: {key}: expected {expected}, not {value!r}")


def _to_dataclass(values: dict, schema: type[Schema], key: str) -> Schema:
    """Return `values`, found at `key` ("" for the whole file), as an instance of `schema`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

    types = {field.name: field.type for field in fields(schema)}
    prefix = f"{key}." if key else ""
    for name, found in values.items():
        # OmegaConf accepts 3 as true, and integers that do not fit into 64 bits.
        too_large = type(found) is int and abs(found) >= 2**63 and name != "seed"
        if (types.get(name) is bool and not isinstance(found, bool)) or (too_large and name in types):
            raise invalid(f"{prefix}{name}", found, _type_name(types[name]) + (" below 2**63" if too_large else ""))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except ConfigKeyError as error:
        known = ", ".join(types) or "no keys"
        raise StageError(f"{FILE}: {prefix}{error.full_key}: unknown key; {key} has {known}") from error
    except MissingMandatoryValue as error:
        expected = _type_name(types[error.full_key])
        raise StageError(f"{FILE}: {prefix}{error.full_key}: missing; expected {expected}") from error
    except ValidationError as error:
        name = (error.full_key or "").split("[")[0]
        raise invalid(f"{prefix}{name}", values.get(name), _type_name(types.get(name, schema))) from error
    except OmegaConfBaseException as error:
        raise StageError(f"{FILE}: {key}: {error}") from error


def _lookup(key: str) -> Any:
    """Return what params.yaml holds at the dotted `key`."""
    from omegaconf import OmegaConf

    try:
        # `dvc exp run -S` writes 5e-05, which OmegaConf's loader reads as a number and PyYAML's as a string.
        found = OmegaConf.to_container(OmegaConf.load(FILE), resolve=True)
    except FileNotFoundError as error:
        raise StageError(f"{FILE} not found in {Path.cwd()}: run stages from the root of the repository") from error
    except Exception as error:  # invalid dates, numbers of 5,000 digits and recursive lists raise many types
        raise StageError(f"{FILE}: not readable as YAML: {error}") from error
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise StageError(f"{FILE}: {key}: missing")
        found = found[part]
    return found


def _type_name(kind: Any) -> str:
    """Return a type in words: "an integer or null" for int | None."""
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind) or str(kind).replace("str", "a string").replace("int", "an integer").replace(
        "float", "a number"
    ).replace("None", "null").replace(" | ", " or ")
