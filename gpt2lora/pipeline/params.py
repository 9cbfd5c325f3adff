"""Reading params.yaml: typed, every key known, every value checked before any work is done."""

from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt2lora.pipeline.cli import Stop

FILE = Path("params.yaml")
PRECISIONS = ("auto", "bf16", "fp32")  # of train and evaluate; here, so that a wrong one is refused before torch loads
Section = TypeVar("Section")


@dataclass
class Preset:
    """presets.NAME: a base model and a corpus. `base` reads the model's keys, `prepare` the dataset's."""

    model: str | None
    model_revision: str | None
    dataset: str | None
    dataset_config: str | None
    dataset_revision: str | None


def section(key: str, schema: type[Section]) -> Section:
    """Return the section at the dotted `key` of params.yaml, for instance "train" or "presets.gpt2".

    Args:
        schema: a dataclass that names each key of the section with its type; its `__post_init__` may check
            the values with `require`.

    Raises:
        Stop: the key, its value and what was expected.
    """
    values = _look_up(key)
    if not isinstance(values, dict):
        known = ", ".join(field.name for field in fields(schema)) or "no keys"
        raise Stop(f"{FILE}: {key}: expected a section with {known}, not {values!r}")
    return _typed(values, schema, key)


def value(key: str, kind: type[Section]) -> Section:
    """Return the single value at the top-level `key` of params.yaml as a `kind` (`str` or `int`)."""
    return getattr(_typed({key: _look_up(key)}, make_dataclass("one", [(key, kind)]), ""), key)


def seed() -> int:
    """Return the seed of every random choice."""
    found = value("seed", int)
    require(0 <= found < 2**64, "seed", found, "an integer of at least 0, below 2**64")
    return found


def chosen(knob: str, variants: str) -> str:
    """Return the variant that `knob` names ("preset", "method"), one of the keys of `variants`."""
    name = value(knob, str)
    known = _look_up(variants)
    if not isinstance(known, dict) or name not in known:
        raise wrong(knob, name, f"one of {', '.join(map(str, known or ()))}")
    return name


def require(holds: bool, key: str, value: Any, expected: str) -> None:
    """Raise Stop unless `holds`: for the checks of a schema's `__post_init__`."""
    if not holds:
        raise wrong(key, value, expected)


def wrong(key: str, value: Any, expected: str) -> Stop:
    return Stop(f"{FILE}: {key}: expected {expected}, not {value!r}")


def _typed(values: dict, schema: type[Section], key: str) -> Section:
    """Return a schema's instance of the values that params.yaml has at `key`, "" for the whole file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError

    known = {field.name: field.type for field in fields(schema)}
    prefix = f"{key}." if key else ""
    for name, found in values.items():
        # OmegaConf takes 3 for true, and an integer that no float holds for one.
        number = type(found) is int and abs(found) >= 2**63 and name != "seed"
        if (known.get(name) is bool and not isinstance(found, bool)) or (number and name in known):
            raise wrong(f"{prefix}{name}", found, _name(known[name]) + (" below 2**63" if number else ""))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except ConfigKeyError as error:
        names = ", ".join(known) or "no keys"
        raise Stop(f"{FILE}: {prefix}{error.full_key}: unknown key; {key} has {names}") from error
    except MissingMandatoryValue as error:
        raise Stop(f"{FILE}: {prefix}{error.full_key}: missing; expected {_name(known[error.full_key])}") from error
    except ValidationError as error:
        name = (error.full_key or "").split("[")[0]
        raise wrong(f"{prefix}{name}", values.get(name), _name(known.get(name, schema))) from error
    except OmegaConfBaseException as error:
        raise Stop(f"{FILE}: {key}: {error}") from error


def _look_up(key: str) -> Any:
    from omegaconf import OmegaConf

    try:
        # OmegaConf's loader reads 5e-05, which `dvc exp run -S` writes, as a number; PyYAML's as a string.
        found = OmegaConf.to_container(OmegaConf.load(FILE), resolve=True)
    except FileNotFoundError as error:
        raise Stop(f"{FILE} not found in {Path.cwd()}: run stages from the root of the repository") from error
    except Exception as error:  # a date in month 13, a number of 5,000 digits, a list that holds itself: of any kind
        raise Stop(f"{FILE}: not readable as YAML: {error}") from error
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            raise Stop(f"{FILE}: {key}: missing")
        found = found[part]
    return found


def _name(kind: Any) -> str:
    words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    return words.get(kind) or str(kind).replace("str", "a string").replace("int", "an integer").replace(
        "float", "a number"
    ).replace("None", "null").replace(" | ", " or ")
