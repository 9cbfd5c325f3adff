"""sources: links to a preset's model and texts, and to an adapter to start from, so that DVC sees when they change.

in   params.yaml: preset, presets.<preset>.model, .model_revision, .dataset, .dataset_revision,
     lora.start_from
out  data/sources/paths.json: the full path of each, null for what is on the hub or in the sample
     data/sources/adapter.json: the full path of the adapter that training starts from, or null
     data/sources/model, .../dataset, .../adapter: links to them, of which DVC knows only as inputs of `base`, `prepare`
     and `train`: before DVC runs a stage it removes its outputs, or changes their permissions
"""

import json
import os
from pathlib import Path

import click

from gpt2lora.pipeline import params
from gpt2lora.pipeline.adapter_files import find_start
from gpt2lora.pipeline.artifacts import atomic_output
from gpt2lora.pipeline.cli import command, echo
from gpt2lora.pipeline.schemas import LoraParams, check_params
from gpt2lora.sources import hub, local

ELSEWHERE = "not a file or a folder of this disk\n"


@command
@click.option("--out", type=Path, default="data/sources", show_default=True, help="Folder of the links.")
def main(out: Path) -> None:
    """Link the preset's model and texts, and the adapter to start from, into data/sources."""
    check_params()
    name = params.choice("preset", "presets")
    preset = params.section(f"presets.{name}", params.PresetParams)
    paths = {
        "model": find_source(f"presets.{name}.model", preset.model, preset.model_revision),
        "dataset": find_source(f"presets.{name}.dataset", preset.dataset, preset.dataset_revision),
    }
    start = find_start(params.section("lora", LoraParams))
    for kind, path in paths.items():
        write_link(out / kind, path)
    adapter = {"adapter": start and os.path.abspath(start)}
    write_link(out / "adapter", adapter["adapter"])
    # Two files: an adapter to start from is no input of `base` and `prepare`.
    for name, content in (("paths.json", paths), ("adapter.json", adapter)):
        with atomic_output(out / name) as file:
            file.write_text(json.dumps(content, indent=2) + "\n")
    given = {"model": preset.model, "dataset": preset.dataset}
    shown = {kind: path or place_of(given[kind]) for kind, path in paths.items()} | (adapter if start else {})
    echo("sources: " + ", ".join(f"{kind} {path}" for kind, path in shown.items()))


def find_source(key: str, source: str | None, revision: str | None) -> str | None:
    """Return the full path of a model or a dataset, None if it is not on this disk; refuse what can be neither."""
    if source == local.SAMPLE:
        return None
    if path := local.resolve_local_path(key, source, revision):
        return os.path.abspath(path)
    hub.check_revision(key.rpartition(".")[2], source, revision)
    return None


def place_of(source: str | None) -> str:
    """Return in words where a model or a dataset is that is not on this disk."""
    return "embedded" if source == local.SAMPLE else "on the hub"


def write_link(link: Path, path: str | None) -> None:
    """Make `link` a link to `path`, or a small file if there is none. What an older link points to is not touched."""
    link.parent.mkdir(parents=True, exist_ok=True)
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    if path:
        new.symlink_to(path)
    else:
        new.write_text(ELSEWHERE)
    new.replace(link)


if __name__ == "__main__":
    main()
