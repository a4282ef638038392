"""Artificial Hippocampus Networks (AHN) in vLLM: a window of exact attention, and a memory of the rest.

Importing this package imports neither vLLM nor PyTorch; the names below are loaded when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_ahn.config import AHNConfig
    from vllm_ahn.errors import AHNError
    from vllm_ahn.llm import LLM
    from vllm_ahn.plugin import register

__version__ = "0.1.0"
__all__ = ["LLM", "AHNConfig", "AHNError", "__version__", "register"]

_HOME = {
    "LLM": "vllm_ahn.llm",
    "AHNConfig": "vllm_ahn.config",
    "AHNError": "vllm_ahn.errors",
    "register": "vllm_ahn.plugin",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vllm_ahn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
