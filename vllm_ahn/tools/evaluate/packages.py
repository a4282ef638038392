"""Packages that only evaluation needs: the extra ``eval``."""

from __future__ import annotations

import importlib
from types import ModuleType

from vllm_ahn.errors import AHNError


def require(name: str, purpose: str) -> ModuleType:
    """Import the module `name`. Raises `AHNError`, which says that `purpose` needs it, if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise AHNError(
            f"{purpose} needs the package {name}, which is not installed: pip install 'vllm-ahn[eval]'"
        ) from error
