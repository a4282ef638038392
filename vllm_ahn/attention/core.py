"""Which of the two cores computes AHN layers in this process: ``cpu``, or ``gpu`` with Triton kernels."""

import functools
import os
from types import ModuleType

TRITON_VARIABLE = "VLLM_AHN_TRITON"
"""Set to 1, this environment variable chooses the Triton core on CPUs too, where Triton's interpreter runs it: for
tests of the GPU path on machines without a GPU. Workers inherit it."""


@functools.cache
def runs_triton() -> bool:
    """Whether AHN layers are computed by the Triton core: on every device but CPUs."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or os.environ.get(TRITON_VARIABLE) == "1"


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
