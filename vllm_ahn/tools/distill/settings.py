"""The settings that decide a training run."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vllm_ahn.config import check_sinks, check_window
from vllm_ahn.errors import AHNError
from vllm_ahn.memory.spec import MEMORIES, SHORT_NAMES
from vllm_ahn.tools.distill.lengths import LOSSLESS, MAX_RATIO, SINKS


@dataclasses.dataclass(frozen=True)
class Settings:
    """A training run. The defaults are the paper's. Raises `AHNError` for a value that is not possible."""

    base: str
    """The model to extend: a folder or a hub repository."""

    data: tuple[str, ...]
    """Text files, JSON lines, or names of data sets of the hub."""

    output: str
    """The folder to write."""

    memory: str = "GatedDeltaNet"
    """One of `vllm_ahn.memory.spec.MEMORIES`."""

    use_q_proj: bool = False
    """The memory's queries have a projection of their own, which the published checkpoints lack
    (`MemorySpec.own_query`)."""

    length: int = 24_576
    """Max tokens of a sample."""

    window: int | None = None
    sinks: int | None = None
    """W and S, tokens, of every sample; both None to draw them for each."""

    lossless: tuple[int, ...] = LOSSLESS
    """What W + S is drawn from, tokens."""

    sink_choices: tuple[int, ...] = SINKS
    """What S is drawn from, tokens."""

    max_ratio: int = MAX_RATIO
    """A sample is shorter than this many times the W + S that is drawn for it."""

    loss: Literal["kl", "ce"] = "kl"
    """``kl``: divergence from the teacher's distribution. ``ce``: cross entropy of the text's next token."""

    steps: int = 740
    batch_size: int = 128
    """Samples of a step, over all processes."""

    micro_batch: int = 1
    """Samples that a process works on at a time; they share their lengths."""

    learning_rate: float = 1e-4
    warm_up: float = 0.1
    """Share of the steps in which the rate rises; then it falls as a cosine."""

    weight_decay: float = 0.1
    save_every: int = 50
    """Steps between checkpoints to resume from."""

    seed: int = 0
    dtype: str = "auto"
    """Of the frozen base: float32, bfloat16 or float16; auto: bfloat16 on a GPU, float32 on a CPU."""

    checkpointing: bool = True
    """Keep only the layers' inputs for the gradient, and compute the layers twice: less memory for more time."""

    resume: bool = False
    """Continue from the newest checkpoint in `output`."""

    @property
    def fixed(self) -> tuple[int, int] | None:
        """W and S of every sample; None if they are drawn."""
        return None if self.window is None or self.sinks is None else (self.window, self.sinks)

    def __post_init__(self) -> None:
        if self.memory not in MEMORIES:
            raise AHNError(f"--memory is {self.memory!r}, expected one of {', '.join(SHORT_NAMES)}")
        if self.use_q_proj and not MEMORIES[self.memory].own_query:
            known = ", ".join(memory.short_name for memory in MEMORIES.values() if memory.own_query)
            raise AHNError(f"--use-q-proj is for --memory {known}, but it is {self.memory}")
        if (self.window is None) != (self.sinks is None):
            raise AHNError("--window and --sinks are expected both or neither")
        if self.window is not None:
            capacity = check_window(self.window) + check_sinks(self.sinks)
            if capacity >= self.length:
                raise AHNError(
                    f"--length is {self.length}, expected more tokens than --window and --sinks together, {capacity}: "
                    "within them nothing is learnt"
                )
        for name in ("length", "steps", "batch_size", "micro_batch", "save_every", "max_ratio"):
            if getattr(self, name) < 1:
                raise AHNError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.batch_size % self.micro_batch:
            raise AHNError(
                f"--batch-size is {self.batch_size}, expected a multiple of --micro-batch {self.micro_batch}"
            )
        if not self.lossless or min(self.lossless) < 1 or not self.sink_choices or min(self.sink_choices) < 0:
            raise AHNError("--lossless and --sink-choices are expected to be numbers of tokens")
        if self.loss not in ("kl", "ce"):
            raise AHNError(f"--loss is {self.loss!r}, expected kl or ce")
        if not 0 <= self.warm_up < 1:
            raise AHNError(f"--warm-up is {self.warm_up}, expected a share of the steps, from 0 to less than 1")
