"""prepare: the corpus as three text files, from the hub, a folder, a single file, or the embedded sample.

in   params.yaml: preset, presets.<preset>.dataset, .dataset_config, .dataset_revision, prepare.*, seed
out  data/raw/{train,validation,test}.txt, UTF-8; manifest.json, their digests
     data/environment/prepare.json: what ran where, and how long
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import click

from gpt2lora.dataset import articles
from gpt2lora.pipeline import environment, params
from gpt2lora.pipeline.artifacts import MANIFEST, digests, whole
from gpt2lora.pipeline.cli import Stop, say, stage
from gpt2lora.sample import corpus
from gpt2lora.sources import hub, local
from gpt2lora.sources.hub import line
from gpt2lora.sources.local import read_text

NAMES = {
    "train": ("train.txt",),
    "validation": ("validation.txt", "valid.txt", "dev.txt"),
    "test": ("test.txt",),
}
SAMPLE_PACKAGE = "datasets"


@dataclass
class Prepare:
    fraction: float  # share of each split's articles that is kept
    validation_share: float  # of a corpus that comes as one text
    test_share: float

    def __post_init__(self):
        params.require(0 < self.fraction <= 1, "prepare.fraction", self.fraction, "a number above 0, at most 1")
        for name in ("validation_share", "test_share"):
            share = getattr(self, name)
            params.require(0 < share < 1, f"prepare.{name}", share, "a number between 0 and 1")
        both = self.validation_share + self.test_share
        params.require(both < 1, "prepare.validation_share + test_share", both, "a sum below 1")


@stage
@click.option("--out", type=Path, default="data/raw", show_default=True, help="Folder of the three text files.")
def main(out: Path) -> None:
    """Fetch the corpus and split it into train, validation and test."""
    started = time.perf_counter()
    name = params.chosen("preset", "presets")
    preset = params.section(f"presets.{name}", params.Preset)
    prepare = params.section("prepare", Prepare)
    seed = params.seed()
    shares = (prepare.validation_share, prepare.test_share)

    say(f"prepare: reading {preset.dataset}")
    if preset.dataset == local.SAMPLE:
        splits = split_articles(corpus.articles(corpus.package_folder(SAMPLE_PACKAGE)), *shares, seed)
    elif source := local.local(f"presets.{name}.dataset", preset.dataset, preset.dataset_revision):
        splits = read_folder(source) if source.is_dir() else split_text(source, *shares, seed)
    else:
        rows = hub.fetch_dataset(preset.dataset, preset.dataset_config, preset.dataset_revision)
        splits = {split: "".join(map(line, rows[split])) for split in NAMES}

    with whole(out) as folder:
        folder.mkdir()
        for split, text in splits.items():
            text = take(text, prepare.fraction, seed)
            if not text.strip():
                raise Stop(f"{preset.dataset}: the {split} split is empty: add text, or raise the shares under prepare")
            (folder / f"{split}.txt").write_bytes(text.encode())
            say(f"prepare: {split:10} {len(text):>12,} characters, {len(articles.split(text)):>7,} articles")
        (folder / MANIFEST).write_text(json.dumps({"files": digests(folder)}, indent=2) + "\n")
    environment.write(out, "prepare", started, dataset=preset.dataset, revision=preset.dataset_revision)


def read_folder(folder: Path) -> dict[str, str]:
    return {split: read_text(find(folder, names)) for split, names in NAMES.items()}


def find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise Stop(f"{folder}: no {' or '.join(names)}: expected train.txt, validation.txt (or valid, dev) and test.txt")


def split_text(path: Path, validation_share: float, test_share: float, seed: int) -> dict[str, str]:
    """Split one text by whole articles or, where it has fewer than three, by lines in their order."""
    text = read_text(path)
    pieces = articles.split(text)
    if len(pieces) >= 3:
        return split_articles(pieces, validation_share, test_share, seed)
    lines = text.splitlines(keepends=True)
    if len(lines) < 3:
        raise Stop(f"{path}: {len(lines)} lines: expected at least three articles or three lines to split")
    return {split: "".join(part) for split, part in cut(lines, validation_share, test_share).items()}


def split_articles(pieces: list[str], validation_share: float, test_share: float, seed: int) -> dict[str, str]:
    """Share whole articles out at random; within a split they keep their order."""
    places = random.Random(seed).sample(range(len(pieces)), len(pieces))
    parts = cut(places, validation_share, test_share)
    return {split: "".join(pieces[place] for place in sorted(part)) for split, part in parts.items()}


def cut(items: list, validation_share: float, test_share: float) -> dict[str, list]:
    """Cut a list of three items or more in three, none empty: train first, then validation, then test."""
    test = min(max(1, round(len(items) * test_share)), len(items) - 2)
    validation = min(max(1, round(len(items) * validation_share)), len(items) - test - 1)
    edge = len(items) - validation - test
    return {"train": items[:edge], "validation": items[edge : edge + validation], "test": items[edge + validation :]}


def take(text: str, fraction: float, seed: int) -> str:
    """Keep a share of a split's articles, at least one, chosen at random; they keep their order."""
    if fraction == 1:
        return text
    pieces = articles.split(text)
    count = min(len(pieces), max(1, round(len(pieces) * fraction)))
    return "".join(pieces[place] for place in sorted(random.Random(seed).sample(range(len(pieces)), count)))


if __name__ == "__main__":
    main()
