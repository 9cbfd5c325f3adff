"""prepare: the corpus as three text files, from the hub, a folder, a single file, or the embedded sample.

in   params.yaml: preset, presets.<preset>.dataset, .dataset_config, .dataset_revision, prepare.*, seed
out  data/raw/{train,validation,test}.txt, UTF-8; manifest.json with their digests
     data/environment/prepare.json: hardware, versions and duration
"""

import json
import random
import time
from pathlib import Path

import click

from gpt2lora.dataset import articles
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, atomic_output, digests
from gpt2lora.pipeline.cli import StageError, command, echo
from gpt2lora.pipeline.schemas import PrepareParams, check_params
from gpt2lora.sample import corpus
from gpt2lora.sources import hub, local
from gpt2lora.sources.hub import restore_line
from gpt2lora.sources.local import read_text

SPLIT_FILES = {
    "train": ("train.txt",),
    "validation": ("validation.txt", "valid.txt", "dev.txt"),
    "test": ("test.txt",),
}
SAMPLE_PACKAGE = "datasets"


@command
@click.option("--out", type=Path, default="data/raw", show_default=True, help="Folder of the three text files.")
def main(out: Path) -> None:
    """Fetch the corpus and split it into train, validation and test."""
    started = time.perf_counter()
    check_params()
    name = params.choice("preset", "presets")
    preset = params.section(f"presets.{name}", params.PresetParams)
    prepare = params.section("prepare", PrepareParams)
    seed = params.seed()
    shares = (prepare.validation_share, prepare.test_share)

    origin = {"dataset": preset.dataset, "config": preset.dataset_config, "revision": preset.dataset_revision}
    echo(f"prepare: reading {preset.dataset}")
    if preset.dataset == local.SAMPLE:
        splits = assign_articles(corpus.docstring_articles(corpus.package_folder(SAMPLE_PACKAGE)), *shares, seed)
    elif source := local.resolve_local_path(f"presets.{name}.dataset", preset.dataset, preset.dataset_revision):
        splits = read_folder(source) if source.is_dir() else split_text(source, *shares, seed)
    else:
        rows = hub.fetch_dataset(preset.dataset, preset.dataset_config, preset.dataset_revision)
        splits = {split: "".join(map(restore_line, rows[split])) for split in SPLIT_FILES}

    with atomic_output(out) as folder:
        folder.mkdir()
        for split, text in splits.items():
            text = take_fraction(text, prepare.fraction, seed)
            if not text.strip():
                raise StageError(
                    f"{preset.dataset}: the {split} split is empty: add text, or raise the shares under prepare"
                )
            (folder / f"{split}.txt").write_bytes(text.encode())
            echo(f"prepare: {split:10} {len(text):>12,} characters, {len(articles.split_articles(text)):>7,} articles")
        (folder / MANIFEST).write_text(json.dumps({"source": origin, "files": digests(folder)}, indent=2) + "\n")
    environment.write_record(out, "prepare", started, dataset=preset.dataset, revision=preset.dataset_revision)


def read_folder(folder: Path) -> dict[str, str]:
    """Return the text of each split in a folder."""
    return {split: read_text(find_split(folder, names)) for split, names in SPLIT_FILES.items()}


def find_split(folder: Path, names: tuple[str, ...]) -> Path:
    """Return the first of the named files that exists."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise StageError(
        f"{folder}: no {' or '.join(names)}: expected train.txt, validation.txt (or valid, dev) and test.txt"
    )


def split_text(path: Path, validation_share: float, test_share: float, seed: int) -> dict[str, str]:
    """Split one text at random by whole articles, or, if it has fewer than three, by lines in their order."""
    text = read_text(path)
    texts = articles.split_articles(text)
    if len(texts) >= 3:
        return assign_articles(texts, validation_share, test_share, seed)
    lines = text.splitlines(keepends=True)
    if len(lines) < 3:
        raise StageError(f"{path}: {len(lines)} lines: expected at least three articles or three lines to split")
    return {split: "".join(part) for split, part in partition(lines, validation_share, test_share).items()}


def assign_articles(texts: list[str], validation_share: float, test_share: float, seed: int) -> dict[str, str]:
    """Assign whole articles to the splits at random; within a split they keep their order."""
    shuffled = random.Random(seed).sample(range(len(texts)), len(texts))
    parts = partition(shuffled, validation_share, test_share)
    return {split: "".join(texts[index] for index in sorted(part)) for split, part in parts.items()}


def partition(items: list, validation_share: float, test_share: float) -> dict[str, list]:
    """Split a list of at least three items into train, validation and test, in this order, none of them empty."""
    test = min(max(1, round(len(items) * test_share)), len(items) - 2)
    validation = min(max(1, round(len(items) * validation_share)), len(items) - test - 1)
    edge = len(items) - validation - test
    return {"train": items[:edge], "validation": items[edge : edge + validation], "test": items[edge + validation :]}


def take_fraction(text: str, fraction: float, seed: int) -> str:
    """Keep a random share of a split's articles, at least one, in their order."""
    if fraction == 1:
        return text
    texts = articles.split_articles(text)
    count = min(len(texts), max(1, round(len(texts) * fraction)))
    return "".join(texts[index] for index in sorted(random.Random(seed).sample(range(len(texts)), count)))


if __name__ == "__main__":
    main()
