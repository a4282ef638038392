"""One suite with one method: all that a worker process is told, and what it gives back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_ahn import __version__
from vllm_ahn.config import AHNConfig
from vllm_ahn.tools.evaluate.base import Base
from vllm_ahn.tools.evaluate.methods import NO_INFLUENCE, Method

PACKAGES = ("vllm", "torch", "transformers", "lm-eval")


@dataclasses.dataclass(frozen=True)
class Job:
    """JSON values only, so that it can be written down and sent to another process."""

    suite: str
    """What a progress line and a file name call it."""

    method: str
    """`Method.slug`."""

    label: str
    """`Method.label`."""

    engine: dict[str, Any]
    """Arguments of `vllm.LLM`."""

    capacity: int
    """W + S."""

    identity: dict[str, Any]
    """What decides the model's answers, besides the question and the device."""

    questions: dict[str, Any]
    """What is asked: for ``lm_eval`` ``group``, ``metadata`` and ``metric``, for ``perplexity`` ``texts`` or ``data``,
    and ``context``; ``limit``."""

    kind: str

    @property
    def name(self) -> str:
        """For file names."""
        return f"{self.suite}.{self.method}"

    @property
    def key(self) -> str:
        """A hash over all of it and over the code that asks and scores: a finished job need not be run again."""
        values = dataclasses.asdict(self) | {"code": _code(), "versions": versions()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def identity(method: Method, base: Base, config: AHNConfig | None, engine: dict[str, Any]) -> dict[str, Any]:
    """`Job.identity`. Neither paths nor names: the files themselves (`Base.files`), how they are run, and by what."""
    named = ("model", "revision", "tokenizer_revision", "additional_config", *NO_INFLUENCE)
    served = None
    if config is not None:
        served = {k: v for k, v in config.to_dict().items() if k not in ("checkpoint", "revision")}
    return {
        "base": base.files,
        "ahn": served,
        "ahn_files": method.files,
        "engine": {name: value for name, value in engine.items() if name not in named},
        "versions": {name: found for name, found in versions().items() if name != "lm-eval"},
    }


def versions() -> dict[str, str]:
    """Of this package and of what it runs on; without those that are not installed."""
    found = {"vllm-ahn": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _code() -> str:
    folder = Path(__file__).parent
    hashed = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".yaml")):
        hashed.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return hashed.hexdigest()
