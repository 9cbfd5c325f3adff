"""prepare: the corpus in three splits, from the hub, a folder, a single file, or the embedded sample.

in   params.yaml: preset, presets.<preset>.dataset, .dataset_config, .dataset_revision, .text_column, prepare.*, seed
out  data/raw/{train,validation,test}.txt, UTF-8: texts whose articles begin at titles; or .jsonl: a document a line
     data/raw/manifest.json: their digests, and what was changed, dropped, cut from train, kept, or not used
     data/environment/prepare.json: hardware, versions and duration
"""

import json
import time
from collections import Counter
from pathlib import Path

import click

from gpt2lora.corpus import splits, user_files
from gpt2lora.dataset import documents
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.schemas import PrepareParams, check_params
from gpt2lora.sample import corpus
from gpt2lora.sources import hub, local

SPLITS = ("train", "validation", "test")
SAMPLE_PACKAGE = "datasets"


@command
@click.option("--out", type=Path, default="data/raw", show_default=True, help="Folder of the three splits.")
def main(out: Path) -> None:
    """Fetch the corpus and split it into train, validation and test."""
    started = time.perf_counter()
    check_params()
    name = params.choice("preset", "presets")
    preset = params.section(f"presets.{name}", params.PresetParams)
    prepare = params.section("prepare", PrepareParams)
    seed = params.seed()
    shares = {"validation": prepare.validation_share, "test": prepare.test_share}

    origin = {"dataset": preset.dataset, "config": preset.dataset_config, "revision": preset.dataset_revision}
    echo(f"prepare: reading {preset.dataset}")
    with atomic_output(out) as folder:
        folder.mkdir()
        facts = write_corpus(preset, name, prepare.document_separator, shares, seed, folder)
        for split in SPLITS:
            file = documents.find_split(folder, split)
            if prepare.fraction < 1:
                facts.setdefault("fraction", {})[split] = kept = splits.keep_fraction(file, prepare.fraction, seed)
                echo(f"prepare: {split:10} {kept['kept']:,} of {kept['of']:,} {kept['unit']} kept")
            check_split(file, split, str(preset.dataset), advise(split, prepare.fraction, facts))
        (folder / MANIFEST).write_text(
            json.dumps({"source": origin, "files": digests(folder)} | facts, indent=2) + "\n"
        )
    environment.write_record(out, "prepare", started, dataset=preset.dataset, revision=preset.dataset_revision)


def write_corpus(
    preset: params.PresetParams, name: str, separator: str | None, shares: dict[str, float], seed: int, folder: Path
) -> dict:
    """Write the three splits into `folder`; return what was done to them, for the manifest."""
    dataset = preset.dataset
    if dataset == local.SAMPLE:
        user_files.refuse_separator(separator, "the sample")
        texts = corpus.docstring_articles(corpus.package_folder(SAMPLE_PACKAGE))
        files = [folder / f"{split}{documents.TEXT}" for split in SPLITS]
        marked = ((number > 0, text) for number, text in enumerate(texts))
        splits.distribute(marked, splits.assign(len(texts), shares, seed), files)
        return {}
    if source := local.resolve_local_path(f"presets.{name}.dataset", dataset, preset.dataset_revision):
        changes, unused = user_files.write_splits(source, preset.text_column, separator, folder)
        user_files.warn_about_json(source, folder)
    else:
        user_files.refuse_separator(separator, dataset)
        rows = hub.fetch_dataset(dataset, preset.dataset_config, preset.dataset_revision, preset.text_column)
        used, unused = user_files.read_splits(rows, dataset)
        changes = user_files.write_hub_rows(used, folder)
    facts = describe_changes(changes)
    if unused:
        facts["unused"] = unused
        names = "train, validation (or valid, dev, val) and test"
        echo(f"prepare: warning: not used: {', '.join(unused)[:300]}: expected splits named {names}")
    if missing := {split: share for split, share in shares.items() if split not in changes}:
        facts["cut_from_train"] = cut = splits.cut_splits(folder, missing, seed, str(dataset))
        sizes = ", ".join(f"{split} {count:,}" for split, count in cut.items() if split != "unit")
        order = "in their order" if cut["unit"] == "lines" else "at random"
        echo(f"prepare: cut {' and '.join(missing)} from train, by {cut['unit']} {order}: {sizes}")
    return facts


def describe_changes(changes: dict[str, Counter]) -> dict:
    """Print what was changed in each split; return it for the manifest."""
    words = {
        "line_ends": "line ends CRLF or CR written as LF",
        "byte_order_marks": "byte order mark left out",
        "blank_documents": "rows left out, blank or without text",
    }
    for split, counts in changes.items():
        for key, count in counts.items():
            echo(f"prepare: {split:10} {count:,} {words[key]}")
    return {"changes": {split: dict(counts) for split, counts in changes.items()}} if any(changes.values()) else {}


def advise(split: str, fraction: float, facts: dict) -> str:
    """Return what to do about a blank split: its share decides only what was cut, and from train the rest is cut."""
    advice = ["add text"]
    if fraction < 1:
        advice.append("raise prepare.fraction")
    cut = facts.get("cut_from_train", {})
    if split == "train" and cut:
        advice.append("lower the shares under prepare")
    elif split in cut:
        advice.append(f"raise prepare.{split}_share")
    return ", or ".join(advice)


def check_split(file: Path, split: str, dataset: str, advice: str) -> None:
    """Print the size of a split; refuse a blank one, with advice."""
    characters, count, blank = 0, 0, True
    for starts, piece in documents.read_marked(file, splits.LINE_CHARACTERS):
        characters, count = characters + len(piece), count + starts
        blank = blank and not piece.strip()
    if blank:
        raise StageError(f"{dataset}: the {split} split is empty: {advice}")
    unit = "articles" if file.suffix == documents.TEXT else "documents"
    echo(f"prepare: {split:10} {characters:>12,} characters, {count + 1:>7,} {unit}")


if __name__ == "__main__":
    main()
