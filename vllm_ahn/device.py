"""What AHN layers are computed with in this process. Nothing is imported until it is asked."""

from __future__ import annotations

import functools
import os

TRITON_VARIABLE = "VLLM_AHN_TRITON"
"""Set to 1, this environment variable chooses the Triton kernels on CPUs too, where Triton's interpreter runs them: for
tests of the GPU path on machines without a GPU. Workers inherit it."""


@functools.cache
def runs_triton() -> bool:
    """Return whether Triton kernels compute AHN layers: on every device but CPUs."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or os.environ.get(TRITON_VARIABLE) == "1"


KERNEL_VARIABLE = "VLLM_AHN_CPU_KERNEL"
"""Set to 0, this environment variable has CPUs compute in plain PyTorch what otherwise a kernel does that is compiled
where it is used: for machines on which nothing may be compiled. Workers inherit it."""


def compiles_kernels() -> bool:
    """Return whether a kernel may be compiled for the CPU."""
    return os.environ.get(KERNEL_VARIABLE) != "0"
