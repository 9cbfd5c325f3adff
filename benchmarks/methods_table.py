"""The tables of the study of methods, in Markdown."""

import statistics
from collections.abc import Callable

import pandas

from benchmarks.methods_plan import METHODS, Records, best_rate, done, parse_key, sweep, tuned

COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {  # of the final table
    "validation loss, nats/token": (lambda record: record["train"]["best_validation_loss"], ".4f"),
    "test perplexity": (lambda record: record["eval"]["tuned"]["perplexity"], ".3f"),
    "beside lora, %": (lambda record: record.get("beside_lora"), "+.2f"),
    "word perplexity": (lambda record: record["eval"]["tuned"]["word_perplexity"], ".2f"),
    "trained parameters": (lambda record: record["train"]["trainable_parameters"], ",.0f"),
    "adapter, MB": (lambda record: record["train"]["adapter_bytes"] / 1e6, ",.2f"),
    "frozen base, MB": (lambda record: record["train"]["frozen_base_bytes"] / 1e6, ",.1f"),
    "peak memory, GB": (lambda record: record["train_timings"]["peak_memory_bytes"] / 1e9, ".2f"),
    # Runs that share a GPU slow each other down.
    "tokens/s": (lambda r: r["train_timings"]["tokens_per_second"] if r["jobs"] == 1 else None, ",.0f"),
    "both stages, s": (lambda r: r["seconds"] if r["jobs"] == 1 else None, ".0f"),
}


def spread(numbers: list[float | None], form: str) -> str:
    """Return the mean and, if the numbers differ, the sample standard deviation; nothing if all are missing."""
    numbers = [number for number in numbers if number is not None]
    if not numbers:
        return ""
    mean = format(statistics.mean(numbers), form)
    return f"{mean} ± {format(statistics.stdev(numbers), form.lstrip('+'))}" if len(set(numbers)) > 1 else mean


def means(records: Records) -> dict[str, tuple[float, float]]:
    """Return for each method that was measured its trained parameters and its mean test perplexity."""
    found = {name: tuned(name, records) for name in METHODS}
    return {
        name: tuple(
            statistics.mean(COLUMNS[key][0](records[run.key]) for run in runs)
            for key in ("trained parameters", "test perplexity")
        )
        for name, runs in found.items()
        if runs
    }


def all_runs(records: Records) -> pandas.DataFrame:
    """Return a row for each run that succeeded, by method, learning rate and seed; no column that would be empty."""
    rows = []
    for key, record in records.items():
        if record["error"] is None:
            run, figures = parse_key(key), {name: figure(record) for name, (figure, _) in COLUMNS.items()}
            rows.append({"method": run.method, "learning rate": run.learning_rate, "seed": run.seed, **figures})
    table = pandas.DataFrame(rows).sort_values(["method", "learning rate", "seed"], ignore_index=True)
    return table.dropna(axis="columns", how="all")


def render(records: Records, conditions: dict) -> str:
    """Return the tables in Markdown: the sweeps, the methods at their best rates, what failed, and the conditions."""
    sweeps = ["| method | test perplexity by learning rate | best |", "|---|---|---|"]
    table = [f"| method | learning rate | seeds | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    lora = {run.seed: COLUMNS["test perplexity"][0](records[run.key]) for run in tuned("lora", records)}
    for name in METHODS:
        swept = done(sweep(name, records), records)
        if not swept:
            continue
        rate = best_rate(swept, records)
        edge = " (at the edge)" * (rate in (swept[0].learning_rate, swept[-1].learning_rate))
        cells = [f"{run.learning_rate:g}: {COLUMNS['test perplexity'][0](records[run.key]):.2f}" for run in swept]
        sweeps.append(f"| {name} | {', '.join(cells)} | {rate:g}{edge} |")
        runs = tuned(name, records)
        found = [dict(records[run.key]) for run in runs]
        for run, record in zip(runs, found, strict=True):
            if name != "lora" and run.seed in lora:  # paired: both runs have the same seed
                record["beside_lora"] = 100 * (record["eval"]["tuned"]["perplexity"] / lora[run.seed] - 1)
        cells = [spread([figure(record) for record in found], form) for figure, form in COLUMNS.values()]
        table.append(f"| {name} | {rate:g} | {', '.join(str(run.seed) for run in runs)} | {' | '.join(cells)} |")
    failed = [f"- {key}: `{record['error']}`" for key, record in records.items() if record["error"]]
    facts = {key: ", ".join({str(record[key]): None for record in records.values()}) for key in ("device", "commit")}
    facts |= {"base": conditions["base"], "corpus": conditions["corpus"]}
    parts = ["# Methods, measured", "\n".join(sweeps), "\n".join(table)]
    parts += ["## Failed\n\n" + "\n".join(failed)] * bool(failed)
    return "\n\n".join([*parts, "\n".join(f"- {name}: {text}" for name, text in facts.items())]) + "\n"
