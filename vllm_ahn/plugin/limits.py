"""What vLLM can do and AHN cannot yet: each is refused in one sentence, in the front end, before weights are
loaded.

All of these would fail later and obscurely, or worse, answer as if nothing were wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_ahn.checkpoint import LOAD_FORMATS
from vllm_ahn.config import STATE_DTYPES
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin.attention_backends import attention_refusals
from vllm_ahn.plugin.setting import ahn_setting, is_resolved
from vllm_ahn.plugin.wanted import Wanted

if TYPE_CHECKING:
    from vllm.config import VllmConfig

BLOCK_SIZES = tuple(range(16, 129, 16))
"""Tokens a block of the cache may hold: what vLLM's attention kernels take for pages that AHN can share."""


def refusals(wanted: Wanted) -> Iterator[str]:
    """One sentence for each thing that is wanted and cannot be had."""
    if wanted.device_type not in ("cpu", "cuda"):
        yield (
            f"AHN runs on CPUs and on GPUs of NVIDIA and AMD, and vLLM runs on {wanted.device_type!r} here: install "
            "vLLM's CPU build, or serve the base model without --ahn"
        )
    if wanted.speculation:
        yield (
            "AHN does not work with speculative decoding yet: a rejected token cannot be taken out of the "
            "memory again; leave out --speculative-config (--spec-method, --spec-model, --spec-tokens)"
        )
    if wanted.decode_context_parallel_size > 1:
        yield (
            "AHN does not work with decode context parallelism yet: leave out --decode-context-parallel-size "
            f"{wanted.decode_context_parallel_size}"
        )
    if wanted.prefill_context_parallel_size > 1:
        yield (
            "AHN does not work with prefill context parallelism yet: leave out "
            f"--prefill-context-parallel-size {wanted.prefill_context_parallel_size}"
        )
    if wanted.kv_connector is not None:
        yield (
            "AHN does not work with KV connectors yet, which would transfer the window and not the memory: "
            f"leave out --kv-transfer-config ({wanted.kv_connector})"
        )
    if wanted.kv_offloading_size is not None:
        yield (
            "AHN does not work with KV offloading yet, which is a KV connector: leave out "
            f"--kv-offloading-size {wanted.kv_offloading_size:g}"
        )
    if wanted.base_cache is not None and wanted.cache_dtype != wanted.model_dtype:
        yield (
            "AHN does not work with a quantised KV cache yet, which the base model asks for "
            f"({wanted.base_cache} in its config.json): --kv-cache-dtype is {wanted.cache_dtype!r}, expected "
            f"{wanted.model_dtype!r}"
        )
    elif wanted.cache_dtype not in ("auto", "float16", "bfloat16", "float32"):
        yield (
            "AHN does not work with a quantised KV cache yet: --kv-cache-dtype is "
            f"{wanted.cache_dtype!r}, expected 'auto'"
        )
    elif wanted.model_dtype is not None and wanted.cache_dtype not in ("auto", wanted.model_dtype):
        yield (
            "AHN does not work with a KV cache of another dtype than the model's yet: --kv-cache-dtype is "
            f"{wanted.cache_dtype!r} and the model is {wanted.model_dtype}, expected 'auto'"
        )
    if wanted.mamba_cache_dtype != "auto":
        yield (
            "AHN's state is the only recurrent one that it keeps: leave out --mamba-cache-dtype "
            f"{wanted.mamba_cache_dtype}, and choose the state's dtype by --mamba-ssm-cache-dtype"
        )
    if wanted.mamba_ssm_cache_dtype not in ("auto", *STATE_DTYPES):
        yield (
            f"AHN does not keep its state in {wanted.mamba_ssm_cache_dtype}: --mamba-ssm-cache-dtype is expected to "
            f"be auto (which is {STATE_DTYPES[0]}) or one of {', '.join(STATE_DTYPES)}"
        )
    if wanted.second_source and wanted.load_format not in LOAD_FORMATS:
        yield (
            f"AHN does not work with load format {wanted.load_format!r}, which does not read the AHN "
            "checkpoint's safetensors beside the base model's: --load-format is expected to be one of "
            f"{', '.join(LOAD_FORMATS)}"
        )
    if wanted.block_size is not None and wanted.block_size not in BLOCK_SIZES:
        yield (
            f"AHN does not work with blocks of {wanted.block_size} tokens: --block-size is expected to be "
            f"one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if wanted.disable_hybrid_kv_cache_manager:
        yield (
            "AHN needs vLLM's hybrid KV cache manager, which keeps the window and the memory apart: leave "
            "out --disable-hybrid-kv-cache-manager, and whatever else turns that manager off"
        )
    if wanted.kv_sharing_fast_prefill:
        yield "AHN does not work with KV sharing between layers: leave out --kv-sharing-fast-prefill"
    if wanted.microbatches:
        yield "AHN does not work with microbatching yet: leave out --enable-dbo and --ubatch-size"
    if wanted.model_impl not in ("auto", "vllm"):
        yield (
            f"AHN is implemented for vLLM's own models: --model-impl is {wanted.model_impl!r}, expected "
            "'auto' or 'vllm'"
        )
    if wanted.runner not in ("auto", "generate") or wanted.convert not in ("auto", "none"):
        yield (
            f"AHN serves text generation only: --runner is {wanted.runner!r} and --convert is "
            f"{wanted.convert!r}, expected 'generate' and 'none'"
        )
    yield from attention_refusals(wanted)


def check(wanted: Wanted) -> None:
    """Raises `AHNError` for the first thing that is wanted and cannot be had."""
    for sentence in refusals(wanted):
        raise AHNError(sentence)


def check_config(config: VllmConfig) -> None:
    """`check` of a whole configuration with an AHN model; one without a resolved AHN is refused too."""
    if not is_resolved(ahn_setting(config.additional_config)):
        raise AHNError(
            f"the architecture {config.model_config.architecture} is chosen by vllm-ahn itself: give the "
            "base model's own architecture, and the AHN by --ahn or additional_config"
        )
    check(Wanted.from_vllm_config(config))


def install() -> None:
    """Has vLLM call `check_config` on every configuration with an AHN model, however it came about."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    from vllm_ahn.models import MODEL_CLASSES

    class AHNModelConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_config(vllm_config)

    for architecture in MODEL_CLASSES:
        MODELS_CONFIG_MAP[architecture] = AHNModelConfig


def state_dtype(mamba_ssm_cache_dtype: str) -> str:
    """The `AHNConfig.state_dtype` that vLLM's ``--mamba-ssm-cache-dtype`` asks for.

    The AHN's own configuration carries it from here on: vLLM's CPU platform, not knowing this model's state, resets the
    flag on some CPUs.
    """
    return STATE_DTYPES[0] if mamba_ssm_cache_dtype == "auto" else mamba_ssm_cache_dtype
