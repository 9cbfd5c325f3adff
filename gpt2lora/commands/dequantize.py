"""expand: an adapter that was stored in 8 or 4 bits, as an ordinary PEFT adapter.

in   data/adapter with lora.bits 8 or 4
out  a folder for `PeftModel.from_pretrained`: the same values in fp32
"""

import shutil
from pathlib import Path

import click

from gpt2lora.pipeline.artifacts import need, whole
from gpt2lora.pipeline.cli import Stop, say, stage


@stage
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--out", type=Path, required=True, help="Folder to write, which must not exist.")
def main(adapter: Path, out: Path) -> None:
    """Write a quantised adapter as an ordinary PEFT adapter."""
    need(adapter, "train")
    if out.exists():
        raise Stop(f"{out} exists: expected the name of a new folder")
    from safetensors.torch import save_file

    from gpt2lora.model import fake_quant, loading, lora

    if not (adapter / fake_quant.FILE).exists():
        raise Stop(
            f"{adapter} holds no {fake_quant.FILE}: it was not trained with lora.bits 8 or 4, and needs no expanding"
        )
    loading.check_adapter(adapter)
    tensors = fake_quant.load(adapter)
    with whole(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / lora.WEIGHTS, {"format": "pt"})
        shutil.copyfile(adapter / lora.CONFIG, folder / lora.CONFIG)
    say(f"expand: {out} holds {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
