"""How the settings in the table of limits are read from vLLM's arguments and from its whole configuration."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from vllm_ahn.config import NO_MEMORY, ahn_value, parse_length

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs


def text(path: str) -> Callable[[Any], str]:
    """Return a reader of a string or of an enumeration's member, in lower case."""
    get = attrgetter(path)
    return lambda source: str(getattr(get(source), "value", get(source))).lower()


def flag(path: str) -> Callable[[Any], bool]:
    """Return a reader of whether a setting is on, where None and what is empty are off."""
    get = attrgetter(path)
    return lambda source: bool(get(source))


def _speculation(args: EngineArgs, key: str, flag: str) -> Any:
    """Return what a flag of its own says about speculation, or else ``--speculative-config``; None for neither."""
    value = getattr(args, flag)
    asked = args.speculative_config
    if value is None and isinstance(asked, dict):
        value = {str(name).replace("-", "_"): entry for name, entry in asked.items()}.get(key)
    return value


def spec_method(args: EngineArgs) -> str | None:
    """Return how drafts are asked for, under vLLM's names; None if they are not, or if vLLM has yet to find out."""
    if args.speculative_config is None and args.spec_method is None and args.spec_model is None:
        return None
    method, model = _speculation(args, "method", "spec_method"), _speculation(args, "model", "spec_model")
    if method is not None:
        return str(method).strip("[]")
    if str(model).strip("[]") == "ngram":
        return "ngram"
    # A name with dots alone is a class of the user's.
    return None if "." in str(model) and "/" not in str(model) else "draft_model"


def spec_tokens(args: EngineArgs) -> int | None:
    """Return how many drafts a step is to have at most, None if that is left to vLLM, or nonsense."""
    value = _speculation(args, "num_speculative_tokens", "spec_tokens")
    return value if isinstance(value, int) else None


def of_speculation(name: str) -> Callable[[VllmConfig], Any]:
    """Return a reader of a field of vLLM's `SpeculativeConfig`, None without speculation."""
    return lambda config: None if config.speculative_config is None else getattr(config.speculative_config, name)


def connector(source: Any) -> str | None:
    """Return the name of the KV connector, asked for as a dict, as vLLM's object or as text."""
    asked = source.kv_transfer_config
    if asked is None:
        return None
    return str(asked.get("kv_connector") if isinstance(asked, dict) else getattr(asked, "kv_connector", asked))


def separate_checkpoint(source: Any) -> bool:
    """Return whether the AHN tensors are in a checkpoint of their own."""
    value = ahn_value(source.additional_config)
    checkpoint = value.get("checkpoint") if isinstance(value, dict) else value
    return checkpoint is not None and checkpoint != NO_MEMORY


def length(name: str) -> Callable[[Any], int | None]:
    """Return a reader of ``window`` or ``sinks``, None if a request does not say or says nonsense."""

    def read(source: Any) -> int | None:
        request = ahn_value(source.additional_config)
        value = parse_length(request.get(name)) if isinstance(request, dict) else None
        return value if isinstance(value, int) else None

    return read


def base_cache(config: VllmConfig) -> str | None:
    """Return where the base's config.json asks for a quantised KV cache, which "auto" would then mean."""
    # Compressed-tensors says it by a scheme, ModelOpt by either, in its own section or not.
    hf_config = config.model_config.hf_config
    quantisation = getattr(hf_config, "quantization_config", None) or getattr(hf_config, "compression_config", None)
    if not isinstance(quantisation, dict):
        return None
    for section in (quantisation, quantisation.get("quantization")):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if isinstance(section, dict) and section.get(key) is not None:
                return f"{key} of quantization_config"
    return None


def backend(asked: Any) -> str | None:
    """Return the name of one of vLLM's kernels, given as a member of its enumeration or as a user writes it."""
    name = None if asked is None else str(getattr(asked, "name", asked)).upper()
    return None if name == "AUTO" else name


def device_type(_: Any) -> str:
    """Return what vLLM runs on in this environment, as its platform calls it."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def has_flash_attention() -> bool:
    """Return whether the device is one that vLLM's FlashAttention is for."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda() and current_platform.has_device_capability(80)
