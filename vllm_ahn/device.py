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
