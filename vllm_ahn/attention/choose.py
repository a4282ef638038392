"""Which core computes AHN layers in this process."""

import functools

from vllm_ahn.attention.core import Core
from vllm_ahn.device import runs_triton


@functools.cache
def choose_core() -> Core:
    """Return the core of this process. Each is imported on demand: it needs kernels that the other's device lacks."""
    if runs_triton():
        from vllm_ahn.attention.gpu.compute import GPUCore

        return GPUCore()
    from vllm_ahn.attention.cpu.compute import CPUCore

    return CPUCore()
