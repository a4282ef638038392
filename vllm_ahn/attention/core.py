"""Which of the two cores computes AHN layers in this process: ``cpu``, or ``gpu`` with Triton kernels."""

import functools
from types import ModuleType

from vllm_ahn.device import runs_triton


@functools.cache
def core() -> ModuleType:
    """The module whose ``run`` computes a layer.

    They are imported on demand: each needs kernels that the other's device lacks.
    """
    if runs_triton():
        from vllm_ahn.attention.gpu import compute as gpu

        return gpu
    from vllm_ahn.attention.cpu import compute as cpu

    return cpu
