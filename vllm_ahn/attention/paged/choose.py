"""Which of vLLM's attention kernels attends on a GPU: what ``--attention-backend`` says, else Triton's."""

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_ahn.attention.paged import PagedAttention
from vllm_ahn.attention.paged.flash import FlashAttention
from vllm_ahn.attention.paged.triton import TritonAttention
from vllm_ahn.cache.specs import AHNWindowSpec
from vllm_ahn.errors import AHNError


def choose_attention(spec: AHNWindowSpec, vllm_config: VllmConfig, device: torch.device) -> PagedAttention:
    """The kernel for layers of ``spec``.

    Nobody has measured yet which of the two is faster on what device, so FlashAttention has to be asked for. What it
    cannot do :mod:`vllm_ahn.plugin.limits` has refused.

    Raises:
        AHNError: FlashAttention is asked for and this build of vLLM has none for the device.
    """
    num_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
    attention_config = vllm_config.attention_config
    if attention_config.backend is not AttentionBackendEnum.FLASH_ATTN:
        return TritonAttention(spec, num_heads=num_heads, device=device)
    with set_current_vllm_config(vllm_config):  # in which a version may be asked for
        version = fa_utils.get_flash_attn_version(head_size=spec.head_size, kv_cache_block_size=spec.block_size)
    if version is None:
        raise AHNError(
            "--attention-backend is 'FLASH_ATTN', and this build of vLLM has no FlashAttention for this device: leave "
            "the flag out"
        )
    graphs = vllm_config.compilation_config
    return FlashAttention(
        spec,
        num_heads=num_heads,
        version=version,
        device=device,
        graph_spans=(graphs.max_cudagraph_capture_size or 0) if graphs.cudagraph_mode.has_full_cudagraphs() else 0,
        graph_splits=attention_config.flash_attn_max_num_splits_for_cuda_graph,
    )
