"""The training loop: Hugging Face's ``Trainer``, told what to save, in what order to read, and when to stop."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from vllm_ahn.checkpoint.write import write_json, write_weights
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.distill.data import Samples, collate
from vllm_ahn.tools.distill.model import Distillation, trained_tensors
from vllm_ahn.tools.distill.settings import Settings

LOSS_FILE = "loss.json"


class DistillationTrainer(Trainer):
    """A trainer that saves the AHN alone, in the layout that is served.

    Args:
        config: the ``config.json`` to save.
    """

    def __init__(self, *args: Any, config: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.config = config

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = pathlib.Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", self.config)
        # To resume from, in full precision. What is served is written at the end.
        write_weights(folder, trained_tensors(self._distillation.model), "float32", 1)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        tensors = load_file(pathlib.Path(resume_from_checkpoint) / "model.safetensors")
        found = self._distillation.model.load_state_dict(tensors, strict=False)
        missing = trained_tensors(self._distillation.model).keys() & set(found.missing_keys)
        if missing or found.unexpected_keys:
            raise AHNError(
                f"{resume_from_checkpoint}: its tensors are not those of this run's memory, expected a checkpoint of "
                "the same --memory and base"
            )

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        # The samples know their order themselves.
        return SequentialSampler(self.train_dataset)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise AHNError(self._diverged("the loss"))
        return loss

    def _diverged(self, what: str) -> str:
        # Weights with which this happens are not worth keeping, if they have just been saved.
        latest = pathlib.Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(latest, ignore_errors=True)
        last = get_last_checkpoint(self.args.output_dir)
        kept = f"{last} is the last good state" if last else "nothing was saved yet"
        return (
            f"step {self.state.global_step + 1}: {what} is not finite any more, and training stops; {kept}; "
            "expected a smaller --learning-rate"
        )

    @property
    def _distillation(self) -> Distillation:
        return self.accelerator.unwrap_model(self.model)


class Watch(TrainerCallback):
    """A callback that stops before gradients that are not finite spoil the weights, and writes the loss curve."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.trainer: DistillationTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        gradients = (p.grad for p in self.trainer._distillation.parameters() if p.grad is not None)
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise AHNError(self.trainer._diverged("a gradient"))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            write_curve(self.folder, state.log_history)


def write_curve(folder: pathlib.Path, history: list[dict[str, Any]]) -> None:
    """Write ``loss.json`` from what the trainer logged: step, loss (nats a token), learning rate, gradient norm."""
    keys = ("step", "loss", "learning_rate", "grad_norm")
    curve = [{key: entry[key] for key in keys if key in entry} for entry in history if "loss" in entry]
    (folder / LOSS_FILE).write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")


def make_trainer(
    settings: Settings, distillation: Distillation, samples: Samples, config: dict[str, Any]
) -> DistillationTrainer:
    """Return the trainer of a run. Raises `AHNError` for a batch that the processes cannot share."""
    folder = pathlib.Path(settings.output)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.micro_batch,
        gradient_accumulation_steps=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(settings.warm_up * settings.steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        max_grad_norm=1.0,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, settings.steps // 100),
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        seed=settings.seed,
        data_seed=settings.seed,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
    )
    share = settings.micro_batch * arguments.world_size
    if settings.batch_size % share:
        raise AHNError(
            f"--batch-size is {settings.batch_size}, expected a multiple of --micro-batch times processes, {share}"
        )
    arguments.gradient_accumulation_steps = settings.batch_size // share
    watch = Watch(folder)
    trainer = DistillationTrainer(
        model=distillation,
        args=arguments,
        train_dataset=samples,
        data_collator=collate,
        callbacks=[watch],
        config=config,
    )
    watch.trainer = trainer
    return trainer
