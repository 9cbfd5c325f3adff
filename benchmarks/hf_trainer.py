"""The script that a user would write instead of this project: GPT-2 with transformers' Trainer and PEFT, measured.

    python -m benchmarks.hf_trainer --model FOLDER --tokens FOLDER --method lora --target all-linear --steps 60

It uses the project's token arrays and its measure of memory, nothing else of it, with defaults throughout: fused AdamW,
sdpa, bf16 on a GPU. --compile adds `torch_compile=True`. QLoRA follows PEFT's guide without gradient checkpointing,
which would trade speed for memory (https://huggingface.co/docs/peft/developer_guides/quantization). Prints its figures
as a line of JSON.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gpt2lora.model.device import peak_memory


class Blocks(torch.utils.data.Dataset):
    """Full blocks of token ids, (tokens,) int64, from the train split of data/tokens."""

    def __init__(self, folder: Path, limit: int | None):
        ids, lengths = np.load(folder / "train.npy", mmap_mode="r"), np.load(folder / "train.lengths.npy")
        self.block_size = ids.shape[1] - 1
        self.ids = ids[lengths >= self.block_size][:limit, : self.block_size]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": block, "labels": block.clone()}


class Clock(TrainerCallback):
    """The times at the end of the warm-up and of the last step."""

    def __init__(self, warmup: int):
        self.warmup, self.times = warmup, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (self.warmup, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def main():
    parser = argparse.ArgumentParser(description="Fine-tune GPT-2 with transformers' Trainer, and measure it.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the token arrays")
    parser.add_argument("--method", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=4, help="of the base, with qlora")
    parser.add_argument("--target", default="all-linear", help="all-linear or the name of a layer")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="train on so many batches; default: all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, help="of the base and of LoRA; default: 0.1 (GPT-2's) and 0 (PEFT's)")
    parser.add_argument("--compile", action="store_true", help="torch_compile=True")
    parser.add_argument("--out", type=Path, help="save the trained model here")
    args = parser.parse_args()

    blocks = Blocks(args.tokens, args.steps and args.steps * args.batch_size)
    clock = Clock(args.warmup)
    model = load_model(args)
    gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.out or tempfile.gettempdir(),
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            optim="adamw_torch_fused",
            bf16=gpu,
            torch_compile=args.compile,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=blocks,
        callbacks=[clock],
    )
    result = trainer.train()
    if args.out:
        trainer.save_model(args.out)

    steps, step_tokens = result.global_step, args.batch_size * blocks.block_size
    peak = peak_memory(next(model.parameters()).device)
    record = {
        "tokens_per_second": step_tokens * (steps - args.warmup) / (clock.times[-1] - clock.times[0]),
        "peak_memory_bytes": peak,
        "steps": steps,
        "tokens": len(blocks) * blocks.block_size * args.epochs,
        "trained_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
        "train_loss": result.training_loss,
    }
    print(json.dumps(record))


def load_model(args: argparse.Namespace) -> torch.nn.Module:
    options = {}
    if args.method == "qlora" and args.bits == 4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
    elif args.method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if args.dropout is not None:
        options |= {f"{name}_pdrop": args.dropout for name in ("attn", "embd", "resid")}
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sdpa", **options)
    if args.method == "full":
        return model
    if args.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout or 0.0,
        target_modules="all-linear" if args.target == "all-linear" else [args.target],
        fan_in_fan_out=args.method == "lora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


if __name__ == "__main__":
    main()
