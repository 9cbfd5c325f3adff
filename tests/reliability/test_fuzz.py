"""Random changes of params.yaml and of texts: the stages give the right result or one clear line, never a traceback."""

import json
import math
import shutil
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tiny
from bad_input import input_options
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from ruamel.yaml import YAML
from schemas import SCHEMAS

from gpt2lora.dataset import blocks
from gpt2lora.dataset import tokenizer as tokenizer_module
from gpt2lora.dataset.tokenizer import split_paragraphs
from gpt2lora.model import lora
from gpt2lora.model.layers import load_on_meta
from gpt2lora.pipeline import artifacts, cli, environment, params
from gpt2lora.pipeline.context import choose_block_size
from gpt2lora.pipeline.schemas import LAYOUTS, LoraParams, TokenizeParams
from gpt2lora.sources import local
from stages import evaluate, prepare, tokenize, train

pytestmark = pytest.mark.slow

SHIPPED = OmegaConf.to_container(OmegaConf.load(tiny.ROOT / "params.yaml"))
FUZZ_SETTINGS = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def error_of_command(work: Callable[[], None]) -> str | None:
    """Run a function as a stage runs; return its error line, or None if it succeeded."""
    return error_of(CliRunner().invoke(cli.command(work), []))


def error_of(result: Result) -> str | None:
    """Check that a run succeeded or printed one error line; return the line, or None."""
    if result.exit_code == 0:
        return None
    assert isinstance(result.exception, SystemExit), "".join(traceback.format_exception(result.exception))
    assert result.exit_code == 1, result.output
    *before, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert all("%|" in text for text in before if text.strip()), before  # progress bars
    assert len(line) > 20 and line.isprintable(), line
    return line


# params.yaml

# YAML that is easily misread, or invalid.
UNUSUAL_YAML = (
    *("???", "'???'", "${nowhere}", "${seed}", "${oc.env:HOME}", "${oc.decode:'[1']}", "${", "'a${b'", "${train}"),
    *("2026-01-01", "12:30:00", "0x10", "0o7", "1_000", "1e400", "-1e400", ".nan", ".inf", "-.inf", "1e-400", "-0.0"),
    *("9" * 30, "9" * 5000, "-1", "0-999999999999", "6-11", "yes", "on", "'true'", "'1'", "3", "2.0", "''", "~"),
    *("!!binary aGk=", "!!set {a, b}", "!!python/object/apply:os.getcwd []", "!!int x", "!!float x", "!x 1"),
    *("&a [*a]", "*b", "{? [1, 2] : 3}", "{1: 2}", "{null: 1}", "[[]]", "[[[[[[]]]]]]", "{<<: 3}", "[", "}", "'", "|"),
    *(
        '"\\ud800"',
        '"\\0"',
        '"\\x1b[31m"',
        '"\\u2028"',
        '"a\\nb"',
        "~nobody/x",
        "./none",
        "../..",
        "'" + "x" * 300 + "'",
    ),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
YAML_VALUES = st.sampled_from(UNUSUAL_YAML) | VALUES.map(json.dumps) | st.text(max_size=20)


@st.composite
def params_files(draw) -> tuple[str, str]:
    """The text of a params.yaml with one random change, and the key of the section with the change."""
    key = draw(st.sampled_from([*SCHEMAS, "preset", "method", "seed"]))
    values = json.loads(json.dumps(SHIPPED))
    replacements = {}

    def placeholder(yaml_value: str) -> str:
        """Return a string that is replaced by `yaml_value` after the values were written as JSON."""
        replacements[f'"<{len(replacements)}>"'] = yaml_value
        return f"<{len(replacements) - 1}>"

    *outer, last = key.split(".")
    parent = values[outer[0]] if outer else values
    change = draw(st.sampled_from(["value", "value", "value", "section", "removed", "added", "text"]))
    if change == "value" and isinstance(parent[last], dict) and parent[last]:
        parent[last][draw(st.sampled_from(sorted(parent[last])))] = placeholder(draw(YAML_VALUES))
    elif change == "removed" and isinstance(parent[last], dict) and parent[last]:
        parent[last].pop(draw(st.sampled_from(sorted(parent[last]))))
    elif change == "removed":
        parent.pop(last)
    elif change == "added" and isinstance(parent[last], dict):
        parent[last][draw(st.text(max_size=10))] = 1
    elif change != "text":
        parent[last] = placeholder(draw(YAML_VALUES))
    text = json.dumps(values)
    for name, yaml_value in replacements.items():
        text = text.replace(name, yaml_value)
    if change == "text":
        start = draw(st.integers(0, len(text)))
        removed = draw(st.integers(0, 30))
        text = text[:start] + draw(YAML_VALUES) + text[start + removed :]
    return text, key


def with_value(key: str, yaml_value: str) -> tuple[str, str]:
    """The text of the shipped params.yaml with one value replaced, and the key of its section."""
    values = json.loads(json.dumps(SHIPPED))
    *outer, last = key.split(".")
    parent = values
    for part in outer:
        parent = parent[part]
    parent[last] = "<0>"
    return json.dumps(values).replace('"<0>"', yaml_value), ".".join(outer) or key


@pytest.fixture(scope="module")
def layers(tiny_model) -> list[str]:
    """The names of the tiny model's linear layers."""
    return list(lora.linear_layers(load_on_meta(tiny_model)))


@FUZZ_SETTINGS
@given(params_files())
@example(with_value("presets.local.model", "~nobody-by-this-name/x"))
@example(with_value("presets.local.model", "x" * 300))
@example(with_value("presets.local.dataset", '"a\\0b"'))
@example(with_value("methods.qlora.double_quant", "3"))
@example(with_value("seed", "'???'"))
@example(with_value("lora.layers", "0-999999999999"))
@example(with_value("lora.alpha", ".inf"))
@example(with_value("train.epochs", "1" + "0" * 30))
def test_any_params_file_is_read_correctly_or_refused(tmp_path, monkeypatch, layers, case):
    text, key = case
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")

    def read() -> None:
        if key == "seed":
            assert 0 <= params.seed() < 2**64
        elif key in ("preset", "method"):
            assert isinstance(params.choice(key, f"{key}s"), str)
        else:
            section = params.section(key, SCHEMAS[key])
            check_types(section, key)
            check_with_model(section, key, layers)

    line = error_of_command(read)
    assert line is None or "params.yaml" in line


def check_types(section: object, key: str) -> None:
    """Check that every value is that of the file, has the type of its schema, and is finite."""
    group = YAML(typ="safe").load(Path("params.yaml"))
    for part in key.split("."):
        group = group[part]
    for field in fields(section):
        value, in_file = getattr(section, field.name), group[field.name]
        if field.type is not bool and not isinstance(in_file, str):
            assert not isinstance(value, bool) or "Any" in str(field.type)
        if field.type in (bool, "bool"):
            assert value is in_file
        elif isinstance(value, int | float):
            assert math.isfinite(value)
            assert value == (type(value)(in_file) if isinstance(in_file, str) else in_file)
        else:
            assert value == in_file or value == str(in_file)


def check_with_model(section: object, key: str, layers: list[str]) -> None:
    """Run the checks that stages make of a value together with the model or the disk."""
    if isinstance(section, LoraParams):
        assert lora.select_target_layers(layers, section)
    elif isinstance(section, TokenizeParams):
        assert 0 < choose_block_size(section.block_size, {"n_positions": tiny.POSITIONS}, 0) <= tiny.POSITIONS
    elif isinstance(section, params.PresetParams):
        for name in ("model", "dataset"):
            if getattr(section, name) != local.SAMPLE:
                revision = getattr(section, f"{name}_revision", None)
                path = local.resolve_local_path(f"{key}.{name}", getattr(section, name), revision)
                assert path is None or path.exists()


# Texts

PIECES = st.sampled_from(
    [
        *(b"\n", b"\r\n", b"\r", b"\0", b" \n", b"", b" = Title = \n", b" = = Part = = \n", b"<|endoftext|>", b"<unk>"),
        *("\ufeff", "\u2028", "\x85", "😀", "👩‍👩‍👧\n", "e\u0301", "\\ud800", "東京\n", "\u202e", "\x1b[0m", "\x1c"),
        *(b"\xff", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc0\x80"),
    ]
).map(lambda piece: piece.encode() if isinstance(piece, str) else piece) | st.text(max_size=40).map(
    lambda text: text.encode(errors="surrogatepass")
)
UTF8_PIECES = PIECES.filter(lambda piece: piece.decode("utf-8", "ignore").encode() == piece)
TEXTS = st.lists(UTF8_PIECES, max_size=12).map(b"".join) | st.lists(PIECES, max_size=6).map(b"".join)


@pytest.fixture
def fast_stages(monkeypatch, tmp_path, tiny_model):
    """A working directory whose stages skip what no text changes: records of the machine, and fsync.

    Returns the tokenizer, and the sections of params.yaml, which the test may change.
    """
    shutil.copyfile(tiny.ROOT / "params.yaml", tmp_path / "params.yaml")
    tiny.set_param(tmp_path, "preset", "local")
    tiny.set_param(tmp_path, "presets.local.dataset", "corpus")
    values = OmegaConf.load(tmp_path / "params.yaml")
    names = ("presets.local", "prepare", "tokenize")
    sections = {name: OmegaConf.to_container(OmegaConf.select(values, name)) for name in names}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(params, "choice", lambda *_: "local")
    monkeypatch.setattr(params, "seed", lambda: 0)
    monkeypatch.setattr(params, "section", lambda key, schema: schema(**sections[key]))
    monkeypatch.setattr(environment, "write_record", lambda *_, **__: None)
    monkeypatch.setattr(artifacts, "_fsync", lambda _: None)
    tokenizer = tokenizer_module.load_tokenizer(tiny_model)
    monkeypatch.setattr(tokenizer_module, "load_tokenizer", lambda *_: tokenizer)
    for stage in (prepare, tokenize):
        monkeypatch.setattr(stage, "check_params", lambda: None)
    return tokenizer, sections


@FUZZ_SETTINGS
@given(st.tuples(TEXTS, TEXTS, TEXTS), st.booleans(), st.sampled_from(LAYOUTS), st.sampled_from([1, 7, 64]))
@example((b"a" * 2**20, b" x" * 2**19, "😀".encode() * 2**18), False, "packed", 64)
@example((b"a b\r\n" + b"\0" * 2**20, b"\n" * 2**20, b"x y\n" * 2**18), False, "padded", 64)
@example((b" = A = \n" + b"word " * 2**18, b"\n a b \n", b" = B = \n c d"), True, "packed", 64)
def test_any_text_is_tokenized_correctly_or_refused(fast_stages, tiny_model, texts, single_file, layout, block_size):
    tokenizer, sections = fast_stages
    sections["tokenize"] |= {"layout": layout, "block_size": block_size}
    for folder in (Path("corpus"), Path("data")):
        shutil.rmtree(folder, ignore_errors=True)
    Path("corpus").mkdir()
    sections["presets.local"]["dataset"] = "corpus/all.txt" if single_file else "corpus"
    if single_file:
        Path("corpus/all.txt").write_bytes(b"".join(texts))
    else:
        for split, text in zip(blocks.SPLITS, texts, strict=True):
            Path("corpus", f"{split}.txt").write_bytes(text)

    if error_of(CliRunner().invoke(prepare.main, [])):
        assert not Path("data/raw").exists()
        assert single_file or not all(map(is_usable, texts))
        return
    assert single_file or all(map(is_usable, texts))
    raw = {split: Path("data/raw", f"{split}.txt").read_bytes() for split in blocks.SPLITS}
    if single_file:
        assert sorted(b"".join(raw.values())) == sorted(normalized(b"".join(texts)).encode())
    else:
        assert [text.decode() for text in raw.values()] == list(map(normalized, texts))

    if line := error_of(CliRunner().invoke(tokenize.main, ["--base", str(tiny_model)])):
        assert "split is empty" in line
        assert not Path("data/tokens").exists()
        return
    end = json.loads(Path("data/tokens/manifest.json").read_bytes())["end_of_text_id"]
    for split, text in raw.items():
        saved = blocks.load_blocks(Path("data/tokens"), split, ())
        if layout == "packed":
            rows = [row[1:length] for row, length in zip(saved.ids, saved.lengths, strict=True)]
            ids = [*saved.ids[0, :1], *np.concatenate(rows)]
            assert tokenizer.decode([id for id in ids if id != end], skip_special_tokens=False) == text.decode()
        else:
            for paragraph, row, length in zip(split_paragraphs(text.decode()), saved.ids, saved.lengths, strict=True):
                decoded = tokenizer.decode([id for id in row[:length] if id != end], skip_special_tokens=False)
                assert paragraph.startswith(decoded.rstrip("\ufffd"))
                assert length > block_size or decoded == paragraph


def normalized(text: bytes) -> str:
    """Return a text with LF as its only line end, and without a byte order mark."""
    return text.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def is_usable(text: bytes) -> bool:
    """Tell whether a text is UTF-8, without NUL characters, and holds more than white space."""
    try:
        return bool(normalized(text).strip()) and b"\0" not in text
    except UnicodeDecodeError:
        return False


# Extreme values

BELOW_ONE = math.nextafter(1, 0)
EXTREMES = [
    ("tokenize", "tokenize.block_size", 1),
    ("tokenize", "tokenize.block_size", 2**62),
    ("train", "seed", 2**64 - 1),
    ("train", "lora.r", 2**62),
    ("train", "lora.alpha", 1e-320),
    ("train", "lora.alpha", 1e308),
    ("train", "lora.dropout", BELOW_ONE),
    ("train", "lora.layers", "0-9999"),
    ("train", "lora.layers", "1-0"),
    ("train", "lora.layers", [0, 0]),
    ("train", "lora.target_modules", [""]),
    ("train", "lora.target_modules", ["."]),
    ("train", "lora.target_modules", ["c_attn", "c_attn"]),
    ("train", "train.batch_size", 2**62),
    ("train", "train.accumulation_steps", 2**62),
    ("train", "train.validations", 2**62),
    ("train", "train.checkpoint_every", 2**62),
    ("train", "train.patience", 2**62),
    ("train", "train.learning_rate", 1e-320),
    ("train", "train.learning_rate", 1e308),
    ("train", "train.lora_plus_ratio", 1e308),
    ("train", "train.weight_decay", 1e308),
    ("train", "train.clip_norm", 1e-320),
    ("train", "train.clip_norm", 1e308),
    ("train", "train.warmup_fraction", BELOW_ONE),
    ("train", "train.base_dropout", BELOW_ONE),
    ("evaluate", "evaluate.batch_size", 2**62),
    ("evaluate", "evaluate.stride", 1),
    ("evaluate", "evaluate.stride", 2**62),
]


@pytest.mark.parametrize(("stage", "key", "value"), EXTREMES)
def test_an_extreme_value_works_or_is_refused(data, stage, key, value):
    tiny.set_param(Path.cwd(), key, value)
    main = {"tokenize": tokenize, "train": train, "evaluate": evaluate}[stage].main
    line = error_of(CliRunner().invoke(main, input_options(stage)))
    assert line is None or key in line or "train.learning_rate" in line  # the error of a diverged loss names the latter
