"""What a benchmark ran on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("vllm", "torch", "triton", "flash-linear-attention")


def describe() -> dict[str, Any]:
    """Processor, usable cores and versions, for the head of a result."""
    versions = ", ".join(f"{name} {version_of(name)}" for name in PACKAGES)
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": f"Python {platform.python_version()}, {versions}",
        "system": f"{sys.platform} {platform.machine()}",
    }


def version_of(name: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """The processor's name as Linux knows it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
