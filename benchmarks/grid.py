"""What is measured: each row of each table, as a run of the pipeline with values of its own."""

import json
from dataclasses import dataclass
from typing import Any

LORA = {"method": "lora", "lora.r": 16, "lora.alpha": 32}
QLORA4 = LORA | {
    "method": "qlora",
    "methods.qlora.bits": 4,
    "methods.qlora.quant_type": "nf4",
    "methods.qlora.double_quant": True,
}
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
HIGH_RATES = (1e-3, 2e-3, 5e-3)  # where the variants of a larger update have to show that they hold
FULL_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
SEEDS = (0, 1, 2)
METHODS = {
    "lora": LORA,
    "qlora-4": QLORA4,
    "qlora-8": LORA | {"method": "qlora", "methods.qlora.bits": 8, "methods.qlora.double_quant": False},
    "lora-bits-8": LORA | {"lora.bits": 8},
    "lora-bits-4": LORA | {"lora.bits": 4},
    "qlora-4-bits-8": QLORA4 | {"lora.bits": 8},
    "dora": LORA | {"lora.use_dora": True},
    # The update is scaled by alpha / sqrt(r): 8 at the same alpha, where LoRA's alpha / r is 2. At one rank rsLoRA is
    # LoRA with another alpha (8 would be LoRA's own 2): it differs in what it does when the rank changes, see RANKS.
    "rslora": LORA | {"lora.use_rslora": True},
    "lora-plus": LORA | {"train.lora_plus_ratio": 16},
}
# alpha stays, as when a user changes lora.r alone: scales 8, 2, 0.5. rsLoRA's, set to 2 at rank 16: 4 and 1.
RANKS = {
    "rank-4": LORA | {"lora.r": 4},
    "rank-16": LORA,
    "rank-64": LORA | {"lora.r": 64},
    "rslora-rank-4": LORA | {"lora.r": 4, "lora.alpha": 8, "lora.use_rslora": True},
    "rslora-rank-64": LORA | {"lora.r": 64, "lora.alpha": 8, "lora.use_rslora": True},
}
INITS = {"default": LORA} | {name: LORA | {"lora.init": name} for name in ("pissa", "olora", "orthogonal")}
INITS |= {"qlora-4": QLORA4, "qlora-4-loftq": QLORA4 | {"lora.init": "loftq"}}
FULL = {"method": "full"}
SWEPT = {
    "lora": (LORA, RATES),
    "lora-rank-4": (RANKS["rank-4"], RATES),
    "lora-rank-64": (RANKS["rank-64"], RATES),
    "rslora": (METHODS["rslora"], HIGH_RATES),
    "lora-plus": (METHODS["lora-plus"], HIGH_RATES),
    "full": (FULL, FULL_RATES),
}
KEYS = {"seed", "train.learning_rate"}.union(*METHODS.values(), *RANKS.values(), *INITS.values())  # the grid's own


@dataclass(frozen=True)
class Run:
    table: str
    name: str
    seed: int
    values: dict[str, Any]  # of params.yaml, by dotted key; without the seed

    @property
    def key(self) -> str:
        """What the run is, whatever its name: rows of several tables may share one run."""
        return json.dumps(self.values | {"seed": self.seed}, sort_keys=True)


def sweep(method: str) -> list[Run]:
    """Return the runs that find the learning rate of one of SWEPT."""
    values, rates = SWEPT[method]
    table = f"Learning rate, {method}"
    return [Run(table, f"{method}-lr-{rate:g}", SEEDS[0], values | {"train.learning_rate": rate}) for rate in rates]


def sweeps() -> list[Run]:
    return [run for method in SWEPT for run in sweep(method)]


def finals(lora_rate: float, full_rate: float, default_rate: float) -> list[Run]:
    """Return the runs that compare, the first seed of everything first: adapters at the rate that params.yaml has.

    Args:
        lora_rate: where LoRA was best, for a row of its own; of training everything, `full_rate` is all it gets.
    """

    def at(rate: float, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name: values | {"train.learning_rate": rate} for name, values in rows.items()}

    best = at(lora_rate, {"lora-best-rate": LORA}) | at(full_rate, {"full": FULL})
    rows = {"Methods": at(default_rate, METHODS) | best}
    rows |= {"Rank": at(default_rate, RANKS), "Initial values": at(default_rate, INITS)}
    return [Run(table, name, seed, rows[table][name]) for seed in SEEDS for table in rows for name in rows[table]]
