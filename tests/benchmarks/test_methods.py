"""The benchmarks: the corpus that is harvested, the runs that are made, and the arithmetic of the tables."""

import gzip
import json
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks import grid, harvest, markup, methods, stand_in, tables, workspace
from gpt2lora.dataset import articles

SPLITS = ("train", "validation", "test")
LICENCE = "Permission is hereby granted to any person who has a copy of this software to deal in it as they like."
PROSE = "This function returns the number of words that are left in the text after all of the others were removed."
LOST = {
    "code": "for line in file: if (line[0] == '#'): rows[line] += len(rows) * 2 ; return {rows: [line], 'x': y_1}",
    "table": "of all 1234.5 and 6789.0 is 1234.5 to be 6789.0 in 1234.5 for 6789.0 as it has 1234.5 on the 6789.0",
    "symbols": "if the value_of_it = the value_of_all then it will be = the value_of_any or = the value_of_one only",
    "encoded": "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk of the and to is in a for it on as with",
    "names": "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau",
    "German": "Diese Funktion gibt die Anzahl der Wörter zurück, die nach dem Entfernen aller anderen noch übrig sind.",
    "short": "This is all that it does.",
    "title": "= this is the name of one of the articles as it stands in the text =",
}


def invoke(command, *arguments, fails: bool = False) -> str:
    result = CliRunner().invoke(command, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code != 0) == fails, result.output
    assert "Traceback" not in result.output
    return result.output


def texts(topic: str, count: int = 4) -> list[str]:
    """Paragraphs of prose that occur nowhere else."""
    places = ("first", "second", "third", "fourth", "fifth", "sixth")[:count]
    return [f"The {place} thing to know of {topic} is that all of it was made to be of use to you." for place in places]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A made-up installation: documents of every kind, some with what is no prose, some that hold the same."""
    root = tmp_path / "root"
    site, doc, man = root / "site-packages" / "pack", root / "share" / "doc" / "pack", root / "share" / "man"
    for folder in (site / "tests", doc, man / "man1", man / "de" / "man1", root / "pack.dist-info"):
        folder.mkdir(parents=True)
    module = '"""{}"""\nimport nothing\n\n\ndef f():\n    """{}"""\n    return "{}"\n'
    modules = ["\n\n".join(texts("modules")), PROSE, "A string in the code which is not of the documentation at all."]
    (site / "module.py").write_text(module.format(*modules))
    (site / "tests" / "module.py").write_text(module.format("\n\n".join(texts("tests")), "", ""))
    (site / "broken.py").write_text('"""' + " ".join(texts("broken modules")) + '"""\ndef f(:\n')
    (doc / "README.md").write_text("\n\n".join([*texts("guides"), *LOST.values(), LICENCE, PROSE, LICENCE]))
    (doc / "copyright").write_text("\n\n".join([LICENCE.replace("Permission", "9 Permission"), *texts("copyright")]))
    (doc / "latin.txt").write_bytes("\n\n".join(texts("café")).encode("latin-1"))
    (tmp_path / "elsewhere.txt").write_text("\n\n".join(texts("links")))
    (doc / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (root / "pack.dist-info" / "METADATA").write_text("Name: the pack\n\n" + "\n\n".join(texts("packages")))
    for folder, topic in (("man1", "\\fBmanuals\\fR"), ("de/man1", "translations")):
        page = ".TH PACK 1\n.SH NAME\npack \\- a thing\n.SH DESCRIPTION\n.PP\n" + "\n.PP\n".join(texts(topic))
        (man / folder / "pack.1.gz").write_bytes(gzip.compress(page.encode()))
    return root


def read(folder: Path) -> dict[str, str]:
    return {split: (folder / f"{split}.txt").read_bytes().decode() for split in SPLITS}


def test_harvest_keeps_each_paragraph_of_prose_once(tree, tmp_path):
    invoke(harvest.main, "--root", tree, "--root", tree / "share", "--out", tmp_path / "corpus")
    found = "".join(read(tmp_path / "corpus").values())
    topics = ("modules", "guides", "copyright", "packages", "manuals")
    for text in [PROSE, LICENCE, *(text for topic in topics for text in texts(topic))]:
        assert found.count(f" {text} \n") == 1, text
    for text in [
        *LOST.values(),
        "A string in the code",
        "of tests",
        "broken modules",
        "links",
        "translations",
        "caf",
        "9 Permission",
    ]:
        assert text not in found


def test_harvest_splits_whole_documents(tree, tmp_path):
    invoke(harvest.main, "--root", tree, "--out", tmp_path / "corpus")
    pieces = {split: articles.split_articles(text) for split, text in read(tmp_path / "corpus").items()}
    assert [len(pieces[split]) for split in SPLITS] == [3, 1, 1]
    found = sorted(piece.strip().splitlines()[0].strip() for split in SPLITS for piece in pieces[split])
    assert found == [f"= {name} =" for name in ("man1 pack", "pack README", "pack copyright", "pack module")] + [
        "= pack.dist-info METADATA ="
    ]
    text = "".join(read(tmp_path / "corpus").values())
    assert " = man1 pack = \n \n" + "".join(f" {paragraph} \n" for paragraph in texts("manuals")) in text


def test_harvest_is_the_same_again(tree, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        invoke(harvest.main, "--root", tree, "--out", tmp_path / name, "--seed", seed)
    first, again, other = (read(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_an_earlier_harvest_is_no_document(tree):
    for _ in range(2):
        invoke(harvest.main, "--root", tree, "--out", tree / "corpus")
        assert sum(len(articles.split_articles(text)) for text in read(tree / "corpus").values()) == 5


def test_harvest_of_a_given_size_holds_whole_documents(tree, tmp_path):
    invoke(harvest.main, "--root", tree, "--out", tmp_path / "all")
    invoke(harvest.main, "--root", tree, "--out", tmp_path / "part", "--megabytes", 0.0016)
    invoke(harvest.main, "--root", tree, "--out", tmp_path / "again", "--megabytes", 0.0016)
    assert read(tmp_path / "part") == read(tmp_path / "again")
    whole, part = ("".join(read(tmp_path / name).values()) for name in ("all", "part"))
    assert len(part.encode()) <= 1600 < len(whole.encode())
    assert 3 <= len(articles.split_articles(part)) < 5
    assert {piece.strip() for piece in articles.split_articles(part)} < {
        piece.strip() for piece in articles.split_articles(whole)
    }


def test_harvest_refuses_what_gives_no_corpus(tmp_path):
    assert "no such folder" in invoke(harvest.main, "--root", tmp_path / "no", "--out", tmp_path / "o", fails=True)
    assert "0 documents" in invoke(harvest.main, "--root", tmp_path, "--out", tmp_path / "o", fails=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("kind", LOST)
def test_no_prose(kind):
    assert harvest.is_prose(PROSE)
    assert not harvest.is_prose(LOST[kind])


def test_paragraphs_are_joined_and_list_items_parted():
    text = (
        "Heading\n=====\n  One line\nand the next.\n* an item\n  of two lines\n* another\n\nx : int\n    What.\ny : int"
    )
    parts = ["Heading", "One line and the next.", "* an item of two lines", "* another", "x : int What.", "y : int"]
    assert harvest.blocks(text) == parts


def test_markup_is_taken_off():
    rest = "See `the **guide** <a>` in :class:`pack.Thing`, or [this page](https://example.com)."
    assert markup.inline(rest) == "See the guide <a> in pack.Thing, or this page."
    perl = "f();\n\n=head1 NAME\n\nPack - B<a I<new> thing>, see L<the page|perlpod>\n\n    code();\n\n=cut\n\nmy $x;\n"
    assert " ".join("".join(markup.pod(perl)).split()) == "Pack - a new thing, see the page"
    page = '.TH A 1\n.SH "NAME"\n.B bold text\n.BR pack (1),\nis \\fIone\\-time\\fR.\\" no\n.nf\nint x;\n.fi\nIt\\(aqs.'
    assert " ".join(markup.roff(page)[0].split()) == "bold text pack(1), is one-time. It's."
    assert markup.roff(".Dd 2020\n.Sh NAME\n.Nm pack\nis a thing") == []


def record(run: grid.Run, loss: float, perplexity: float = 20.0, error: str | None = None, jobs: int = 1) -> dict:
    train = dict.fromkeys(("steps", "tokens", "frozen_base_bytes"), 10**9)
    timings = dict.fromkeys(("tokens_per_second", "peak_memory_bytes"), 10**9)
    train |= {"best_validation_loss": loss, "trainable_parameters": 1234, "adapter_bytes": 5_000_000}
    scores = {"tuned": {"perplexity": perplexity}, "base": {"perplexity": 99.0}}
    figures = {"train": train, "train_timings": timings, "eval": scores}
    told = {"key": run.key, "name": run.name, "seed": run.seed, "error": error, "jobs": jobs, "seconds": 1.0}
    return told | ({} if error else figures)


def test_the_best_rate_has_the_lowest_validation_loss():
    runs = grid.sweeps()[:4]
    records = {
        runs[0].key: record(runs[0], 3.0, perplexity=18.0),
        runs[1].key: record(runs[1], 2.5, perplexity=25.0),
        runs[2].key: record(runs[2], 0.1, error="train: diverged"),
    }
    assert tables.best(runs, records) is runs[1]
    assert tables.best(runs[2:], records) is None
    assert tables.choice(runs[:3], records) == "Lowest validation loss: learning rate 0.0002."
    assert "at the edge" in tables.choice(runs[1:], records)


def test_a_line_holds_mean_and_sample_deviation():
    runs = [run for run in grid.finals(5e-4, 1e-4, 1e-3) if run.name == "dora"]
    records = {run.key: record(run, 3 + run.seed, 20 + 2 * run.seed) for run in runs}
    cells = [cell.strip() for cell in tables.line(runs, records).split("|")[1:-1]]
    memory, speed = "1.00 ± 0.00", "1,000,000,000 ± 0"
    assert cells[:6] == ["dora", "lora.use_dora=True", "0.001", "0, 1, 2", "4.0000 ± 1.0000", "22.000 ± 2.000"]
    assert cells[6:] == ["1,234", "5.00", "1,000.0", memory, speed]
    assert len(cells) == tables.HEAD.splitlines()[0].count("|") - 1 == tables.HEAD.splitlines()[1].count("|") - 1
    shared = {run.key: record(run, 3, jobs=2) for run in runs[:1]}
    cells = [cell.strip() for cell in tables.line(runs[:1], shared).split("|")[1:-1]]
    assert cells[4] == "3.0000" and cells[-1] == ""  # one seed has no spread; a shared device tells no speed


def test_failed_runs_are_listed_and_enter_no_mean():
    runs = [run for run in grid.finals(5e-4, 1e-4, 1e-3) if run.name == "dora"]
    records = {runs[0].key: record(runs[0], 3.0), runs[1].key: record(runs[1], 0, error="train: Error: no memory")}
    text = tables.markdown(runs, records, {"device": "abacus"}, "seed: 0\n")
    assert "| dora | lora.use_dora=True | 0.001 | 0 | 3.0000 | 20.000 |" in text
    assert "- dora, seed 1: `train: Error: no memory`" in text
    assert "## Not run\n\ndora (seed 2)\n" in text
    assert "- device: abacus" in text


def test_the_grid_makes_first_seeds_first_and_shares_runs():
    runs = grid.finals(lora_rate=1e-3, full_rate=2e-4, default_rate=5e-3)
    seeds = [run.seed for run in runs]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert {run.table for run in runs if run.seed == 0} == {"Methods", "Rank", "Initial values"}
    keys = {run.name: run.key for run in grid.sweeps() + runs if run.seed == 0}
    assert keys["lora"] == keys["lora-lr-0.005"] == keys["rank-16"] == keys["default"]
    assert keys["lora-best-rate"] == keys["lora-lr-0.001"] and keys["full"] == keys["full-lr-0.0002"]
    assert keys["rslora"] == keys["rslora-lr-0.005"] and keys["rank-64"] == keys["lora-rank-64-lr-0.005"]
    assert len({run.key for run in runs if run.name in grid.METHODS}) == 3 * len(grid.METHODS)
    assert len(set(keys.values())) == len(keys) - 9


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The options of a start whose stages only write figures: of validation, LoRA's best learning rate is 2e-4."""
    ran, lock = [], threading.Lock()

    def run_stage(name: str, folder: Path, shown: bool = False, **variables: str) -> str | None:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        rate, seed = params["train"]["learning_rate"], params["seed"]
        if name == "tokenize":
            (folder / "data" / "tokens").mkdir(parents=True)
            manifest = {"splits": {"train": {"tokens": 1}}, "block_size": 64}
            (folder / "data" / "tokens" / "manifest.json").write_text(json.dumps(manifest))
        if name == "train":
            with lock:
                ran.append((folder.name, rate, seed, params["train"]["epochs"]))
            if params["lora"]["use_dora"]:
                return "train: Error: no such thing"
        run = grid.Run("", folder.name, seed, {})
        (folder / "metrics").mkdir(exist_ok=True)
        figures = record(run, 3 + abs(rate - 2e-4) + seed, perplexity=1 / rate)
        for part in {"train": ("train", "train_timings"), "evaluate": ("eval",)}.get(name, ()):
            (folder / "metrics" / f"{part}.json").write_text(json.dumps(figures[part]))
        return None

    monkeypatch.setattr(workspace, "run_stage", run_stage)
    for name in ("base", "corpus"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return ran, ("--base", tmp_path / "base", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out", "--jobs", 3)


def test_methods_tunes_at_the_rates_found_and_makes_no_run_twice(pretended, tmp_path):
    ran, options = pretended
    names = ("lora-lr-*", "lora-best-rate", "dora")
    only = [part for name in names for part in ("--only", name)]
    invoke(methods.main, *options, *only, "--set", "train.epochs=7")
    sweep = [f"lora-lr-{rate:g}-seed-0" for rate in grid.RATES]
    assert sorted(name for name, *_ in ran[: len(sweep)]) == sorted(sweep)
    default = yaml.safe_load((workspace.ROOT / "params.yaml").read_text())["train"]["learning_rate"]
    assert {(name, rate) for name, rate, *_ in ran[len(sweep) :]} == {
        *((f"dora-seed-{seed}", default) for seed in (0, 1, 2)),
        *((f"lora-best-rate-seed-{seed}", 2e-4) for seed in (1, 2)),  # seed 0 is a run of the sweep
    }
    assert {epochs for *_, epochs in ran} == {7}
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(lines) == len(ran) == len(sweep) + 5
    text = (tmp_path / "out" / "methods.md").read_text()
    assert "| lora-best-rate |  | 0.0002 | 0, 1, 2 | 4.0000 ± 1.0000 |" in text
    assert "- dora, seed 2: `train: Error: no such thing`" in text
    assert not list((tmp_path / "out" / "runs").glob("*/data"))

    ran.clear()
    invoke(methods.main, *options, *only, "--set", "train.epochs=7")
    assert sorted(name for name, *_ in ran) == ["dora-seed-0", "dora-seed-1", "dora-seed-2"]  # what failed


def test_methods_starts_nothing_too_late(pretended, tmp_path):
    ran, options = pretended
    output = invoke(methods.main, *options, "--seconds", -1)
    assert ran == [] and not (tmp_path / "out" / "runs.jsonl").exists()
    assert "holds 0 runs" in output


def test_methods_refuses_to_mix(pretended, tmp_path):
    _, options = pretended
    invoke(methods.main, *options, "--only", "lora-lr-0.001")
    before = (tmp_path / "out" / "methods.md").read_bytes()
    assert "have another params" in invoke(methods.main, *options, "--set", "train.epochs=9", fails=True)
    (tmp_path / "base" / "file").write_text("other weights")
    assert "have another base" in invoke(methods.main, *options, fails=True)
    assert "values of its own" in invoke(methods.main, *options, "--set", "lora.r=2", fails=True)
    assert "no train.epoch" in invoke(methods.main, *options, "--set", "train.epoch=2", fails=True)
    assert "expected key=value" in invoke(methods.main, *options, "--set", "train.epochs", fails=True)
    assert (tmp_path / "out" / "methods.md").read_bytes() == before


def test_a_stage_that_fails_says_why(tmp_path):
    told = workspace.run_stage("prepare", tmp_path)
    assert told.startswith("prepare: Error: params.yaml not found")


def test_settings_are_read_as_in_params():
    asked = ("train.learning_rate=5e-05", "lora.target_modules=[attn.c_attn]", "tokenize.block_size=null")
    values = {"train.learning_rate": 5e-5, "lora.target_modules": ["attn.c_attn"], "tokenize.block_size": None}
    assert workspace.settings(asked) == values


def test_a_stand_in_is_tuned_by_two_methods(tmp_path, tiny_corpus, tiny_model):
    shape = ("--layers", 1, "--width", 64, "--heads", 2, "--positions", 32, "--batch-size", 4)
    options = ("--corpus", tiny_corpus, "--tokenizer", tiny_model, "--learning-rate", 5e-3, "--epochs", 1)
    invoke(stand_in.main, *options, *shape, "--out", tmp_path / "base")
    trained = json.loads((tmp_path / "base" / "stand_in.json").read_text())["train"]
    assert trained["best_validation_loss"] < trained["start_validation_loss"] - 1

    chosen = ("--only", "lora-lr-0.002", "--only", "full-lr-0.0005", "--jobs", 2)
    options = ("--base", tmp_path / "base", "--corpus", tiny_corpus, "--out", tmp_path / "out", *chosen)
    invoke(methods.main, *options, "--set", "train.epochs=1", "--set", "train.validations=1")
    lines = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert {line["name"]: line["error"] for line in lines} == {"lora-lr-0.002": None, "full-lr-0.0005": None}
    for line in lines:
        assert line["eval"]["tuned"]["perplexity"] < line["eval"]["base"]["perplexity"]
        assert line["train"]["start_validation_loss"] == pytest.approx(trained["best_validation_loss"], abs=1e-3)
