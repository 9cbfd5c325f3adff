"""What a user would write instead of this project: fine-tuning GPT-2 with transformers' Trainer and PEFT.

    python -m benchmarks.peer_trainer --model FOLDER --tokens FOLDER --method lora --target all-linear --steps 60

It reads the project's token arrays and nothing else of it, and takes no special care: defaults wherever there are any,
fused AdamW, sdpa, bf16 where there is a GPU. It prints what it measured as one line of JSON. QLoRA follows PEFT's guide
(https://huggingface.co/docs/peft/developer_guides/quantization) but for gradient checkpointing, which would trade
speed for memory.
"""

import time

STARTED = time.perf_counter()

import argparse  # noqa: E402  the clock starts before anything is imported
import json  # noqa: E402
import resource  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Blocks(torch.utils.data.Dataset):
    """Blocks of token ids, (tokens,) int64, from one split of data/tokens."""

    def __init__(self, folder: Path, limit: int | None):
        ids, lengths = np.load(folder / "train.npy", mmap_mode="r"), np.load(folder / "train.lengths.npy")
        self.block_size = ids.shape[1] - 1
        self.ids = ids[lengths >= self.block_size][:limit, : self.block_size]  # full blocks

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.ids[place].astype(np.int64))
        return {"input_ids": block, "labels": block.clone()}


class Clock(TrainerCallback):
    """Notes the time at the end of the first step, of the warm-up, and of each step since."""

    def __init__(self, warmup: int):
        self.warmup, self.first, self.warm, self.end = warmup, None, None, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (1, self.warmup, state.max_steps) and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.end = time.perf_counter()
        if state.global_step == 1:
            self.first = self.end
        if state.global_step == self.warmup:
            self.warm = self.end


def main():
    parser = argparse.ArgumentParser(description="Fine-tune GPT-2 with transformers' Trainer; measure it.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of the token arrays")
    parser.add_argument("--method", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--target", default="all-linear", help="all-linear or c_attn")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, help="train on so many batches, each once; default: all of them")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dropout", type=float, help="both of the base and of LoRA; default: 0.1 (GPT-2's) and 0.05")
    parser.add_argument("--out", type=Path, help="save the trained model here")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    quantized = {}
    if args.method == "qlora":
        quantized["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
        )
    if args.dropout is not None:
        quantized |= {f"{name}_pdrop": args.dropout for name in ("attn", "embd", "resid")}
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="sdpa", **quantized)
    if args.method == "qlora":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if args.method != "full":
        config = LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            lora_dropout=0.05 if args.dropout is None else args.dropout,
            target_modules="all-linear" if args.target == "all-linear" else [args.target],
            fan_in_fan_out=args.method == "lora",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)

    blocks = Blocks(args.tokens, args.steps and args.steps * args.batch_size)
    clock = Clock(args.warmup)
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
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=blocks,
        callbacks=[clock],
    )
    result = trainer.train()
    if args.out:
        trainer.save_model(args.out)

    steps = result.global_step
    tokens_a_step = args.batch_size * blocks.block_size
    print(
        json.dumps(
            {
                "tokens_per_second": tokens_a_step * (steps - args.warmup) / (clock.end - clock.warm),
                "peak_memory_bytes": torch.cuda.max_memory_reserved()
                if gpu
                else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_allocated_bytes": torch.cuda.max_memory_allocated() if gpu else None,
                "first_step_seconds": clock.first - STARTED,
                "wall_seconds": time.perf_counter() - STARTED,
                "steps": steps,
                "tokens": len(blocks) * blocks.block_size * args.epochs,
                "trained_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad),
                "train_loss": result.training_loss,
            }
        )
    )


if __name__ == "__main__":
    main()
