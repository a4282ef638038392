"""Which versions of vLLM this package works with; what differs between them is told apart only here."""

from __future__ import annotations

import re

from vllm_ahn.errors import AHNError

OLDEST = (0, 32)
"""The first release (major, minor) that is supported."""

FIRST_UNSUPPORTED = (0, 34)
"""The first release (major, minor) after `OLDEST` that is not known to work."""

SUPPORTED = "vllm>=0.32,<0.34"
"""The same bounds as in ``pyproject.toml``, for messages."""


def check_vllm_version(version: str) -> None:
    """Raises `AHNError` for a release of vLLM outside the bounds; "dev" builds have no number to check."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return
    release = (int(match[1]), int(match[2]))
    if not OLDEST <= release < FIRST_UNSUPPORTED:
        raise AHNError(
            f"vllm-ahn works with {SUPPORTED}, but vLLM {version} is installed: install one of these, or set "
            "VLLM_PLUGINS to the other plugins' names to run vLLM without AHN"
        )
