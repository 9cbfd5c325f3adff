"""What a user can get wrong ends in one line and exit code 1, and leaves every earlier output as it was."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import tiny
import torch
from bad_input import contents, refusal
from click.testing import CliRunner

from gpt2lora.dataset import tokenizer
from gpt2lora.model import loading as loading_module
from gpt2lora.model.loading import AutoModelForCausalLM, load_fp32, load_on_meta, write_method
from gpt2lora.pipeline import cli
from gpt2lora.pipeline.artifacts import atomic_output
from stages import base, evaluate, prepare, tokenize, train

OUTPUTS = {"base": "data/base", "prepare": "data/raw", "tokenize": "data/tokens", "train": "data/adapter"}
BARE = {"PATH": os.environ["PATH"], "PYTHONPATH": ""}  # an environment in which only the interpreter decides


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def loading(folder: Path) -> click.Command:
    """A stage that does nothing but load a base, as train and evaluate do."""

    def main():
        """Load it."""
        load_on_meta(folder)
        loading_module.load_base(folder, None, torch.float32)

    return cli.command(main)


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model, tiny_corpus):
    """A working directory with outputs of an earlier run, and with a copy of the model and the corpus to break."""
    folder = tmp_path / "workplace"
    folder.mkdir()
    shutil.copyfile(tiny.ROOT / "params.yaml", folder / "params.yaml")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(tiny_corpus, folder / "corpus")
    for output in OUTPUTS.values():
        (folder / output).mkdir(parents=True)
        (folder / output / "earlier").write_text("output")
    (folder / "metrics").mkdir()
    for name in ("train.json", "train_timings.json", "loss.csv", "eval.json"):
        (folder / "metrics" / name).write_text("earlier output")
    for key, value in {
        "preset": "local",
        "presets.local.model": "model",
        "presets.local.dataset": "corpus",
        "tokenize.block_size": 32,
        "train.epochs": 1,
    }.items():
        tiny.set_param(folder, key, value)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def inputs(made):
    """The options of each stage that read the outputs of a run that went well."""
    reads = {
        "tokenize": ["raw", "base"],
        "train": ["tokens", "base"],
        "evaluate": ["raw", "tokens", "base", "adapter", "loss"],
    }
    return {stage: [part for name in names for part in (f"--{name}", made[name])] for stage, names in reads.items()}


# params.yaml


@pytest.mark.parametrize("stage", [base.main, prepare.main])
def test_an_unknown_preset(workplace, stage):
    tiny.set_param(workplace, "preset", "typo")
    assert refusal(stage) == "params.yaml: preset: expected one of gpt2, sample, local, not 'typo'"


def test_an_unknown_method(workplace, inputs):
    tiny.set_param(workplace, "method", "typo")
    line = refusal(train.main, *inputs["train"])
    assert line == "params.yaml: method: expected one of lora, qlora, full, not 'typo'"


def test_a_method_of_the_users_own(workplace, inputs):
    tiny.set_param(workplace, "methods", {"mine": {}})
    tiny.set_param(workplace, "method", "mine")
    line = refusal(train.main, *inputs["train"])
    assert line == "params.yaml: method: expected one of lora, qlora, full, not 'mine'"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.learning_rate", 0.0, "a number above 0"),
        ("train.learning_rate", -1e-3, "a number above 0"),
        ("lora.r", 0, "an integer above 0"),
        ("train.epochs", 0, "an integer above 0"),
        ("lora.dropout", 1.0, "a number of at least 0, below 1"),
        ("seed", -1, "an integer of at least 0"),
    ],
)
def test_a_value_that_cannot_train(workplace, inputs, key, value, expected):
    tiny.set_param(workplace, key, value)
    line = refusal(train.main, *inputs["train"])
    assert line.startswith(f"params.yaml: {key}: expected {expected}")
    assert line.endswith(f", not {value!r}")


def test_a_layer_that_does_not_exist(workplace, inputs):
    tiny.set_param(workplace, "lora.target_modules", ["q_proj"])
    line = refusal(train.main, *inputs["train"])
    kinds = "attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj"
    assert line == f"params.yaml: lora.target_modules: expected all-linear or names among {kinds}, not 'q_proj'"


def test_layers_that_do_not_exist(workplace, inputs):
    tiny.set_param(workplace, "lora.layers", "1-5")
    line = refusal(train.main, *inputs["train"])
    assert line == "params.yaml: lora.layers: expected all, or numbers from 0 to 1, the layers of this model, not 2"


@pytest.mark.parametrize(
    ("method", "init", "why"),
    [
        ("qlora", "pissa", "default, orthogonal or loftq with method qlora: pissa takes floats out of the base"),
        ("qlora", "olora", "default, orthogonal or loftq with method qlora: olora takes floats out of the base"),
        ("lora", "loftq", "another init with method lora: loftq corrects the error of a quantized base"),
    ],
)
def test_an_init_that_needs_another_base(workplace, inputs, method, init, why):
    tiny.set_param(workplace, "method", method)
    tiny.set_param(workplace, "lora.init", init)
    assert refusal(train.main, *inputs["train"]) == f"params.yaml: lora.init: expected {why}, not {init!r}"


def test_a_rank_above_that_of_the_layers(workplace, inputs):
    tiny.set_param(workplace, "lora.init", "pissa")
    tiny.set_param(workplace, "lora.r", 65)
    line = refusal(train.main, *inputs["train"])
    assert line == "params.yaml: lora.r: expected at most 64, the rank of the smallest layer, with this init, not 65"


def test_a_rate_for_factors_that_full_does_not_have(workplace, inputs):
    tiny.set_param(workplace, "method", "full")
    tiny.set_param(workplace, "train.lora_plus_ratio", 16.0)
    line = refusal(train.main, *inputs["train"])
    assert line == "params.yaml: train.lora_plus_ratio: expected 1 with full, not 16.0"


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [
        ("qlora", "lora.target_modules", ["q_proj"]),
        ("qlora", "lora.layers", [7]),
        ("qlora", "lora.init", "pissa"),
        ("qlora", "lora.bits", 2),
        ("qlora", "methods.qlora.bits", 5),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    workplace, inputs, monkeypatch, method, key, value
):
    monkeypatch.setattr(loading_module, "load_base", lambda *_: pytest.fail("the base was loaded"))
    tiny.set_param(workplace, "method", method)
    tiny.set_param(workplace, key, value)
    assert refusal(train.main, *inputs["train"]).startswith(f"params.yaml: {key}: ")


def test_a_block_longer_than_the_model_reads(workplace, inputs):
    tiny.set_param(workplace, "tokenize.block_size", 65)
    line = refusal(tokenize.main, *inputs["tokenize"])
    assert line == "params.yaml: tokenize.block_size: expected at most 64, the model's n_positions, not 65"


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere", "two words"])
@pytest.mark.parametrize(("stage", "key"), [(base.main, "model"), (prepare.main, "dataset")])
def test_a_path_that_does_not_exist(workplace, stage, key, path):
    tiny.set_param(workplace, f"presets.local.{key}", path)
    line = refusal(stage)
    assert line == f"params.yaml: presets.local.{key}: {path!r} does not exist, seen from {workplace}"


@pytest.mark.parametrize(("stage", "key"), [(base.main, "model"), (prepare.main, "dataset")])
def test_a_preset_that_names_nothing(workplace, stage, key):
    tiny.set_param(workplace, f"presets.local.{key}", None)
    assert refusal(stage) == f"params.yaml: presets.local.{key}: expected a folder or an id on the hub, not None"


@pytest.mark.parametrize(("stage", "key"), [(base.main, "model"), (prepare.main, "dataset")])
def test_a_revision_of_a_folder(workplace, stage, key):
    tiny.set_param(workplace, f"presets.local.{key}_revision", "main")
    line = refusal(stage)
    assert line.startswith(f"params.yaml: presets.local.{key}_revision: expected null, ")


# The corpus


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_text_that_is_not_utf8_by_its_file_and_byte(workplace, name):
    file = workplace / "corpus" / f"{name}.txt"
    text = file.read_bytes()
    file.write_bytes(text[:1234] + b"\xff" + text[1234:])
    assert refusal(prepare.main).startswith(f"corpus/{name}.txt: not UTF-8 at byte 1,234: ")


def test_a_single_text_that_is_not_utf8(workplace):
    (workplace / "corpus.txt").write_bytes("naïve".encode("latin-1"))
    tiny.set_param(workplace, "presets.local.dataset", "corpus.txt")
    assert refusal(prepare.main).startswith("corpus.txt: not UTF-8 at byte 2: ")


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_a_corpus_without_one_of_its_splits(workplace, name):
    (workplace / "corpus" / f"{name}.txt").unlink()
    expected = "validation.txt or valid.txt or dev.txt" if name == "valid" else f"{name}.txt"
    assert refusal(prepare.main).startswith(f"corpus: no {expected}: expected train.txt, ")


@pytest.mark.parametrize("text", ["", " \n\n \n"], ids=["no bytes", "white space"])
@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("valid", "validation"), ("test", "test")])
def test_an_empty_split(workplace, name, split, text):
    (workplace / "corpus" / f"{name}.txt").write_text(text)
    line = f"corpus: the {split} split is empty: add text, or raise the shares under prepare"
    assert refusal(prepare.main) == line


# The model


def test_a_model_without_a_configuration(workplace):
    (workplace / "model" / "config.json").unlink()
    assert refusal(base.main).startswith("model: no config.json: ")


@pytest.mark.parametrize("left", ["", "vocab.json", "merges.txt"])
def test_a_model_without_a_tokenizer(workplace, left):
    folder = workplace / "model"
    parts = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    if left == "vocab.json":
        (folder / left).write_text(json.dumps(parts["vocab"]))
    if left == "merges.txt":
        (folder / left).write_text("".join(f"{one} {other}\n" for one, other in parts["merges"]))
    line = refusal(base.main)
    assert line == "model: no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"


def test_a_model_with_a_damaged_tokenizer(workplace):
    (workplace / "model" / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in refusal(base.main)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_model_with_pickled_weights_only(workplace, name):
    (workplace / "model" / "model.safetensors").rename(workplace / "model" / name)
    line = refusal(base.main)
    assert line.startswith(f"model: no *.safetensors ({name}: pickled weights can run code, so they are refused)")


@pytest.fixture
def with_code(workplace, monkeypatch):
    """A function that gives the model code of its own, of this type, which says when it is run."""
    file = workplace / "model" / "config.json"

    def bring(kind: str) -> None:
        code = {"AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": kind, "auto_map": code}))
        (workplace / "model" / "modeling_own.py").write_text("raise SystemExit('the code that came with it ran')\n")

    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    return bring


def test_a_model_that_needs_code_of_its_own(with_code):
    with_code("own")
    line = refusal(base.main)
    assert line == "model: transformers has no language model 'own', and code that comes with a model is never run"
    for load in (load_on_meta, load_fp32):
        with pytest.raises(cli.StageError, match="code that comes with a model is never run"):
            load(Path("model"), *[Path("model")] * (load is load_fp32))


def test_a_model_that_brings_code_and_does_not_need_it(with_code):
    with_code("gpt2")
    result = CliRunner().invoke(base.main, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert type(load_fp32(Path("model"), Path("model"))).__name__ == "GPT2LMHeadModel"
    assert not list(Path("data/base").glob("*.py"))


def test_pickles_and_code_beside_the_weights_are_left_behind(workplace):
    strangers = {"pytorch_model.bin", "modeling_gpt2.py", "tf_model.h5", "tokenizer.pkl", "tokenizer_gpt.py"}
    own = {path.name for path in (workplace / "model").iterdir()}
    for name in strangers:
        (workplace / "model" / name).write_text("never read")
    result = CliRunner().invoke(base.main, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path.name for path in Path("data/base").iterdir()} == own | {"manifest.json"}


def test_tokens_that_were_added_to_a_slow_tokenizer_stay_tokens(workplace):
    source = workplace / "model"
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "vocab.json").write_text(json.dumps(vocabulary["vocab"]))
    (source / "merges.txt").write_text("\n".join(" ".join(pair) for pair in vocabulary["merges"]))
    (source / "added_tokens.json").write_text(json.dumps({"<extra>": len(vocabulary["vocab"])}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))
    assert CliRunner().invoke(base.main, catch_exceptions=False).exit_code == 0
    made = tokenizer.load_tokenizer(Path("data/base"))
    assert made.token_to_id("<extra>") == len(vocabulary["vocab"])


def test_a_model_whose_weights_are_damaged(workplace):
    """As from a clone without Git LFS."""
    (workplace / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "model.safetensors" in refusal(base.main)


def test_a_tokenizer_with_more_tokens_than_the_model(workplace):
    file = workplace / "model" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vocab_size": 299}))
    line = refusal(base.main)
    assert line == "model: the tokenizer has an id 299, the embedding only 299 rows: not a pair"


def test_a_model_that_is_no_language_model(workplace):
    (workplace / "model" / "config.json").write_text("{}")
    assert refusal(base.main).startswith("model: config.json holds no vocab_size: ")


@pytest.mark.parametrize(("key", "value"), [("n_positions", -3), ("n_positions", "64"), ("vocab_size", "300")])
def test_a_size_that_is_none(workplace, key, value):
    change(workplace / "model" / "config.json", **{key: value})
    assert refusal(base.main) == f"model: config.json: {key} is {value!r}: expected an integer above 0"


def test_a_token_whose_id_has_no_row(workplace):
    """Fewer tokens than rows, one of them far behind the last row."""
    file = workplace / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 70_000
    file.write_text(json.dumps(content))
    assert refusal(base.main) == "model: the tokenizer has an id 70,000, the embedding only 300 rows: not a pair"


def test_a_vocabulary_that_is_cut_off(workplace):
    (workplace / "model" / "tokenizer.json").unlink()
    (workplace / "model" / "vocab.json").write_text('{"a": ')
    (workplace / "model" / "merges.txt").write_text("#version: 0.2\na b\n")
    assert refusal(base.main).startswith("model: the tokenizer's files are damaged: ")


@pytest.mark.parametrize("settings", ["{", "[]", '{"eos_token": {}}', '{"eos_token": 1}'])
def test_a_tokenizer_without_an_end_of_text(workplace, made, settings):
    model = shutil.copytree(made["base"], workplace / "broken")
    (model / "manifest.json").unlink()
    (model / "tokenizer_config.json").write_text(settings)
    change(model / "config.json", eos_token_id=None)
    line = refusal(tokenize.main, "--raw", made["raw"], "--base", model)
    assert "broken" in line and ("end-of-text" in line or "is damaged" in line)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"n_embd": 32},
            "transformer.h.0.attn.c_attn.bias is (192,) in *.safetensors, (96,) by config.json: not a pair",
        ),
        ({"n_layer": 4}, "lack 24 of the model's weights, transformer.h.2.attn.c_attn.bias first"),
        ({"n_head": 3}, "divisible"),
        ({"activation_function": "none such"}, "none such"),
        ({"model_type": "t5"}, "transformers itself cannot load this model"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_the_weights(workplace, made, changes, said):
    broken = shutil.copytree(made["base"], workplace / "broken")
    change(broken / "config.json", **changes)
    result = CliRunner().invoke(loading(broken))
    assert result.exit_code == 1, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and str(broken) in line and said in line


def test_weights_that_the_files_lack_are_not_made_up(workplace, made):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(made["base"], workplace / "broken")
    values = load_file(broken / "model.safetensors")
    values.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(values, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        cli.StageError, match=r"lack 1 of the model's weights, transformer\.h\.1\.mlp\.c_fc\.weight first"
    ):
        loading_module.load_base(broken, None, torch.float32)


# Stages out of order


@pytest.mark.parametrize(
    ("stage", "option", "maker"),
    [
        ("tokenize", "--raw", "prepare"),
        ("tokenize", "--base", "base"),
        ("train", "--tokens", "tokenize"),
        ("train", "--base", "base"),
        ("evaluate", "--raw", "prepare"),
        ("evaluate", "--tokens", "tokenize"),
        ("evaluate", "--base", "base"),
        ("evaluate", "--adapter", "train"),
        ("evaluate", "--loss", "train"),
    ],
)
def test_an_input_that_was_not_made_yet_by_the_stage_that_makes_it(workplace, inputs, stage, option, maker):
    main = {"tokenize": tokenize.main, "train": train.main, "evaluate": evaluate.main}[stage]
    line = refusal(main, *inputs[stage], option, "nowhere")
    assert line.startswith("nowhere")
    assert line.endswith(f"is missing: run `dvc repro {maker}`, or python -m stages.{maker}")


def test_token_arrays_that_are_damaged(workplace, inputs, made):
    shutil.copytree(made["tokens"], workplace / "tokens")
    (workplace / "tokens" / "train.npy").write_bytes(b"no array")
    line = refusal(train.main, *inputs["train"], "--tokens", "tokens")
    assert line.startswith("tokens/train.npy is damaged")


# Training that fails


@pytest.mark.parametrize("batch_size", [8, 10_000], ids=["several steps", "one step"])
def test_a_learning_rate_at_which_the_loss_explodes(workplace, inputs, batch_size):
    tiny.set_param(workplace, "train.learning_rate", 1e30)
    tiny.set_param(workplace, "train.batch_size", batch_size)
    line = refusal(train.main, *inputs["train"])
    assert "loss is nan" in line
    assert "lower train.learning_rate" in line


def test_a_model_that_is_broken(workplace, inputs, made):
    from safetensors.torch import load_file, save_file

    shutil.copytree(made["adapter"], workplace / "broken")
    file = workplace / "broken" / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}, file)
    write_method(workplace / "broken", "lora", None, made["base"])
    line = refusal(evaluate.main, *inputs["evaluate"], "--adapter", "broken")
    assert line == "evaluate: the loss is nan: the model is broken; train again with a lower learning rate"


# The machine


@pytest.fixture
def full_disk(tmp_path, request):
    """A disk of its own that holds the outputs of an earlier run and has room for so many more KB."""
    disk = tmp_path / "disk"
    with tiny.mounted(disk, "64k"):
        for name in ("folder", "metrics"):
            (disk / name).mkdir()
            for file in ("earlier", "train.json", "train_timings.json", "loss.csv"):
                (disk / name / file).write_text("earlier output")
        (disk / "eval.json").write_text("earlier output")
        with pytest.raises(OSError, match="No space left"):
            (disk / "filling").write_bytes(bytes(2**17))
        os.truncate(disk / "filling", (disk / "filling").stat().st_size - 1024 * request.param)
        yield disk


@pytest.mark.parametrize(
    ("name", "full_disk"),
    [*((name, room) for name in ("base", "prepare", "tokenize", "train", "full") for room in (0, 8)), ("evaluate", 0)],
    indirect=["full_disk"],
)
def test_a_full_disk(workplace, inputs, full_disk, name):
    stage = "train" if name == "full" else name
    tiny.set_param(workplace, "method", "full" if name == "full" else "lora")
    main = {"base": base, "prepare": prepare, "tokenize": tokenize, "train": train, "evaluate": evaluate}[stage].main
    outputs = {"train": ["--out", full_disk / "folder", "--metrics", full_disk / "metrics"]}
    outputs["evaluate"] = ["--out", full_disk / "eval.json"]
    live = str(full_disk / "metrics/loss.csv")  # written at each validation, so it shows the run that failed
    before = {name: content for name, content in contents(full_disk).items() if name != live}
    line = refusal(main, *inputs.get(stage, ()), *outputs.get(stage, ["--out", full_disk / "folder"]))
    assert "No space left on device" in line
    assert str(full_disk) in line
    assert {name: content for name, content in contents(full_disk).items() if name != live} == before


def test_an_output_below_a_file(workplace, inputs):
    (workplace / "data" / "file").write_text("a file")
    line = refusal(tokenize.main, *inputs["tokenize"], "--out", "data/file/tokens")
    assert "data/file" in line and line.endswith("no output is half written")


def test_too_little_memory_of_the_cpu(workplace, inputs, monkeypatch):
    def fail(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(loading_module, "load_for_training", fail)
    assert refusal(train.main, *inputs["train"]).startswith("out of memory on the CPU: lower lora.r or ")


def test_too_little_memory_for_the_model_is_not_a_model_that_cannot_be_loaded(workplace, inputs, monkeypatch):
    def fail(*_, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert refusal(train.main, *inputs["train"]).startswith("out of memory on the CPU: lower lora.r or ")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_an_output_that_cannot_be_written(workplace, monkeypatch, number):
    def refuse(path, data):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert os.strerror(number) in refusal(prepare.main)


def test_an_interpreter_without_the_packages():
    # -S: without site-packages, as an interpreter outside the environment.
    arguments = [sys.executable, "-S", "-m", "stages.train"]
    done = subprocess.run(arguments, cwd=tiny.ROOT, env=BARE, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "has no click and no omegaconf: activate the environment first" in line


@pytest.mark.parametrize("package", ["torch", "transformers", "peft"])
def test_an_environment_without_one_of_the_packages(workplace, inputs, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("model.lora", "model.loading", "model.head", "model.device", "training.loop"):
        folder, _, file = name.partition(".")
        monkeypatch.delitem(sys.modules, f"gpt2lora.{name}", raising=False)
        monkeypatch.delattr(sys.modules[f"gpt2lora.{folder}"], file, raising=False)
    line = refusal(train.main, *inputs["train"])
    assert line == f"{sys.executable} has no package {package}: `make install`, then activate .venv"


def test_the_line_is_all_there_is_on_a_terminal(workplace):
    tiny.set_param(workplace, "preset", "typo")
    environment = BARE | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-m", "stages.base"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "Error: params.yaml: preset: expected one of gpt2, sample, local, not 'typo'\n"


def test_an_error_of_the_program_keeps_its_traceback(workplace, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(prepare, "read_folder", broken)
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(prepare.main, catch_exceptions=False)


# Whole outputs or none


@pytest.fixture(params=["folder", "file"])
def target(tmp_path, request):
    """An earlier output in a folder of its own."""
    path = tmp_path / "out" / "target"
    if request.param == "folder":
        path.mkdir(parents=True)
        (path / "old").write_text("old")
    else:
        path.parent.mkdir()
        path.write_text("old")
    return path


def write(target: Path, new: Path) -> None:
    if target.is_dir():
        new.mkdir()
        (new / "new").write_text("new")
    else:
        new.write_text("new")


def test_a_whole_output_takes_the_place_of_the_old(target):
    folder = target.is_dir()
    with atomic_output(target) as new:
        write(target, new)
        assert (target / "old" if folder else target).read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    assert (target / "new" if folder else target).read_text() == "new"
    assert not folder or [path.name for path in target.iterdir()] == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_old_output_and_nothing_else(target, error):
    before = contents(target.parent)
    with pytest.raises(error), atomic_output(target) as new:
        write(target, new)
        raise error
    assert contents(target.parent) == before


def test_a_block_that_writes_nothing_leaves_the_old_output(target):
    before = contents(target.parent)
    with pytest.raises(FileNotFoundError), atomic_output(target):
        pass
    assert contents(target.parent) == before


def test_what_a_killed_run_left_behind_is_cleared_away(target):
    for word in ("new", "old"):
        (target.parent / f".target.{word}").mkdir()
        (target.parent / f".target.{word}" / "half").write_text("half")
    with atomic_output(target) as new:
        assert not new.exists()
        write(target, new)
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_first_output_makes_its_folder(tmp_path):
    with atomic_output(tmp_path / "a" / "b" / "numbers.npy") as file:
        np.save(file.open("wb"), np.arange(3))
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["numbers.npy"]


def test_a_line_stays_a_line_whatever_an_error_says():
    assert cli.StageError("one\n  two\nthree").format_message() == "one two three"
