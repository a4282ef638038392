"""A training run from beginning to end."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from vllm_ahn.checkpoint.check import read_checkpoint
from vllm_ahn.checkpoint.find import local_folder, split_revision
from vllm_ahn.checkpoint.options import read_config
from vllm_ahn.checkpoint.tensors import AHNOptions
from vllm_ahn.checkpoint.write import ahn_config, write_json, write_weights
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
from vllm_ahn.reference import new_memory
from vllm_ahn.tools.distill.data import Samples, read_samples
from vllm_ahn.tools.distill.model import Distillation, trained_tensors
from vllm_ahn.tools.distill.settings import Settings

SETTINGS_FILE = "distill.json"


def distill(settings: Settings) -> pathlib.Path:
    """Train an AHN and write it to ``settings.output``.

    Beside it stay ``distill.json`` (the settings), ``loss.json`` and ``loss.png`` (the curve) and the newest
    ``checkpoint-N`` folders, from which a run that was cut short continues.

    Returns:
        The folder of the checkpoint to serve the base with.

    Raises:
        AHNError: base, data or output are bad, which is found before anything is trained; or training diverges.
    """
    from transformers import AutoTokenizer

    from vllm_ahn.tools.distill.curve import plot_curve
    from vllm_ahn.tools.distill.trainer import LOSS_FILE, make_trainer

    output = pathlib.Path(settings.output)
    last = _check_output(settings, output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.dtype == "auto":
        settings = dataclasses.replace(settings, dtype="bfloat16" if device == "cuda" else "float32")
    name, revision = split_revision(settings.base)
    base = local_folder(name, revision)
    values = read_config(base, settings.base)
    _check_base(settings.base, values)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    samples = Samples(settings, read_samples(settings, tokenizer))

    torch.manual_seed(settings.seed)
    # The lengths in it are replaced for every sample.
    ahn = AHNConfig(settings.memory, use_q_proj=settings.use_q_proj)
    recurrence = "fla" if device == "cuda" else "chunk"
    model = new_memory(base, ahn, recurrence, getattr(torch, settings.dtype), slowest=settings.length)
    config = ahn_config(values, settings.memory, AHNOptions(settings.use_q_proj))
    if is_first_process():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / SETTINGS_FILE, dataclasses.asdict(settings))
    trainer = make_trainer(settings, Distillation(model, settings.loss, settings.checkpointing), samples, config)
    trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        write_json(output / "config.json", config)
        write_weights(output, trained_tensors(model), _served_dtype(values), 1)
        read_checkpoint(output, settings.output)  # what would be refused when served is refused here
        plot_curve(output / LOSS_FILE, output / "loss.png")
    return output


def _check_output(settings: Settings, output: pathlib.Path) -> str | None:
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if settings.resume:
        if last is None:
            raise AHNError(f"--resume: no checkpoint in {output}, expected the --output of a run that was cut short")
        _check_same_run(settings, output)
        return last
    # What the first has written already, the others find there.
    if is_first_process() and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise AHNError(f"--output {output}: exists, expected a new or empty folder, or --resume to continue a run")
    return None


def is_first_process() -> bool:
    """Return whether this is the process, of those that torchrun or Accelerate started, that writes and reports."""
    return os.environ.get("RANK", "0") == "0"


def _check_same_run(settings: Settings, output: pathlib.Path) -> None:
    before = json.loads((output / SETTINGS_FILE).read_text(encoding="utf-8"))
    now: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    free = {"resume", "output", "dtype", "save_every", "checkpointing"}
    changed = [key for key in now if key not in free and before.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise AHNError(f"--resume: {key} is {now[key]!r}, expected {before.get(key)!r} as in {output / SETTINGS_FILE}")


def _check_base(name: str, config: dict[str, Any]) -> None:
    if "_ahn_implementation" in config:
        raise AHNError(f"{name}: has an AHN of its own (_ahn_implementation in its config.json), expected a base model")
    if config.get("quantization_config"):
        raise AHNError(f"{name}/config.json: quantization_config is set, expected a base that is not quantised")


def _served_dtype(config: dict[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
