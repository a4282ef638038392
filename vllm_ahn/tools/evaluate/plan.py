"""What has to be run: every suite with every method, checked before anything starts."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import infinitebench, longbench, lveval, perplexity, texts
from vllm_ahn.tools.evaluate.base import Base
from vllm_ahn.tools.evaluate.data import DATA_VARIABLE, DataFile, local_file
from vllm_ahn.tools.evaluate.jobs import Job, identity
from vllm_ahn.tools.evaluate.methods import Method
from vllm_ahn.tools.evaluate.suites import LONGBENCH_SETS, LVEVAL_SETS, Suite

DATA_FILES: dict[str, tuple[DataFile, ...]] = {
    "lveval-128k": tuple(lveval.data_file(f"{name}_128k") for name in LVEVAL_SETS),
    "infinitebench": tuple(infinitebench.data_file(name) for name in infinitebench.SETS),
    "longbench": tuple(longbench.data_file(name) for name in LONGBENCH_SETS),
}
"""Suite -> what a local data folder must hold for it."""

RULER = "ruler-128k"
RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
"""The lengths that lm-eval's RULER tasks have a metric for."""


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
        return self.max_model_len - perplexity.AFTER_PROMPT

    def departures(self) -> list[str]:
        """In what the run differs from the paper's, in words; empty if it can be compared with it."""
        suite = self.suite
        found = [
            f"{name} {ours:,} instead of {theirs:,}"
            for name, ours, theirs in (
                ("window", self.window, suite.window),
                ("sinks", self.sinks, suite.sinks),
                ("prompts of at most", self.prompt_tokens, suite.max_prompt_tokens),
            )
            if ours != theirs
        ]
        if self.limit is not None:
            found.append(f"only the first {self.limit} samples of each set")
        return found

    def check(self) -> None:
        """Raises `AHNError` for lengths with which the suite means nothing, and for data that is not there."""
        name, room = self.suite.name, self.max_model_len - self.suite.max_answer_tokens
        least = RULER_LENGTHS[0] if self.suite.name == RULER else self.suite.max_answer_tokens + 3
        if self.max_model_len < least:
            raise AHNError(f"{name}: --max-model-len is {self.max_model_len}, expected at least {least}")
        if room <= self.capacity:
            raise AHNError(
                f"{name}: prompts of {room} tokens (--max-model-len {self.max_model_len}, less the answer) never leave "
                f"window and sinks, {self.window} + {self.sinks}, expected a smaller --window"
            )
        if self.suite.kind == "perplexity":
            if self.texts is None:
                texts.pg19_folder(self.data)
            elif not "".join(texts.read_text(text) for text in self.texts).strip():
                raise AHNError(f"--text: {', '.join(self.texts)} holds no text, expected some")
        elif root := self.data or os.environ.get(DATA_VARIABLE):
            for file in DATA_FILES.get(name, ()):
                local_file(Path(root), file)

    def questions(self) -> dict[str, Any]:
        """`Job.questions`."""
        suite = self.suite
        if suite.kind == "perplexity":
            return {"texts": self.texts, "data": self.data, "context": self.context, "limit": self.limit}
        asked: dict[str, Any] = {"limit": self.limit, "metric": suite.metric, "group": suite.group, "metadata": {}}
        asked["lm_eval_tasks"] = suite.name == RULER  # it takes lm-eval seconds to look through its own
        if self.data is not None:
            asked["metadata"]["data_folder"] = self.data
        if suite.name == RULER:
            length = max(length for length in RULER_LENGTHS if length <= self.max_model_len)
            if length < suite.max_model_len:
                metadata = {"version": 1.0, "max_seq_lengths": [length]}
                tasks = [{"task": task, "metadata": metadata} for task in suite.tasks]
                asked |= {"metric": str(length), "group": {"group": f"ahn_ruler_niah_{length}", "task": tasks}}
        elif self.prompt_tokens < suite.max_prompt_tokens:
            asked["metadata"]["max_prompt_tokens"] = self.prompt_tokens
        return asked


def make_setting(
    suite: Suite, *, max_model_len: int | None = None, window: int | None = None, sinks: int | None = None, **more: Any
) -> Setting:
    """The setting of `suite` with the paper's lengths where none is given, checked. Raises `AHNError`.

    Args:
        max_model_len: tokens; a suite that needs less takes less.
        more: other fields of `Setting`.
    """
    setting = Setting(
        suite,
        max_model_len=suite.max_model_len if max_model_len is None else min(max_model_len, suite.max_model_len),
        window=suite.window if window is None else window,
        sinks=suite.sinks if sinks is None else sinks,
        **more,
    )
    setting.check()
    return setting


@dataclasses.dataclass(frozen=True)
class Row:
    """One method of one suite: a job, or why there is none."""

    setting: Setting
    method: Method
    job: Job | None
    note: str = ""


def make_plan(
    settings: Sequence[Setting],
    methods: Sequence[Method],
    base: Base,
    given: Mapping[str, Any],
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Every setting with every method; raises `AHNError` for what cannot be run, whichever row it is.

    Args:
        given: the user's arguments of `vllm.LLM`, `methods.check_arguments`.
        progress: called with what is being checked.
    """
    rows = []
    for setting in settings:
        for method in methods:
            progress(f"checking {setting.suite.name}, {method.label}")
            rows.append(_row(setting, method, base, given))
    return rows


def _row(setting: Setting, method: Method, base: Base, given: Mapping[str, Any]) -> Row:
    if method.name == "yarn" and base.yarn_factor(setting.max_model_len) is None:
        note = (
            f"not run: {setting.max_model_len:,} tokens fit the base's own {base.positions:,}, so it is full attention"
        )
        return Row(setting, method, None, note)
    config = method.config(base, setting.window, setting.sinks)
    defaults = perplexity.engine_arguments(setting.context) if setting.suite.kind == "perplexity" else {}
    engine = method.engine_arguments(
        base,
        max_model_len=setting.max_model_len,
        window=setting.window,
        sinks=setting.sinks,
        given={**defaults, **given},
    )
    job = Job(
        suite=setting.suite.name,
        method=method.slug,
        label=method.label,
        engine=engine,
        capacity=setting.capacity,
        identity=identity(method, base, config, engine),
        questions=setting.questions(),
        kind=setting.suite.kind,
    )
    return Row(setting, method, job)
