"""Which runs the study of methods makes: for each method a sweep of learning rates, then the best over all seeds."""

import re
from dataclasses import dataclass
from typing import Any

QLORA = {"method": "qlora", "methods.qlora.bits": 4, "methods.qlora.quant_type": "nf4"}
METHODS: dict[str, dict[str, Any]] = {  # what differs from params.yaml; method is lora where nothing else is said
    "lora": {},
    "full": {"method": "full"},
    "qlora-nf4": QLORA,
    **{f"lora-dropout-{share:g}": {"lora.dropout": share} for share in (0.0, 0.05)},  # one of them repeats lora
    **{f"lora-r{r}": {"lora.r": r, "lora.alpha": 2 * r} for r in (8, 64, 128, 32)},
    "qlora-8bit": QLORA | {"methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora-attention": {"lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},  # of Gemma and Llama
    "rslora": {"lora.use_rslora": True},
    "dora": {"lora.use_dora": True},
    "lora-plus": {"train.lora_plus_ratio": 16.0},
    **{f"lora-r{r}-alpha32": {"lora.r": r, "lora.alpha": 32} for r in (8, 64, 128)},
    "lora-batch-32": {"train.accumulation_steps": 4},  # steps of 32 rows, in the memory of 8
    "full-batch-32": {"method": "full", "train.accumulation_steps": 4},
    **{init: {"lora.init": init, "lora.dropout": 0.0} for init in ("pissa", "olora", "orthogonal")},
    "qlora-fp4": QLORA | {"methods.qlora.quant_type": "fp4"},
    "qlora-loftq": QLORA | {"lora.init": "loftq"},
    "lora-bits-8": {"lora.bits": 8},
    "lora-bits-4": {"lora.bits": 4},
    "lora-3-epochs": {"train.epochs": 3},
    "full-3-epochs": {"method": "full", "train.epochs": 3},
}
RATES = tuple(float(f"{digit}e{power}") for power in range(-6, -1) for digit in (1, 2, 5))
# The five rates around this one are tried first. A wrong expectation costs runs, and changes no result.
EXPECTED = dict.fromkeys(METHODS, 5e-4)
EXPECTED |= dict.fromkeys(("rslora", "lora-plus", "pissa", "olora"), 2e-4)
EXPECTED["orthogonal"] = 1e-4
EXPECTED |= dict.fromkeys(("lora", "lora-batch-32", "lora-r64-alpha32", "lora-r128-alpha32"), 1e-3)
EXPECTED |= dict.fromkeys((name for name in METHODS if name.startswith("qlora")), 1e-3)
EXPECTED |= dict.fromkeys((name for name in METHODS if name.startswith("full")), 5e-5)
SEEDS = (0, 1, 2)
Records = dict[str, dict]  # the newest record of each run, by Run.key


@dataclass(frozen=True)
class Run:
    """One training: a method, its learning rate and its seed."""

    method: str
    learning_rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}-lr-{self.learning_rate:g}-seed-{self.seed}"


def parse_key(key: str) -> Run:
    """Return the run of a key.

    Raises:
        ValueError: not a key.
    """
    if not (parts := re.fullmatch(r"(.+)-lr-(.+)-seed-(.+)", key)):
        raise ValueError(f"{key}: not the key of a run")
    return Run(parts[1], float(parts[2]), int(parts[3]))


def plan(names: list[str], records: Records) -> list[Run]:
    """Return all runs that are known to be needed: for each method its sweep, then its seeds."""
    return list(dict.fromkeys(run for name in names for run in (*sweep(name, records), *finals(name, records))))


def sweep(method: str, records: Records) -> list[Run]:
    """Return the runs that find the learning rate of a method.

    They are five, around the expected rate. If the best of them is the lowest or the highest rate, one more follows on
    that side, until the best one lies inside.
    """
    middle = RATES.index(EXPECTED[method])
    low, high = middle - 2, middle + 2
    while True:
        runs = [Run(method, rate, SEEDS[0]) for rate in RATES[low : high + 1]]
        best = best_rate(runs, records) if all(run.key in records for run in runs) else None
        if best == RATES[low] and low > 0:
            low -= 1
        elif best == RATES[high] and high < len(RATES) - 1:
            high += 1
        else:
            return runs


def finals(method: str, records: Records) -> list[Run]:
    """Return the runs at the best learning rate, over all seeds; none before the sweep is done, or if it failed."""
    is_swept = all(run.key in records for run in sweep(method, records))
    return at_best_rate(method, records) if is_swept else []


def at_best_rate(method: str, records: Records) -> list[Run]:
    """Return the runs at the best learning rate so far, over all seeds."""
    rate = best_rate(sweep(method, records), records)
    return [Run(method, rate, seed) for seed in SEEDS] if rate else []


def best_rate(runs: list[Run], records: Records) -> float | None:
    """Return the learning rate of the lowest validation loss; the test split has no say."""
    losses = {run.learning_rate: records[run.key]["train"]["best_validation_loss"] for run in done(runs, records)}
    return min(losses, key=losses.get, default=None)


def done(runs: list[Run], records: Records) -> list[Run]:
    """Return the runs that succeeded."""
    return [run for run in runs if run.key in records and records[run.key]["error"] is None]


def tuned(method: str, records: Records) -> list[Run]:
    """Return the runs on record at the best learning rate so far, by seed."""
    return done(at_best_rate(method, records), records)
