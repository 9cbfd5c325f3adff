"""dequantize: convert an adapter that was stored in 8 or 4 bits into a standard PEFT adapter.

in   data/adapter, trained with lora.bits 8 or 4
out  a folder for `PeftModel.from_pretrained`, with the same values in fp32
"""

import shutil
from pathlib import Path

import click

from gpt2lora.pipeline.adapter_files import verify_adapter
from gpt2lora.pipeline.artifacts import atomic_output, require_file
from gpt2lora.pipeline.cli import StageError, command, echo


@command
@click.option("--adapter", type=Path, default="data/adapter", show_default=True, help="Folder of the adapter.")
@click.option("--out", type=Path, required=True, help="Folder to write, which must not exist.")
def main(adapter: Path, out: Path) -> None:
    """Write a quantized adapter as a standard PEFT adapter."""
    require_file(adapter, "train")
    if out.exists():
        raise StageError(f"{out} exists: expected the name of a new folder")
    from safetensors.torch import save_file

    from gpt2lora.model import fake_quant, lora

    if not (adapter / fake_quant.QUANTIZED_WEIGHTS).exists():
        raise StageError(
            f"{adapter} holds no {fake_quant.QUANTIZED_WEIGHTS}: it was not trained with lora.bits 8 or 4, and is a "
            "standard PEFT adapter already"
        )
    verify_adapter(adapter)
    tensors = fake_quant.load_quantized(adapter)
    with atomic_output(out) as folder:
        folder.mkdir()
        save_file(tensors, folder / lora.ADAPTER_WEIGHTS, {"format": "pt"})
        shutil.copyfile(adapter / lora.ADAPTER_CONFIG, folder / lora.ADAPTER_CONFIG)
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    echo(f"dequantize: {out} holds {len(tensors)} tensors, {megabytes:.2f} MB")
