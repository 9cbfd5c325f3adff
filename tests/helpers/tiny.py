"""A tiny model, a tiny corpus and a temporary copy of the project that uses them: whole runs take seconds."""

import contextlib
import functools
import io
import json
import operator
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WHO = {"NAME": "Test", "EMAIL": "test@example.com"}
END = "<|endoftext|>"
VOCABULARY, POSITIONS = 300, 64
SPLITS = {"train": 40, "valid": 6, "test": 6}  # articles
SUBJECTS = "the river", "a small town", "the old king", "this song", "the northern army", "a young writer"
VERBS = "reached", "left", "described", "followed", "remembered", "crossed"
OBJECTS = "the quiet valley", "a broken bridge", "the last season", "two other cities", "its first album", "the coast"


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """Write train.txt, valid.txt and test.txt in WikiText's form: a few words, so that there is something to learn."""
    pick = random.Random(seed)

    def paragraph() -> str:
        words = ([pick.choice(SUBJECTS), pick.choice(VERBS), pick.choice(OBJECTS), "."] for _ in range(4))
        return " " + " ".join(word for sentence in words for word in sentence) + " \n"

    def article(number: int) -> str:
        title = f" = {pick.choice(OBJECTS).title()} {number} = "
        return f" \n{title}\n \n{paragraph()} \n = = History = = \n \n{paragraph()}"

    folder.mkdir(parents=True)
    for split, articles in SPLITS.items():
        text = "".join(article(number) for number in range(articles)) + " \n"
        (folder / f"{split}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


def write_model(folder: Path, corpus: Path, seed: int = 0, spread: float = 0.02) -> Path:
    """Write an untrained GPT-2 of 120,000 parameters, with a byte-level BPE of the corpus.

    spread: standard deviation of the weights; at GPT-2's own 0.02 so small a model predicts nearly alike everywhere.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train(
        [str(corpus / "train.txt")],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    end = tokenizer.token_to_id(END)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=POSITIONS,
        n_layer=2,
        n_embd=64,  # a multiple of 64: see check_width in gpt2lora/model/quantization.py
        n_head=2,
        initializer_range=spread,
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, base: Path, quantization=None, **changes) -> Path:
    """Write what `train` would leave in data/adapter, with random values; `changes` are of the section lora."""
    import torch

    from gpt2lora.model import loading, lora

    chosen = low_rank(**changes)
    network = lora.attach_lora(loading.load_base(base, quantization, torch.float32), chosen)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * (0.1 if "lora_" in name else 0.02)
    folder.mkdir(parents=True)
    lora.save_adapter(network, chosen, {}, folder)
    loading.write_method(folder, "lora" if quantization is None else "qlora", quantization, base)
    return folder


def copy_project(folder: Path) -> None:
    """Copy the working tree into a repository of its own, with nothing committed yet."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # a file that was deleted and not yet committed is listed, too
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    run(folder, "git", "init", "--quiet", "--initial-branch=main")


def make_project(folder: Path, model: Path, corpus: Path) -> Path:
    """Make a copy of the working tree, committed, that trains `model` on `corpus` in one epoch; nothing has run yet."""
    copy_project(folder)
    for key, value in {
        "preset": "local",
        "presets.local.model": str(model),
        "presets.local.dataset": str(corpus),
        "tokenize.block_size": 32,
        "train.epochs": 1,
        "train.validations": 1,
        "train.precision": "fp32",
        "evaluate.precision": "fp32",
    }.items():
        set_param(folder, key, value)
    commit(folder, "A tiny project")
    return folder


def write_begin_of_text(folder: Path, model: Path, template: str | None = f"{END} $A") -> Path:
    """Copy a model, with a tokenizer that puts a token before each text. template: for tokenizers; $A is the text."""
    from tokenizers import Tokenizer, processors

    shutil.copytree(model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template:
        special = [(END, tokenizer.token_to_id(END))]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@contextlib.contextmanager
def mounted(disk: Path, size: str) -> Iterator[None]:
    """Make a small disk of a folder; skip the test where that takes rights that nobody has here."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},uid={os.getuid()},gid={os.getgid()}", "tmpfs", str(disk)]
    for rights in ([], ["sudo", "-n"]):
        command = [*rights, *mount]
        if shutil.which(command[0]) and subprocess.run(command, capture_output=True).returncode == 0:
            try:
                yield
            finally:
                subprocess.run([*rights, "umount", str(disk)], check=True)
            return
    pytest.skip("mounting a small disk takes the rights of root")


def low_rank(**changes):
    """The section lora of params.yaml: small, without dropout, and with `changes`."""
    from omegaconf import OmegaConf

    from gpt2lora.pipeline.schemas import LoraParams

    values = OmegaConf.to_container(OmegaConf.load(ROOT / "params.yaml").lora)
    return LoraParams(**values | {"r": 4, "alpha": 8, "dropout": 0.0} | changes)


def train_params(**changes):
    """The section train of params.yaml: one epoch in fp32, without checkpoints, and with `changes`."""
    from gpt2lora.pipeline.schemas import TrainParams

    values = {
        "epochs": 1,
        "batch_size": 4,
        "accumulation_steps": 1,
        "learning_rate": 1e-2,
        "lora_plus_ratio": 1.0,
        "warmup_fraction": 0.1,
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "base_dropout": 0.0,
        "precision": "fp32",
        "compile": "auto",
        "deterministic": False,
        "validations": 2,
        "patience": None,
        "checkpoint_every": 0,
        "seed": None,
    }
    return TrainParams(**values | changes)


def set_param(project: Path, key: str, value: Any) -> None:
    """Change one value in a project's params.yaml, which keeps its comments."""
    file = project / "params.yaml"
    file.write_text(changed_yaml(file.read_text(encoding="utf-8"), key, json.dumps(value)), encoding="utf-8")


@functools.cache  # hundreds of tests begin with the same changes of the same file
def changed_yaml(text: str, key: str, value: str) -> str:
    """Change one value in the text of params.yaml; `value` is JSON, so that 1, 1.0 and true differ."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 1000
    yaml.indent(mapping=2, sequence=4, offset=2)
    values = yaml.load(text)
    *sections, last = key.split(".")
    section = functools.reduce(operator.getitem, sections, values)
    assert last in section, f"params.yaml has no {key}"
    section[last] = json.loads(value)
    changed = io.StringIO()
    yaml.dump(values, changed)
    return changed.getvalue()


def commit(project: Path, message: str) -> None:
    run(project, "git", "add", "--all")
    run(project, "git", "-c", "user.name=Test", "-c", "user.email=test@example.com", "commit", "--quiet", "-m", message)


def run(project: Path, *command: str, fails: bool = False, **variables: str) -> str:
    """Run a command in a project; return what it printed, errors included."""
    done = subprocess.run(
        command,
        cwd=project,
        # Git looks no further up than the project: a `git clean` here never reaches another repository.
        env=environment() | {"GIT_CEILING_DIRECTORIES": str(project.parent)} | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    assert (done.returncode != 0) == fails, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


def environment() -> dict[str, str]:
    """The user's environment as after activating this interpreter's, with no settings that change what is tested."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "GIT_", "HF_"))}
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        **{f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in WHO.items()},
    }
