"""What of vLLM is wanted beside an AHN: the choices that decide whether both go together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_ahn.config import NO_MEMORY
from vllm_ahn.device import runs_triton
from vllm_ahn.plugin.setting import ahn_setting

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


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
        return cls(
            runner=args.runner,
            convert=args.convert,
            model_impl=args.model_impl,
            load_format=_text(args.load_format),
            speculation=any(
                value is not None
                for value in (args.speculative_config, args.spec_method, args.spec_model, args.spec_tokens)
            ),
            decode_context_parallel_size=args.decode_context_parallel_size,
            prefill_context_parallel_size=args.prefill_context_parallel_size,
            kv_offloading_size=args.kv_offloading_size,
            cache_dtype=_text(args.kv_cache_dtype),
            mamba_cache_dtype=_text(args.mamba_cache_dtype),
            mamba_ssm_cache_dtype=_text(args.mamba_ssm_cache_dtype),
            block_size=args.block_size,
            disable_hybrid_kv_cache_manager=bool(args.disable_hybrid_kv_cache_manager),
            kv_sharing_fast_prefill=args.kv_sharing_fast_prefill,
            microbatches=bool(args.enable_dbo) or args.ubatch_size > 1,
            attention_backend=_backend_name(args.attention_backend or args.attention_config.backend),
            **_fields_of_both(args),
        )

    @classmethod
    def from_vllm_config(cls, config: VllmConfig) -> Wanted:
        """What the whole configuration has come to."""
        model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
        return cls(
            runner=model.runner_type,
            convert=model.convert_type,
            model_impl=model.model_impl,
            load_format=_text(config.load_config.load_format),
            speculation=config.speculative_config is not None,
            decode_context_parallel_size=parallel.decode_context_parallel_size,
            prefill_context_parallel_size=parallel.prefill_context_parallel_size,
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
            attention_backend=_backend_name(config.attention_config.backend),
            head_size=model.get_head_size(),
            **_fields_of_both(config),
        )


def _fields_of_both(source: EngineArgs | VllmConfig) -> dict[str, Any]:
    """The fields of `Wanted` that arguments and configuration tell alike, or this environment does."""
    setting, connector = ahn_setting(source.additional_config), source.kv_transfer_config
    return {
        "second_source": _names_checkpoint(setting),
        "window": _length(setting, "window"),
        "sinks": _length(setting, "sinks"),
        "kv_connector": None if connector is None else _connector_name(connector),
        "backends_per_kind": bool(source.attention_config.backend_per_kind),
        "device_type": _device_type(),
        "runs_triton": runs_triton(),
        "has_flash_attention": _has_flash_attention(),
    }


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
