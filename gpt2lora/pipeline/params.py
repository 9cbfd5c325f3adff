"""Read params.yaml: values are typed, and unknown keys are refused."""

import functools
import json
import typing
from collections.abc import Iterable
from dataclasses import dataclass, fields, make_dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from gpt2lora.pipeline.cli import StageError

FILE = Path("params.yaml")
PRECISIONS = ("auto", "bf16", "fp32")
SEED = "an integer of at least 0, below 2**64"
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
    require(0 <= number < 2**64, "seed", number, SEED)
    return number


def choice(key: str, variants: str) -> str:
    """Return the value of `key` ("preset" or "method"), which must be a key of the section `variants`."""
    name = value(key, str)
    known = check_names(variants)
    if name not in known:
        raise invalid(key, name, f"one of {', '.join(map(str, known))}")
    return name


def check_names(key: str, known: Iterable[str] | None = None) -> list[str]:
    """Return the names in the section at `key`, "" for the whole file; refuse those that are not `known`, if given."""
    values = _lookup(key) if key else _parse(_read())
    if not isinstance(values, dict):
        raise invalid(key, values, "a section")
    names = list(values)
    if known is not None and (unknown := [name for name in names if name not in known]):
        raise StageError(f"{FILE}: {key and key + '.'}{unknown[0]}: unknown key; {key or 'it'} has {', '.join(known)}")
    return names


def require(condition: bool, key: str, value: Any, expected: str) -> None:
    """Raise StageError unless `condition` holds."""
    if not condition:
        raise invalid(key, value, expected)


def invalid(key: str, value: Any, expected: str) -> StageError:
    """Return the error for a value of params.yaml that is not as expected."""
    return StageError(f"{FILE}: {key}: expected {expected}, not {in_yaml(value)}")


def in_yaml(value: Any) -> str:
    """Return a value as it stands in params.yaml: Python's True, False and None are true, false and null there."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def null_column(columns: Iterable[str], table: Path | str) -> StageError:
    """Return the error for a table of which no column was named."""
    key = f"presets.{choice('preset', 'presets')}.text_column"
    return invalid(key, None, f"one of the columns of {table}: {', '.join(columns)[:300]}")


def seen_from(path: Path) -> str:
    """Return words for an error: from where a path that does not exist was looked for."""
    seen = f"seen from {Path.cwd()}"
    if ".dvc/tmp" in Path.cwd().as_posix() and not path.is_absolute():
        seen += ", a temporary folder of DVC's: write the full path"
    return seen


def _to_dataclass(values: dict, schema: type[Schema], key: str) -> Schema:
    """Return `values`, found at `key` ("" for the whole file), as an instance of `schema`."""
    types = {field.name: field.type for field in fields(schema)}
    prefix = f"{key}." if key else ""
    if unknown := [name for name in values if name not in types]:
        known = ", ".join(types) or "no keys"
        raise StageError(f"{FILE}: {prefix}{unknown[0]}: unknown key; {key} has {known}")
    if missing := [name for name in types if name not in values]:
        expected = _type_name(types[missing[0]])
        raise StageError(f"{FILE}: {prefix}{missing[0]}: missing; expected {expected}")
    return schema(**{name: _typed(values[name], kind, f"{prefix}{name}") for name, kind in types.items()})


def _typed(value: Any, kind: Any, key: str) -> Any:
    """Return a value of params.yaml as a `kind`: Any, str, int, float or bool, or one of these or None."""
    kinds = typing.get_args(kind) or (kind,)
    if kind is Any or (value is None and type(None) in kinds):
        return value
    # A folder may be called 2024 or 2024-01-01. True is an integer for Python, but not for a reader.
    accepted = {str: (str, int, date), int: (int,), float: (float, int), bool: (bool,)}[kinds[0]]
    require(isinstance(value, accepted) and isinstance(value, bool) == (kind is bool), key, value, _type_name(kind))
    too_large = kinds[0] in (int, float) and isinstance(value, int) and abs(value) >= 2**63
    require(not too_large or key.endswith("seed"), key, value, f"{_type_name(kind)} below 2**63")
    return kinds[0](value)


def _lookup(key: str) -> Any:
    """Return what params.yaml holds at the dotted `key`."""
    found = _parse(_read())
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise StageError(f"{FILE}: {key}: missing")
        found = found[part]
    return found


def _read() -> bytes:
    try:
        return FILE.read_bytes()
    except FileNotFoundError as error:
        root = Path(__file__).parents[2]
        where = f" ({root})" if (root / FILE).is_file() else ""
        raise StageError(f"{FILE} not found in {Path.cwd()}: run it from the repository's root{where}") from error


@functools.lru_cache(1)  # parsing takes 20 ms, and a check of the whole file reads 20 keys
def _parse(content: bytes) -> Any:
    try:
        return parse_yaml(content)
    except Exception as error:  # invalid dates, numbers of 5,000 digits and recursive lists raise many types
        raise StageError(f"{FILE}: not readable as YAML: {error}") from error


def parse_yaml(content: bytes | str) -> Any:
    """Return what a YAML text holds."""
    from ruamel.yaml import YAML  # DVC's own reader: it reads 5e-05, which `dvc exp run -S` writes, as a number

    return YAML(typ="safe").load(content)


def _type_name(kind: Any) -> str:
    """Return a type in words: "an integer or null" for int | None."""
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind) or str(kind).replace("str", "a string").replace("int", "an integer").replace(
        "float", "a number"
    ).replace("None", "null").replace(" | ", " or ")
