"""Which of vLLM's attention kernels AHN layers may use, and when FlashAttention cannot serve.

The window's mask is an ordinary sliding window only where sinks and window fill blocks
(:attr:`AHNWindowSpec.rearrangeable`), and FlashAttention has no other. A choice that cannot be had is refused, never
replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_ahn.plugin.wanted import Wanted

GPU_BACKENDS = ("TRITON_ATTN", "FLASH_ATTN")
"""The kernels that AHN layers attend with on GPUs, as ``--attention-backend`` calls them; without it the first."""

DEFAULT_GPU_BLOCK_SIZE = 16
"""Tokens in a block where the user leaves that to vLLM."""

FLASH_DTYPES = ("float16", "bfloat16")
"""What FlashAttention computes in, as far as AHN models do."""

FLASH_BLOCK_SIZES = (16, 32, 48)
"""On Hopper, FlashAttention fetches whole pages of 64 tokens and more, unwritten rows included; these may hold NaN."""


def attention_refusals(wanted: Wanted) -> Iterator[str]:
    """One sentence for each thing about the choice of a kernel that cannot be had."""
    backends = GPU_BACKENDS if wanted.runs_triton else ("CPU_ATTN",)
    if wanted.backends_per_kind:
        yield "AHN layers are all of one kind: leave out backend_per_kind in --attention-config"
    if wanted.attention_backend not in (None, *backends):
        where = "on GPUs" if wanted.runs_triton else "on CPUs"
        yield (
            f"AHN does not work with the attention backend {wanted.attention_backend!r}: --attention-backend is "
            f"expected to be {' or '.join(map(repr, backends))} {where}, or left out"
        )
    if not wanted.runs_triton or wanted.attention_backend != "FLASH_ATTN":
        return
    asked = "--attention-backend is 'FLASH_ATTN'"
    if not wanted.has_flash_attention:
        yield f"{asked}, which needs an NVIDIA GPU of compute capability 8.0 or higher: leave it out"
    if wanted.model_dtype is not None and wanted.model_dtype not in FLASH_DTYPES:
        yield (
            f"{asked}, which does not know {wanted.model_dtype}: --dtype is expected to be one of "
            f"{', '.join(FLASH_DTYPES)}, or the backend 'TRITON_ATTN'"
        )
    if wanted.head_size is not None and (wanted.head_size % 8 or wanted.head_size > 256):
        yield (
            f"{asked}, which takes head sizes up to 256 that are multiples of 8, and the model's is "
            f"{wanted.head_size}: leave it out"
        )
    block_size = wanted.block_size or DEFAULT_GPU_BLOCK_SIZE
    if block_size not in FLASH_BLOCK_SIZES:
        yield (
            f"{asked}, which AHN uses with small blocks: --block-size is {block_size}, expected one of "
            f"{', '.join(map(str, FLASH_BLOCK_SIZES))}"
        )
    if wanted.sinks is not None and wanted.sinks % block_size:
        yield (
            f"{asked}, for which sinks must fill their blocks: --ahn-sinks is {wanted.sinks}, expected a multiple of "
            f"the block size, {block_size}"
        )
    if wanted.window is not None and wanted.window < block_size:
        yield (
            f"{asked}, for which the window must fill a block: --ahn-window is {wanted.window}, expected at least the "
            f"block size, {block_size}"
        )
