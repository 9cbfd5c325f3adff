"""The measured figures as tables: mean and spread over seeds."""

import statistics
from collections.abc import Callable, Iterable

from benchmarks.grid import LORA, Run

Records = dict[str, dict]  # the newest record of each run, by Run.key
HEAD = (
    "| run | changed | learning rate | seeds | validation loss, nats/token | test perplexity | trained parameters "
    "| adapter, MB | frozen base, MB | peak memory, GB | tokens/s |\n" + "|---" * 11 + "|"
)


def best(runs: Iterable[Run], records: Records) -> Run | None:
    """Return the run of lowest validation loss among those that succeeded, or None; the test split has no say."""
    done = [run for run in runs if succeeded(run, records)]
    return min(done, key=lambda run: records[run.key]["train"]["best_validation_loss"], default=None)


def succeeded(run: Run, records: Records) -> bool:
    return run.key in records and records[run.key]["error"] is None


def spread(numbers: list[float], form: str) -> str:
    """Return the mean and, of two numbers or more, the sample standard deviation."""
    mean = format(statistics.mean(numbers), form)
    return f"{mean} ± {format(statistics.stdev(numbers), form)}" if len(numbers) > 1 else mean


def markdown(runs: list[Run], records: Records, conditions: dict[str, str], params: str) -> str:
    """Return all tables, what failed or is missing, and the conditions.

    Args:
        runs: those of the grid, in the order of the tables and of their rows.
        params: params.yaml as all runs have it.
    """
    parts = ["# Methods, measured"]
    for table in dict.fromkeys(run.table for run in runs):
        rows = [run for run in runs if run.table == table]
        done = [run for run in rows if succeeded(run, records)]
        if not done:
            continue
        names = dict.fromkeys(run.name for run in done)
        lines = [line([run for run in done if run.name == name], records) for name in names]
        parts += [f"## {table}", "\n".join([HEAD, *lines])]
        if table.startswith("Learning rate"):
            parts.append(choice(rows, records))
    failed = {run.key: run for run in runs if run.key in records and not succeeded(run, records)}
    if failed:
        errors = [f"- {run.name}, seed {run.seed}: `{records[key]['error']}`" for key, run in failed.items()]
        parts += ["## Failed", "\n".join(errors)]
    missing = {run.key: f"{run.name} (seed {run.seed})" for run in runs if run.key not in records}
    if missing:
        parts += ["## Not run", ", ".join(missing.values())]
    listed = "\n".join(f"- {name}: {text}" for name, text in conditions.items())
    parts += ["## Conditions", listed, f"Parameters where no column says otherwise:\n\n```yaml\n{params.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def line(runs: list[Run], records: Records) -> str:
    """Return one line of a table: the runs of one name, which differ in their seeds."""
    values = runs[0].values
    found = [records[run.key] for run in runs]
    first = found[0]["train"]
    changed = [f"{key}={value}" for key, value in values.items() if key != "train.learning_rate"]
    usual = [f"{key}={value}" for key, value in LORA.items()]

    def over_seeds(form: str, figure: Callable[[dict], float]) -> str:
        return spread([figure(record) for record in found], form)

    cells = [
        runs[0].name,
        ", ".join(change for change in changed if change not in usual),
        f"{values['train.learning_rate']:g}",
        ", ".join(str(run.seed) for run in runs),
        over_seeds(".4f", lambda record: record["train"]["best_validation_loss"]),
        over_seeds(".3f", lambda record: record["eval"]["tuned"]["perplexity"]),
        f"{first['trainable_parameters']:,}",
        f"{first['adapter_bytes'] / 1e6:,.2f}",
        f"{first['frozen_base_bytes'] / 1e6:,.1f}",
        over_seeds(".2f", lambda record: record["train_timings"]["peak_memory_bytes"] / 1e9),
        # Runs that share a device slow each other down: their speed is no property of the method.
        over_seeds(",.0f", lambda record: record["train_timings"]["tokens_per_second"])
        if all(record["jobs"] == 1 for record in found)
        else "",
    ]
    return f"| {' | '.join(cells)} |"


def choice(rows: list[Run], records: Records) -> str:
    """Return which learning rate of a sweep is the best, and whether a better one may lie outside."""
    found = best(rows, records)
    edge = found in (rows[0], rows[-1])
    rate = f"Lowest validation loss: learning rate {found.values['train.learning_rate']:g}"
    return f"{rate}, at the edge of the sweep: a better one may lie beyond it." if edge else f"{rate}."
