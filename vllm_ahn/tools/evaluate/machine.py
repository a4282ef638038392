"""The name of the processor that a measurement was made on."""

from __future__ import annotations

import platform


def cpu_name() -> str:
    """The processor's name as Linux knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"
