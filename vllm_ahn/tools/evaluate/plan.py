"""What is run: every suite with every method, checked before anything starts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_ahn import __version__
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import texts
from vllm_ahn.tools.evaluate.data import data_root
from vllm_ahn.tools.evaluate.methods import Base, Method
from vllm_ahn.tools.evaluate.suites import Suite
from vllm_ahn.tools.evaluate.tasks import RULER_GROUPS

BUCKETS = 32
"""Points of a curve of perplexity."""

AFTER_PROMPT = 3
"""Tokens that are generated: the engine gives no log-probabilities of the prompt without one, and while it makes the
third, it holds the cache that the whole text needs, without a step's tokens on top."""


def perplexity_arguments(context: int) -> dict[str, Any]:
    """Return the default arguments of `vllm.LLM` for texts of `context` tokens, the same for every method."""
    return {
        # A cached prefix is not computed, so it would have no log-probabilities.
        "enable_prefix_caching": False,
        # The cache of a step's tokens is held in any case, so steps must be short beside the text; and the logits of a
        # whole step are in memory at once, 4 bytes for each token of the vocabulary.
        "max_num_batched_tokens": min(1024, max(32, context // BUCKETS)),
    }


NO_INFLUENCE = (
    "gpu_memory_utilization", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_seqs", "download_dir",
    "max_parallel_loading_workers", "disable_log_stats",
)  # fmt: skip
"""Arguments of `vllm.LLM` that do not change answers: where things lie, and how much runs at once."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How one suite is run, for every method."""

    suite: Suite
    max_model_len: int
    window: int
    sinks: int
    limit: int | None = None
    """Samples of each set, None for all."""

    data: str | None = None
    """Local data folder, absolute; None for the hub."""

    texts: tuple[str, ...] | None = None
    """Files whose perplexity is measured, absolute; None for PG19."""

    @property
    def capacity(self) -> int:
        """W + S, tokens."""
        return self.window + self.sinks

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt: the paper's, or what `max_model_len` leaves for it."""
        return min(self.suite.max_prompt_tokens, self.max_model_len - self.suite.max_answer_tokens)

    @property
    def context(self) -> int:
        """Tokens of a stretch of text whose perplexity is measured."""
        return self.max_model_len - AFTER_PROMPT

    def lm_eval(self) -> tuple[str, dict[str, Any], str]:
        """Return lm-eval's group to run, its metadata, and the name of the score."""
        found: dict[str, Any] = {} if self.data is None else {"data_folder": self.data}
        if self.suite.group in RULER_GROUPS:
            fits = {length: group for group, length in RULER_GROUPS.items() if length <= self.max_model_len}
            return fits[max(fits)], found, str(max(fits))
        if self.prompt_tokens < self.suite.max_prompt_tokens:
            found["max_prompt_tokens"] = self.prompt_tokens
        return self.suite.group, found, "score"

    def departures(self) -> list[str]:
        """Return how the run differs from the paper's, in words; empty if it can be compared with it."""
        suite = self.suite
        lengths = (
            ("window", self.window, suite.window),
            ("sinks", self.sinks, suite.sinks),
            ("prompts of at most", self.prompt_tokens, suite.max_prompt_tokens),
        )
        found = [f"{name} {ours:,} instead of {theirs:,}" for name, ours, theirs in lengths if ours != theirs]
        if self.limit is not None:
            found.append(f"only the first {self.limit} samples of each set")
        return found

    def check(self) -> None:
        """Raise `AHNError` for lengths that make the suite meaningless, and for missing data."""
        name, room = self.suite.name, self.max_model_len - self.suite.max_answer_tokens
        minimum = self.suite.max_answer_tokens + 3
        if self.suite.group in RULER_GROUPS:
            minimum = min(RULER_GROUPS.values())
        if self.max_model_len < minimum:
            raise AHNError(f"{name}: --max-model-len is {self.max_model_len}, expected at least {minimum}")
        if room <= self.capacity:
            raise AHNError(
                f"{name}: prompts of {room} tokens (--max-model-len {self.max_model_len}, less the answer) never leave "
                f"window and sinks, {self.window} + {self.sinks}, expected a smaller --window"
            )
        if self.texts is not None:
            if not "".join(texts.read_text(text) for text in self.texts).strip():
                raise AHNError(f"--text: {', '.join(self.texts)} holds no text, expected some")
        elif self.suite.kind == "perplexity":
            texts.pg19_folder(self.data)
        elif root := data_root(self.data):
            for file in self.suite.files:
                file.local(root)


def make_setting(suite: Suite, *, max_model_len: int | None = None, **more: Any) -> Setting:
    """Return the checked setting of `suite`, with the paper's lengths where one is None. Raises `AHNError`.

    Args:
        max_model_len: tokens; a suite that needs fewer takes fewer.
        more: other fields of `Setting`.
    """
    setting = Setting(
        suite,
        max_model_len=min(max_model_len or suite.max_model_len, suite.max_model_len),
        **{name: getattr(suite, name) for name in ("window", "sinks")}
        | {name: value for name, value in more.items() if value is not None},
    )
    setting.check()
    return setting


@dataclasses.dataclass(frozen=True)
class Row:
    """One method of one suite: all that a worker process is told."""

    setting: Setting
    method: Method
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of `vllm.LLM`."""

    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What decides the model's answers besides the question and the device: no paths or names, but the files
    themselves (`Base.files`), how they are run, and by which versions."""

    not_run: str = ""
    """Why there is nothing to run."""

    @property
    def name(self) -> str:
        """The row in file names."""
        return f"{self.setting.suite.name}.{self.method.slug}"

    @property
    def key(self) -> str:
        """A hash of the row and of the code that asks and scores: a row finished under it is not run again."""
        code = [(path.name, path.read_bytes()) for path in sorted(Path(__file__).parent.iterdir()) if path.is_file()]
        return hashlib.sha256(repr((self, versions(), code)).encode()).hexdigest()


def make_plan(
    settings: Sequence[Setting], methods: Sequence[Method], base: Base, given: Mapping[str, Any]
) -> list[Row]:
    """Return every setting with every method. Raises `AHNError` if any of them cannot run.

    Args:
        given: the arguments of `vllm.LLM` that the user chose.
    """
    return [_row(setting, method, base, given) for setting in settings for method in methods]


def _row(setting: Setting, method: Method, base: Base, given: Mapping[str, Any]) -> Row:
    length = setting.max_model_len
    if method.name == "yarn" and base.yarn_factor(length) is None:
        fits = f"{length:,} tokens fit the base's own {base.positions:,}, so it is full attention"
        return Row(setting, method, not_run=f"not run: {fits}")
    defaults = perplexity_arguments(setting.context) if setting.suite.kind == "perplexity" else {}
    # All that decides how the model answers. Methods differ in additional_config and hf_overrides only.
    engine = {**defaults, **given, "max_model_len": length}
    served = {}
    if config := method.config(base, setting.window, setting.sinks):
        # The plugin extends the positions, as for every AHN that is served.
        engine["additional_config"] = {
            "ahn": {"checkpoint": method.ahn, "window": setting.window, "sinks": setting.sinks}
        }
        served = {name: value for name, value in config.to_dict().items() if name not in ("checkpoint", "revision")}
    elif overrides := base.overrides(length, yarn=method.name == "yarn"):
        engine["hf_overrides"] = overrides
    identity = {
        "base": base.files,
        "ahn": served,
        "ahn_files": method.files,
        "engine": {k: v for k, v in engine.items() if k not in ("additional_config", *NO_INFLUENCE)},
        "versions": {name: found for name, found in versions().items() if name != "lm-eval"},
    }
    engine["model"] = base.name
    if base.revision is not None:
        engine |= {"revision": base.revision, "tokenizer_revision": base.revision}
    return Row(setting, method, engine, identity)


def versions() -> dict[str, str]:
    """Return the versions of this package and of what it runs on, as far as installed."""
    found = {"vllm-ahn": __version__}
    for name in ("vllm", "torch", "transformers", "lm-eval"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
