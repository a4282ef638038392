"""What vLLM can do and AHN cannot yet: each is refused in one sentence, in the front end, before weights are
loaded.

All of these would fail later and obscurely, or worse, answer as if nothing were wrong.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_ahn.attention.core import runs_triton
from vllm_ahn.checkpoint import LOAD_FORMATS
from vllm_ahn.config import NO_MEMORY, STATE_DTYPES
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin.attention_backends import attention_refusals

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

BLOCK_SIZES = tuple(range(16, 129, 16))
"""Tokens a block of the cache may hold: what vLLM's attention kernels take for pages that AHN can share."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The choices that decide whether AHN can serve, from arguments or from a whole configuration."""

    runner: str = "generate"
    """"generate", "pooling", "draft", or "auto" while that is open."""
    convert: str = "none"
    model_impl: str = "auto"
    load_format: str = "auto"
    second_source: bool = False
    """Whether the AHN tensors are in a checkpoint of their own."""
    speculation: bool = False
    decode_context_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    kv_connector: str | None = None
    kv_offloading_size: float | None = None
    cache_dtype: str = "auto"
    base_cache: str | None = None
    """Where the base's config.json asks for a quantised KV cache, which "auto" would then mean."""
    model_dtype: str | None = None
    """The model's dtype, None while it is open."""
    mamba_cache_dtype: str = "auto"
    mamba_ssm_cache_dtype: str = "auto"
    block_size: int | None = None
    """Tokens, None for vLLM's choice."""
    disable_hybrid_kv_cache_manager: bool = False
    kv_sharing_fast_prefill: bool = False
    microbatches: bool = False
    device_type: str = "cpu"
    """What vLLM runs on in this environment, as its platform calls it."""
    runs_triton: bool = False
    """Whether AHN layers are computed by Triton kernels: on GPUs."""
    has_flash_attention: bool = False
    """Whether the device is one that vLLM's FlashAttention is for."""
    attention_backend: str | None = None
    """The kernel asked for, None for a choice of ours."""
    backends_per_kind: bool = False
    window: int | None = None
    sinks: int | None = None
    """Tokens, None while they are open."""
    head_size: int | None = None
    """The model's head size, None while it is open."""

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> Wanted:
        """What the arguments ask for, before vLLM has looked at any of it."""
        connector = args.kv_transfer_config
        setting = ahn_setting(args.additional_config)
        return cls(
            runner=args.runner,
            convert=args.convert,
            model_impl=args.model_impl,
            load_format=_text(args.load_format),
            second_source=_names_checkpoint(setting),
            speculation=any(
                value is not None
                for value in (args.speculative_config, args.spec_method, args.spec_model, args.spec_tokens)
            ),
            decode_context_parallel_size=args.decode_context_parallel_size,
            prefill_context_parallel_size=args.prefill_context_parallel_size,
            kv_connector=None if connector is None else _connector_name(connector),
            kv_offloading_size=args.kv_offloading_size,
            cache_dtype=_text(args.kv_cache_dtype),
            mamba_cache_dtype=_text(args.mamba_cache_dtype),
            mamba_ssm_cache_dtype=_text(args.mamba_ssm_cache_dtype),
            block_size=args.block_size,
            disable_hybrid_kv_cache_manager=bool(args.disable_hybrid_kv_cache_manager),
            kv_sharing_fast_prefill=args.kv_sharing_fast_prefill,
            microbatches=bool(args.enable_dbo) or args.ubatch_size > 1,
            device_type=_device_type(),
            runs_triton=runs_triton(),
            has_flash_attention=_has_flash_attention(),
            attention_backend=_backend_name(args.attention_backend or args.attention_config.backend),
            backends_per_kind=bool(args.attention_config.backend_per_kind),
            window=_length(setting, "window"),
            sinks=_length(setting, "sinks"),
        )

    @classmethod
    def from_vllm_config(cls, config: VllmConfig) -> Wanted:
        """What the whole configuration has come to."""
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        connector = config.kv_transfer_config
        setting = ahn_setting(config.additional_config)
        return cls(
            runner=model.runner_type,
            convert=model.convert_type,
            model_impl=model.model_impl,
            load_format=_text(config.load_config.load_format),
            second_source=_names_checkpoint(setting),
            speculation=config.speculative_config is not None,
            decode_context_parallel_size=parallel.decode_context_parallel_size,
            prefill_context_parallel_size=parallel.prefill_context_parallel_size,
            kv_connector=None if connector is None else _connector_name(connector),
            kv_offloading_size=cache.kv_offloading_size,
            cache_dtype=_text(cache.cache_dtype),
            base_cache=_quantised_cache(model.hf_config),
            model_dtype=str(model.dtype).removeprefix("torch."),
            mamba_cache_dtype=_text(cache.mamba_cache_dtype),
            mamba_ssm_cache_dtype=_text(cache.mamba_ssm_cache_dtype),
            # Until the platform has chosen, this holds vLLM's generic default, which says nothing.
            block_size=cache.block_size if cache.user_specified_block_size else None,
            disable_hybrid_kv_cache_manager=bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
            kv_sharing_fast_prefill=cache.kv_sharing_fast_prefill,
            microbatches=parallel.use_ubatching,
            device_type=_device_type(),
            runs_triton=runs_triton(),
            has_flash_attention=_has_flash_attention(),
            attention_backend=_backend_name(config.attention_config.backend),
            backends_per_kind=bool(config.attention_config.backend_per_kind),
            window=_length(setting, "window"),
            sinks=_length(setting, "sinks"),
            head_size=model.get_head_size(),
        )


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


def ahn_setting(additional_config: Any) -> Any:
    """What ``additional_config`` says about AHN: None, a checkpoint, or a dict (resolved or the user's)."""
    return additional_config.get("ahn") if isinstance(additional_config, dict) else None


def is_resolved(setting: Any) -> bool:
    """Whether `setting` is an `AHNConfig.to_dict()`: only these have the key ``memory``."""
    return isinstance(setting, dict) and "memory" in setting


def _device_type() -> str:
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _quantised_cache(hf_config: Any) -> str | None:
    # Compressed-tensors says it by a scheme, ModelOpt by either, in its own section or not.
    quantisation = getattr(hf_config, "quantization_config", None) or getattr(hf_config, "compression_config", None)
    if not isinstance(quantisation, dict):
        return None
    for section in (quantisation, quantisation.get("quantization")):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if isinstance(section, dict) and section.get(key) is not None:
                return f"{key} of quantization_config"
    return None


def _has_flash_attention() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and current_platform.has_device_capability(80)


def _backend_name(backend: Any) -> str | None:
    """The name of one of vLLM's backends, given as a member of its enumeration or as a user writes it."""
    name = None if backend is None else str(getattr(backend, "name", backend)).upper()
    return None if name == "AUTO" else name


def _length(setting: Any, name: str) -> int | None:
    """`window` or `sinks` of a setting, None if it does not say or says nonsense, which others refuse."""
    value = setting.get(name) if isinstance(setting, dict) else None
    return value if isinstance(value, int) else None


def _names_checkpoint(setting: Any) -> bool:
    checkpoint = setting.get("checkpoint") if isinstance(setting, dict) else setting
    return checkpoint is not None and checkpoint != NO_MEMORY


def _connector_name(connector: Any) -> str:
    if isinstance(connector, dict):
        return str(connector.get("kv_connector"))
    return str(getattr(connector, "kv_connector", connector))


def _text(value: Any) -> str:
    return str(getattr(value, "value", value)).lower()
