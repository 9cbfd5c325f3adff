"""params.yaml and texts changed at random: the right result or one clear line, never a traceback."""

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
from bad_input import options
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from schemas import SCHEMAS

from gpt2lora.dataset import blocks
from gpt2lora.dataset import tokenizer as tokenizer_module
from gpt2lora.dataset.tokenizer import split_paragraphs
from gpt2lora.model import loading, lora
from gpt2lora.pipeline import artifacts, cli, environment, params
from gpt2lora.sources import local
from stages import evaluate, prepare, tokenize, train

SHIPPED = OmegaConf.to_container(OmegaConf.load(tiny.ROOT / "params.yaml"))
CASES = settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
# YAML that reads as something odd, or not at all.
ODD = (
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
WRITTEN = st.sampled_from(ODD) | VALUES.map(json.dumps) | st.text(max_size=20)


def outcome(work: Callable[[], None]) -> str | None:
    """Do some work as a stage does its own; return the one line that it was refused with, None if it was not."""
    return line_of(CliRunner().invoke(cli.command(work), []))


def line_of(result) -> str | None:
    if result.exit_code == 0:
        return None
    assert isinstance(result.exception, SystemExit), "".join(traceback.format_exception(result.exception))
    assert result.exit_code == 1, result.output
    *before, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert all("%|" in text for text in before if text.strip()), before  # progress bars
    assert len(line) > 20 and line.isprintable(), line
    return line


@st.composite
def changed_files(draw) -> tuple[str, str]:
    """The text of a params.yaml that something was done to, and the section where."""
    key = draw(st.sampled_from([*SCHEMAS, "preset", "method", "seed"]))
    values = json.loads(json.dumps(SHIPPED))
    marks = {}

    def mark(written: str) -> str:
        marks[f'"<{len(marks)}>"'] = written
        return f"<{len(marks) - 1}>"

    *outer, last = key.split(".")
    around = values[outer[0]] if outer else values
    what = draw(st.sampled_from(["value", "value", "value", "all", "absent", "added", "text"]))
    if what == "value" and isinstance(around[last], dict) and around[last]:
        around[last][draw(st.sampled_from(sorted(around[last])))] = mark(draw(WRITTEN))
    elif what == "absent" and isinstance(around[last], dict) and around[last]:
        around[last].pop(draw(st.sampled_from(sorted(around[last]))))
    elif what == "absent":
        around.pop(last)
    elif what == "added" and isinstance(around[last], dict):
        around[last][draw(st.text(max_size=10))] = 1
    elif what != "text":
        around[last] = mark(draw(WRITTEN))
    text = json.dumps(values)
    for name, written in marks.items():
        text = text.replace(name, written)
    if what == "text":
        place = draw(st.integers(0, len(text)))
        removed = draw(st.integers(0, 30))
        text = text[:place] + draw(WRITTEN) + text[place + removed :]
    return text, key


@pytest.fixture(scope="module")
def layers(tiny_model) -> list[str]:
    return list(lora.linear_layers(loading.load_on_meta(tiny_model)))


def written(key: str, value: str) -> tuple[str, str]:
    """The shipped file with one value, as YAML has it, in the place of its own."""
    values = json.loads(json.dumps(SHIPPED))
    *outer, last = key.split(".")
    around = values
    for part in outer:
        around = around[part]
    around[last] = "<0>"
    return json.dumps(values).replace('"<0>"', value), ".".join(outer) or key


@CASES
@given(changed_files())
@example(written("presets.local.model", "~nobody-by-this-name/x"))
@example(written("presets.local.model", "x" * 300))
@example(written("presets.local.dataset", '"a\\0b"'))
@example(written("methods.qlora.double_quant", "3"))
@example(written("seed", "'???'"))
@example(written("lora.layers", "0-999999999999"))
@example(written("lora.alpha", ".inf"))
@example(written("train.epochs", "1" + "0" * 30))
def test_any_params_file_is_read_right_or_refused_in_one_line(tmp_path, monkeypatch, layers, case):
    text, key = case
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(text, encoding="utf-8", errors="surrogatepass", newline="")

    def read() -> None:
        if key == "seed":
            assert 0 <= params.seed() < 2**64
        elif key in ("preset", "method"):
            assert isinstance(params.choice(key, f"{key}s"), str)
        else:
            found = params.section(key, SCHEMAS[key])
            check(found, key)
            use(found, key, layers)

    line = outcome(read)
    assert line is None or "params.yaml" in line


def check(found: object, key: str) -> None:
    """Every value is the one that the file holds, of the type that its schema names, and finite."""
    group = OmegaConf.to_container(OmegaConf.load("params.yaml"), resolve=True)
    for part in key.split("."):
        group = group[part]
    for field in fields(found):
        value, written = getattr(found, field.name), group[field.name]
        if field.type is not bool and not isinstance(written, str):
            assert not isinstance(value, bool) or "Any" in str(field.type)
        if field.type in (bool, "bool"):
            assert value is written
        elif isinstance(value, int | float):
            assert math.isfinite(value)
            assert value == (type(value)(written) if isinstance(written, str) else written)
        else:
            assert value == written or value == str(written)


def use(found: object, key: str, layers: list[str]) -> None:
    """The checks that stages make of a value with more than it to go by, before anything is loaded."""
    if isinstance(found, lora.LoraParams):
        assert lora.select_target_layers(layers, found)
    elif isinstance(found, tokenize.TokenizeParams):
        assert 0 < tokenize.choose_block_size(found.block_size, {"n_positions": tiny.POSITIONS}) <= tiny.POSITIONS
    elif isinstance(found, params.PresetParams):
        for name in ("model", "dataset"):
            if getattr(found, name) != local.SAMPLE:
                place = local.resolve_local_path(
                    f"{key}.{name}", getattr(found, name), getattr(found, f"{name}_revision", None)
                )
                assert place is None or place.exists()


PIECES = st.sampled_from(
    [
        *(b"\n", b"\r\n", b"\r", b"\0", b" \n", b"", b" = Title = \n", b" = = Part = = \n", b"<|endoftext|>", b"<unk>"),
        *("\ufeff", "\u2028", "\x85", "😀", "👩‍👩‍👧\n", "e\u0301", "\\ud800", "東京\n", "\u202e", "\x1b[0m", "\x1c"),
        *(b"\xff", b"\xed\xa0\x80", b"\xf0\x9f", b"\xc0\x80"),
    ]
).map(lambda piece: piece.encode() if isinstance(piece, str) else piece) | st.text(max_size=40).map(
    lambda text: text.encode(errors="surrogatepass")
)
GOOD = PIECES.filter(lambda piece: piece.decode("utf-8", "ignore").encode() == piece)
TEXTS = st.lists(GOOD, max_size=12).map(b"".join) | st.lists(PIECES, max_size=6).map(b"".join)


@pytest.fixture
def quick(monkeypatch, tmp_path, tiny_model):
    """A working directory whose stages leave out what no text changes: records of the machine, and fsync."""
    shutil.copyfile(tiny.ROOT / "params.yaml", tmp_path / "params.yaml")
    tiny.set_param(tmp_path, "preset", "local")
    tiny.set_param(tmp_path, "presets.local.dataset", "corpus")
    section = {name: params_section(tmp_path, name) for name in ("presets.local", "prepare", "tokenize")}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(params, "choice", lambda *_: "local")
    monkeypatch.setattr(params, "seed", lambda: 0)
    monkeypatch.setattr(params, "section", lambda key, schema: schema(**section[key]))
    monkeypatch.setattr(environment, "write_record", lambda *_, **__: None)
    monkeypatch.setattr(artifacts, "_fsync", lambda _: None)
    tokenizer = tokenizer_module.load_tokenizer(tiny_model)
    monkeypatch.setattr(tokenizer_module, "load_tokenizer", lambda _: tokenizer)
    return tokenizer, section


def params_section(folder: Path, key: str) -> dict:
    return OmegaConf.to_container(OmegaConf.select(OmegaConf.load(folder / "params.yaml"), key))


@CASES
@given(st.tuples(TEXTS, TEXTS, TEXTS), st.booleans(), st.sampled_from(tokenize.LAYOUTS), st.sampled_from([1, 7, 64]))
@example((b"a" * 2**20, b" x" * 2**19, "😀".encode() * 2**18), False, "packed", 64)
@example((b"a b\r\n" + b"\0" * 2**20, b"\n" * 2**20, b"x y\n" * 2**18), False, "padded", 64)
@example((b" = A = \n" + b"word " * 2**18, b"\n a b \n", b" = B = \n c d"), True, "packed", 64)
def test_any_text_becomes_its_tokens_or_is_refused_in_one_line(quick, tiny_model, texts, single, layout, block_size):
    tokenizer, section = quick
    section["tokenize"] |= {"layout": layout, "block_size": block_size}
    for folder in (*map(Path, ("corpus", "data")),):
        shutil.rmtree(folder, ignore_errors=True)
    Path("corpus").mkdir()
    section["presets.local"]["dataset"] = "corpus/all.txt" if single else "corpus"
    if single:
        Path("corpus/all.txt").write_bytes(b"".join(texts))
    else:
        for split, text in zip(blocks.SPLITS, texts, strict=True):
            Path("corpus", f"{split}.txt").write_bytes(text)

    if line_of(CliRunner().invoke(prepare.main, [])):
        assert not Path("data/raw").exists()
        assert single or not all(map(reads, texts))
        return
    assert single or all(map(reads, texts))
    raw = {split: Path("data/raw", f"{split}.txt").read_bytes() for split in blocks.SPLITS}
    if single:
        assert sorted(b"".join(raw.values())) == sorted(b"".join(texts))
    else:
        assert tuple(raw.values()) == texts

    if line := line_of(CliRunner().invoke(tokenize.main, ["--base", str(tiny_model)])):
        assert "split is empty" in line
        assert not Path("data/tokens").exists()
        return
    end = json.loads(Path("data/tokens/manifest.json").read_bytes())["end_of_text_id"]
    for split, content in raw.items():
        found = blocks.load_blocks(Path("data/tokens"), split)
        if layout == "packed":
            ids = [
                *found.ids[0, :1],
                *np.concatenate([row[1:length] for row, length in zip(*held(found), strict=True)]),
            ]
            assert tokenizer.decode([id for id in ids if id != end], skip_special_tokens=False) == content.decode()
        else:
            for line, row, length in zip(split_paragraphs(content.decode()), *held(found), strict=True):
                decoded = tokenizer.decode([id for id in row[:length] if id != end], skip_special_tokens=False)
                assert line.startswith(decoded.rstrip("\ufffd"))
                assert length > block_size or decoded == line


def held(found: blocks.Blocks) -> tuple[np.ndarray, np.ndarray]:
    return found.ids, found.lengths


def reads(text: bytes) -> bool:
    """Whether a text is UTF-8 and holds more than white space."""
    try:
        return bool(text.decode().strip())
    except UnicodeDecodeError:
        return False


# Values at the ends of what is allowed, and a little beyond

NEARLY_ALL = math.nextafter(1, 0)
EXTREMES = [
    ("tokenize", "tokenize.block_size", 1),
    ("tokenize", "tokenize.block_size", 2**62),
    ("train", "seed", 2**64 - 1),
    ("train", "lora.r", 2**62),
    ("train", "lora.alpha", 1e-320),
    ("train", "lora.alpha", 1e308),
    ("train", "lora.dropout", NEARLY_ALL),
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
    ("train", "train.learning_rate", 1e-320),
    ("train", "train.learning_rate", 1e308),
    ("train", "train.lora_plus_ratio", 1e308),
    ("train", "train.weight_decay", 1e308),
    ("train", "train.clip_norm", 1e-320),
    ("train", "train.clip_norm", 1e308),
    ("train", "train.warmup_fraction", NEARLY_ALL),
    ("train", "train.base_dropout", NEARLY_ALL),
    ("evaluate", "evaluate.batch_size", 2**62),
    ("evaluate", "evaluate.stride", 1),
    ("evaluate", "evaluate.stride", 2**62),
]


@pytest.mark.parametrize(("stage", "key", "value"), EXTREMES)
def test_an_extreme_value_does_its_work_or_is_refused_in_one_line(data, stage, key, value):
    tiny.set_param(Path.cwd(), key, value)
    line = line_of(
        CliRunner().invoke({"tokenize": tokenize, "train": train, "evaluate": evaluate}[stage].main, options(stage))
    )
    assert line is None or key in line or "train.learning_rate" in line  # which a loss that is not finite names
