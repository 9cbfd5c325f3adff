"""The training loop against transformers' Trainer with PEFT: the same rows, the same losses and the same weights."""

import itertools

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import load, new_adapter, write_gpt2, write_llama
from tiny import train_params
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gpt2lora.dataset.blocks import Blocks
from gpt2lora.training import dropout, loop
from gpt2lora.training.optimizer import lr_at_step

STEPS, BATCH, TOKENS, SEED = 20, 4, 17, 3
pytestmark = pytest.mark.slow
OPTIONS = {"validations": STEPS, "clip_norm": 0.5, "weight_decay": 0.1, "learning_rate": 5e-3}


class Losses(TrainerCallback):
    """The loss of each step, as the Trainer logs it."""

    def __init__(self):
        self.values, self.rates = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values.append(logs["loss"])
            self.rates.append(logs["learning_rate"])


class ExactTrainer(Trainer):
    """A Trainer that keeps the order of its rows, and logs a loss with all its digits."""

    def _get_train_sampler(self, *_):
        return None

    def compute_loss(self, *arguments, **options):
        loss = super().compute_loss(*arguments, **options)
        self.exact.append(float(loss))
        return loss


def trainer_run(network: torch.nn.Module, rows: np.ndarray, folder) -> tuple[list[float], list[float]]:
    """Train on rows, (rows, tokens), in their order; return the loss and the learning rate of each step."""
    options = train_params(**OPTIONS)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip_norm,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    losses = Losses()
    labels = rows.astype(np.int64)
    labels[:, 0] = -100  # never predicted, but the Trainer counts it as a target of some models
    items = [
        {"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(wanted)}
        for row, wanted in zip(rows.astype(np.int64), labels, strict=True)
    ]
    trainer = ExactTrainer(network, arguments, train_dataset=items, callbacks=[losses])
    trainer.exact = []
    trainer.create_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: lr_at_step(step + 1, STEPS, options) / options.learning_rate
    )
    trainer.lr_scheduler = schedule
    trainer.train()
    return trainer.exact, losses.rates


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("write_model", [write_gpt2, write_llama], ids=["gpt2", "llama"])
def test_losses_rates_and_weights_are_those_of_the_trainer(tmp_path, write_model, method):
    write_model(tmp_path / "model", initializer_range=0.05)
    ids = np.random.default_rng(0).integers(1, 300, (STEPS * BATCH, TOKENS)).astype(np.uint16)
    split = Blocks(ids, np.full(len(ids), TOKENS), 1)
    ours = new_adapter(tmp_path / "model") if method == "lora" else load(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    dropout.set_base_dropout(theirs, 0.0)
    if method == "lora":
        names = sorted(ours.peft_config["default"].target_modules)
        theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    theirs.load_state_dict(ours.state_dict())
    history = loop.fit(ours, split, split, train_params(**OPTIONS), SEED)
    order = np.concatenate(list(itertools.islice(loop.shuffled_batches(len(split), BATCH, 1, SEED), STEPS)))
    losses, rates = trainer_run(theirs, ids[order], tmp_path / "trainer")
    assert [row["train_loss"] for row in history.rows] == pytest.approx(losses, rel=1e-5)
    assert [row["learning_rate"] for row in history.rows] == pytest.approx(rates, rel=1e-6)
    if history.best["step"] == STEPS:  # `fit` ends with the weights of the lowest validation loss
        value, other = (
            torch.cat([each.detach().flatten() for each in network.parameters()]) for network in (ours, theirs)
        )
        # Of all weights together: AdamW turns the rounding of a gradient near 0 into a step of one weight.
        assert torch.linalg.norm(value - other) <= 1e-4 * torch.linalg.norm(other)
