"""params.yaml: values are typed and checked, and an error is one line that names the key."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from schemas import SCHEMAS

from gpt2lora.pipeline import params
from gpt2lora.pipeline.cli import StageError
from gpt2lora.pipeline.schemas import NoParams, PrepareParams

SHARE = "a number of at least 0, below 1"
LAYERS = "all, a range such as 6-11, or a list of numbers such as [0, 11]"
PRECISION = "one of auto, bf16, fp32"


def spelled(value) -> str:
    """Return a value as params.yaml spells it."""
    return {"True": "true", "False": "false", "None": "null"}.get(repr(value), repr(value))


@dataclass
class Small:
    steps: int
    rate: float
    name: str
    exact: bool
    limit: int | None


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a copy of the repository's params.yaml."""
    shutil.copyfile(tiny.ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str) -> None:
    Path("params.yaml").write_text(text, encoding="utf-8")


def error_line(key: str, schema: type) -> str:
    """Return the error of reading a section, which is one line."""
    with pytest.raises(StageError) as error:
        params.section(key, schema)
    line = error.value.format_message()
    assert "\n" not in line
    return line


@pytest.mark.parametrize("key", SCHEMAS)
def test_every_schema_reads_the_shipped_file(key):
    assert isinstance(params.section(key, SCHEMAS[key]), SCHEMAS[key])


def test_every_section_of_the_shipped_file_has_a_schema(folder):
    from omegaconf import OmegaConf

    shipped = OmegaConf.to_container(OmegaConf.load(folder / "params.yaml"))
    sections = {name for name, section in shipped.items() if isinstance(section, dict)} - {"presets", "methods"}
    sections |= {f"{group}.{name}" for group in ("presets", "methods") for name in shipped[group]}
    assert sections == set(SCHEMAS)
    assert params.choice("preset", "presets") == "gpt2"
    assert params.choice("method", "methods") == "lora"
    assert params.value("seed", int) == 0


@pytest.mark.parametrize(("written", "rate"), [("5e-05", 5e-5), ("5e-5", 5e-5), ("1.0e-3", 1e-3), ("2", 2.0)])
def test_a_number_may_be_written_in_any_notation(written, rate):
    write(f"small: {{steps: 1, rate: {written}, name: x, exact: true, limit: null}}")
    section = params.section("small", Small)
    assert section == Small(1, rate, "x", True, None)
    assert type(section.rate) is float


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.epochs", "three", "an integer"),
        ("train.epochs", 2.5, "an integer"),
        ("train.epochs", True, "an integer"),
        ("train.batch_size", None, "an integer"),
        ("train.learning_rate", "fast", "a number"),
        ("train.learning_rate", [1e-3], "a number"),
        ("methods.qlora.double_quant", "maybe", "true or false"),
        ("tokenize.block_size", "long", "an integer or null"),
        ("tokenize.layout", None, "a string"),
        ("presets.gpt2.model", ["gpt2"], "a string or null"),
        ("prepare.fraction", "half", "a number"),
        ("evaluate.batch_size", 0.5, "an integer or null"),
        ("evaluate.stride", "half", "an integer or null"),
        ("evaluate.protocol", None, "a string"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(folder, key, value, expected):
    tiny.set_param(folder, key, value)
    section = key.rpartition(".")[0]
    assert error_line(section, SCHEMAS[section]) == f"params.yaml: {key}: expected {expected}, not {spelled(value)}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *((f"train.{name}", 0, "an integer above 0") for name in ("epochs", "batch_size", "accumulation_steps")),
        ("train.validations", -1, "an integer above 0"),
        *(("train.learning_rate", rate, "a number above 0") for rate in (0.0, -1e-3, math.inf, math.nan)),
        ("train.clip_norm", 0.0, "a number above 0"),
        ("train.warmup_fraction", 1.0, SHARE),
        ("train.base_dropout", -0.1, SHARE),
        ("train.weight_decay", -0.1, "0 or more"),
        ("train.precision", "fp16", PRECISION),
        ("evaluate.precision", "bf8", PRECISION),
        ("evaluate.batch_size", 0, "an integer above 0, or null"),
        ("evaluate.stride", 0, "an integer above 0, or null"),
        ("evaluate.stride", -512, "an integer above 0, or null"),
        ("evaluate.protocol", "lm_eval", "one of native, hf, lm-eval"),
        ("lora.r", 0, "an integer above 0"),
        ("lora.alpha", 0.0, "a number above 0, at most 1e9"),
        ("lora.dropout", 1.0, SHARE),
        ("lora.target_modules", "all", "all-linear or a list of module names"),
        ("lora.target_modules", [], "all-linear or a list of module names"),
        ("lora.target_modules", [1], "all-linear or a list of module names"),
        *(("lora.layers", layers, LAYERS) for layers in ("some", "11-6", "-1", -1, [], [0, "1"], 1.5, None, True)),
        *(("lora.bits", bits, "16 (not quantized), 8 or 4") for bits in (2, 32)),
        ("lora.init", "gaussian", "one of default, pissa, olora, orthogonal, loftq"),
        ("train.lora_plus_ratio", 0.0, "a number above 0"),
        ("methods.qlora.bits", 2, "4 or 8"),
        ("methods.qlora.quant_type", "int4", "nf4 or fp4"),
        ("tokenize.block_size", 0, "an integer above 0, or null"),
        ("tokenize.layout", "ragged", "one of packed, padded"),
        ("prepare.fraction", 0.0, "a number above 0, at most 1"),
        ("prepare.fraction", 1.5, "a number above 0, at most 1"),
        ("prepare.validation_share", 0.0, "a number between 0 and 1"),
        ("prepare.test_share", 1.0, "a number between 0 and 1"),
    ],
)
def test_a_value_out_of_range_is_refused(folder, key, value, expected):
    tiny.set_param(folder, key, value)
    section = key.rpartition(".")[0]
    assert error_line(section, SCHEMAS[section]) == f"params.yaml: {key}: expected {expected}, not {spelled(value)}"


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (("methods.qlora.bits", 8), ("methods.qlora.double_quant", True), "expected false with 8 bits"),
        (("lora.init", "pissa"), ("lora.bits", 8), "with init pissa: expected 16: the base takes part"),
        (("lora.init", "olora"), ("lora.bits", 4), "with init olora: expected 16: the base takes part"),
        (("lora.init", "pissa"), ("lora.dropout", 0.05), "with init pissa: expected 0: the adapter holds a part"),
        (("lora.init", "orthogonal"), ("lora.r", 3), "with init orthogonal: expected an even number, not 3"),
        (("lora.init", "loftq"), ("lora.use_dora", True), "with init loftq: expected false"),
    ],
)
def test_values_that_contradict_each_other_are_refused(folder, first, second, expected):
    tiny.set_param(folder, *first)
    tiny.set_param(folder, *second)
    section = second[0].rpartition(".")[0]
    line = error_line(section, SCHEMAS[section])
    assert line.startswith(f"params.yaml: {second[0]}")
    assert expected in line


def test_shares_that_leave_no_training_text_are_refused(folder):
    tiny.set_param(folder, "prepare.validation_share", 0.5)
    tiny.set_param(folder, "prepare.test_share", 0.5)
    line = error_line("prepare", PrepareParams)
    assert line == "params.yaml: prepare.validation_share + test_share: expected a sum below 1, not 1.0"


def test_the_error_for_an_unknown_key_lists_the_known_keys():
    write("small: {steps: 1, rate: 1, name: x, exact: true, limit: 2, stops: 3}")
    line = error_line("small", Small)
    assert line == "params.yaml: small.stops: unknown key; small has steps, rate, name, exact, limit"


def test_a_key_in_a_section_without_keys_is_refused():
    write("methods: {lora: {bits: 4}}")
    line = error_line("methods.lora", NoParams)
    assert line == "params.yaml: methods.lora.bits: unknown key; methods.lora has no keys"


def test_the_error_for_a_missing_key_names_its_type():
    write("small: {steps: 1, name: x, exact: true, limit: 2}")
    assert error_line("small", Small) == "params.yaml: small.rate: missing; expected a number"


def test_a_missing_section_is_refused():
    write("large: {}")
    assert error_line("small", Small) == "params.yaml: small: missing"


def test_a_number_in_place_of_a_section_is_refused():
    write("small: 3")
    line = error_line("small", Small)
    assert line == "params.yaml: small: expected a section with steps, rate, name, exact, limit, not 3"


@pytest.mark.parametrize(
    ("key", "variants", "known"),
    [("preset", "presets", "gpt2, sample, local"), ("method", "methods", "lora, qlora, full")],
)
@pytest.mark.parametrize("name", ["typo", "", "gpt2 "])
def test_the_error_for_an_unknown_name_lists_the_known_names(folder, key, variants, known, name):
    tiny.set_param(folder, key, name)
    with pytest.raises(StageError) as error:
        params.choice(key, variants)
    assert error.value.format_message() == f"params.yaml: {key}: expected one of {known}, not {spelled(name)}"


@pytest.mark.parametrize("value", [3, True, "abc", None, [1]])
@pytest.mark.parametrize(("key", "variants"), [("preset", "presets"), ("method", "methods")])
def test_variants_that_are_no_section_are_refused(folder, key, variants, value):
    tiny.set_param(folder, variants, value)
    with pytest.raises(StageError) as error:
        params.choice(key, variants)
    assert error.value.format_message() == f"params.yaml: {variants}: expected a section, not {spelled(value)}"


@pytest.mark.parametrize("value", ["x", 1.5, None, [1]])
def test_a_seed_that_is_not_an_integer_is_refused(folder, value):
    tiny.set_param(folder, "seed", value)
    with pytest.raises(StageError) as error:
        params.value("seed", int)
    assert error.value.format_message() == f"params.yaml: seed: expected an integer, not {spelled(value)}"


@pytest.mark.parametrize(
    "text",
    [
        "small: {steps: 1",
        "small:\n  steps: 1\n rate: 2\n",
        "small: {steps: 1, steps: 2}",
        "\tx: 1",
    ],
)
def test_the_error_for_invalid_yaml_names_the_file(text):
    write(text)
    assert error_line("small", Small).startswith("params.yaml: not readable as YAML: ")


def test_the_error_for_a_file_that_is_not_utf8_names_it():
    Path("params.yaml").write_bytes(b"small: \xff")
    assert error_line("small", Small).startswith("params.yaml: not readable as YAML: ")


def test_the_error_for_a_missing_file_tells_where_to_run_stages(folder):
    Path("params.yaml").unlink()
    line = error_line("small", Small)
    assert line == f"params.yaml not found in {folder}: run it from the repository's root ({tiny.ROOT})"
