"""The schema of each section of params.yaml. No check needs torch, so that every stage can check the whole file first.

A stage reads the sections that it declares in dvc.yaml. What `check_params` reads beyond them decides nothing but
whether the stage refuses to run.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from gpt2lora.pipeline import params
from gpt2lora.pipeline.adapter_files import check_start
from gpt2lora.pipeline.context import choose_block_size, choose_stride

LAYOUTS = ("packed", "padded")
PROTOCOLS = ("native", "hf", "lm-eval")
MAX_RANK = 2**16  # more than any matrix of a language model has
FROM_BASE = ("pissa", "olora")  # these initial values move a part of W into the adapter
INITS = ("default", *FROM_BASE, "orthogonal", "loftq")


@dataclass
class PrepareParams:
    """The section `prepare`."""

    document_separator: str | None  # between the documents of a text; None: articles begin at titles
    fraction: float  # share of each split's documents to keep
    validation_share: float  # of a corpus without this split
    test_share: float

    def __post_init__(self):
        params.require(0 < self.fraction <= 1, "prepare.fraction", self.fraction, "a number above 0, at most 1")
        for name in ("validation_share", "test_share"):
            share = getattr(self, name)
            params.require(0 < share < 1, f"prepare.{name}", share, "a number between 0 and 1")
        both = self.validation_share + self.test_share
        params.require(both < 1, "prepare.validation_share + test_share", both, "a sum below 1")
        separator = self.document_separator
        params.require(separator != "", "prepare.document_separator", separator, "a string, or null")
        # Neither a shell nor `dvc exp run -S` makes a line end of these two letters.
        self.document_separator = separator and separator.replace("\\n", "\n").replace("\\t", "\t")


@dataclass
class TokenizeParams:
    """The section `tokenize`."""

    block_size: int | None
    layout: str
    special_tokens: bool

    def __post_init__(self):
        valid = self.block_size is None or self.block_size > 0
        params.require(valid, "tokenize.block_size", self.block_size, "an integer above 0, or null")
        params.require(self.layout in LAYOUTS, "tokenize.layout", self.layout, f"one of {', '.join(LAYOUTS)}")


@dataclass
class NoParams:
    """The sections methods.lora and methods.full, which have no keys."""


@dataclass
class QuantizationParams:
    """The section methods.qlora: how the frozen base is stored (Dettmers et al., 2023, arXiv:2305.14314)."""

    bits: int
    quant_type: str
    double_quant: bool

    def __post_init__(self):
        params.require(self.bits in (4, 8), "methods.qlora.bits", self.bits, "4 or 8")
        known = self.quant_type in ("nf4", "fp4")
        params.require(known, "methods.qlora.quant_type", self.quant_type, "nf4 or fp4")
        single = "false with 8 bits, which have no scales of scales"
        params.require(self.bits == 4 or not self.double_quant, "methods.qlora.double_quant", self.double_quant, single)


@dataclass
class LoraParams:
    """The section `lora`."""

    r: int
    alpha: float
    dropout: float
    target_modules: Any  # "all-linear", or a list of names
    layers: Any  # "all", a number, a range such as "6-11", or a list of numbers
    bits: int
    use_rslora: bool
    use_dora: bool
    init: str
    start_from: str | None

    def __post_init__(self):
        params.require(self.r > 0, "lora.r", self.r, "an integer above 0")
        params.require(self.r <= MAX_RANK, "lora.r", self.r, f"at most {MAX_RANK:,}")
        params.require(0 < self.alpha <= 1e9, "lora.alpha", self.alpha, "a number above 0, at most 1e9")
        params.require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "a number of at least 0, below 1")
        named = isinstance(self.target_modules, list) and all(isinstance(name, str) for name in self.target_modules)
        good = self.target_modules == "all-linear" or (named and self.target_modules)
        params.require(good, "lora.target_modules", self.target_modules, "all-linear or a list of module names")
        form = "all, a range such as 6-11, or a list of numbers such as [0, 11]"
        params.require(parse_layers(self.layers) != [], "lora.layers", self.layers, form)
        params.require(self.bits in (16, 8, 4), "lora.bits", self.bits, "16 (not quantized), 8 or 4")
        params.require(self.init in INITS, "lora.init", self.init, f"one of {', '.join(INITS)}")
        if self.init in FROM_BASE:
            kept = "16: the base takes part in this init, so the adapter is converted when it is saved"
            params.require(self.bits == 16, f"lora.bits with init {self.init}", self.bits, kept)
            whole = "0: the adapter holds a part of the base, which dropout would drop"  # measured in docs/methods.md
            params.require(self.dropout == 0, f"lora.dropout with init {self.init}", self.dropout, whole)
        if self.init == "orthogonal":
            params.require(self.r % 2 == 0, "lora.r with init orthogonal", self.r, "an even number")
        if self.start_from is not None:
            params.require(self.start_from.strip(), "lora.start_from", self.start_from, "a folder, or null")
            given = "default, since lora.start_from gives the initial values"
            params.require(self.init == "default", "lora.init", self.init, given)
        if self.init == "loftq":
            fixed = "false: DoRA takes its magnitudes from the quantized base, which loftq corrects"
            params.require(not self.use_dora, "lora.use_dora with init loftq", self.use_dora, fixed)


def parse_layers(layers: Any) -> list[int] | None:
    """Return the layer numbers that lora.layers stands for: None for all, [] for an invalid value."""
    if layers == "all":
        return None
    if isinstance(layers, str) and (ends := re.fullmatch(r"\s*(\d{1,4})\s*(?:-\s*(\d{1,4})\s*)?", layers)):
        return list(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    numbers = layers if isinstance(layers, list) else [layers]
    return numbers if all(type(number) is int and number >= 0 for number in numbers) else []


@dataclass
class TrainParams:
    """The section `train`; params.yaml says what each key means."""

    epochs: int
    batch_size: int
    accumulation_steps: int
    learning_rate: float
    lora_plus_ratio: float
    warmup_fraction: float
    weight_decay: float
    clip_norm: float
    base_dropout: float
    precision: str
    compile: str
    deterministic: bool
    validations: int
    patience: int | None
    checkpoint_every: int | None
    seed: int | None

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulation_steps", "validations"):
            params.require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "an integer above 0")
        for name in ("learning_rate", "lora_plus_ratio", "clip_norm"):
            number = getattr(self, name)
            params.require(0 < number < math.inf, f"train.{name}", number, "a number above 0")
        for name in ("warmup_fraction", "base_dropout"):
            share = getattr(self, name)
            params.require(0 <= share < 1, f"train.{name}", share, "a number of at least 0, below 1")
        valid = self.patience is None or self.patience > 0
        params.require(valid, "train.patience", self.patience, "an integer above 0, or null")
        valid = self.checkpoint_every is None or self.checkpoint_every >= 0
        params.require(valid, "train.checkpoint_every", self.checkpoint_every, "an integer of at least 0, or null")
        params.require(0 <= self.weight_decay < math.inf, "train.weight_decay", self.weight_decay, "0 or more")
        known = self.precision in params.PRECISIONS
        params.require(known, "train.precision", self.precision, f"one of {', '.join(params.PRECISIONS)}")
        known = self.compile in ("auto", "always", "never")
        params.require(known, "train.compile", self.compile, "auto, always or never")
        valid = self.seed is None or 0 <= self.seed < 2**64
        params.require(valid, "train.seed", self.seed, f"{params.SEED}, or null")


@dataclass
class EvaluateParams:
    """The section `evaluate`."""

    protocol: str
    stride: int | None
    batch_size: int | None
    precision: str

    def __post_init__(self):
        known = self.protocol in PROTOCOLS
        params.require(known, "evaluate.protocol", self.protocol, f"one of {', '.join(PROTOCOLS)}")
        for name in ("stride", "batch_size"):
            number = getattr(self, name)
            valid = number is None or number > 0
            params.require(valid, f"evaluate.{name}", number, "an integer above 0, or null")
        known = self.precision in params.PRECISIONS
        params.require(known, "evaluate.precision", self.precision, f"one of {', '.join(params.PRECISIONS)}")
        fixed = self.protocol == "lm-eval" and self.stride is not None
        params.require(not fixed, "evaluate.stride", self.stride, "null, since lm-eval has a stride of its own")


METHODS = {"lora": NoParams, "qlora": QuantizationParams, "full": NoParams}
SECTIONS = {
    "prepare": PrepareParams,
    "tokenize": TokenizeParams,
    "lora": LoraParams,
    "train": TrainParams,
    "evaluate": EvaluateParams,
}


def check_params() -> None:
    """Check the whole of params.yaml, as every stage does first: what a later stage would refuse is refused now.

    Raises:
        StageError: names the key, its value and what was expected.
    """
    params.seed()
    params.choice("preset", "presets")
    method = params.choice("method", "methods")
    params.require(method in METHODS, "method", method, f"one of {', '.join(METHODS)}")
    params.check_names("", ("preset", "method", "seed", "presets", "methods", *SECTIONS))
    for name in params.check_names("methods", METHODS):
        params.section(f"methods.{name}", METHODS[name])
    for name in params.check_names("presets"):
        params.section(f"presets.{name}", params.PresetParams)
    found = {name: params.section(name, schema) for name, schema in SECTIONS.items()}
    check_method(method, found["lora"], found["train"])
    check_start(found["lora"])
    if (block_size := found["tokenize"].block_size) is not None:
        choose_stride(found["evaluate"], block_size)


def check_context(config: dict) -> None:
    """Refuse a block size or a stride that the model does not allow, by its config.json alone."""
    block_size = choose_block_size(params.section("tokenize", TokenizeParams).block_size, config, 0)
    choose_stride(params.section("evaluate", EvaluateParams), block_size)


def check_method(method: str, lora: LoraParams, train: TrainParams) -> None:
    """Refuse values of `lora` and `train` that do not go with the method."""
    if method == "full":
        params.require(train.lora_plus_ratio == 1, "train.lora_plus_ratio", train.lora_plus_ratio, "1 with full")
        params.require(lora.start_from is None, "lora.start_from", lora.start_from, "null with full: it is an adapter")
        return
    quantized = method == "qlora"
    others = f"default, orthogonal or loftq with method qlora: {lora.init} takes floats out of the base"
    params.require(lora.init not in FROM_BASE or not quantized, "lora.init", lora.init, others)
    others = "another init with method lora: loftq corrects the error of a quantized base"
    params.require(lora.init != "loftq" or quantized, "lora.init", lora.init, others)
