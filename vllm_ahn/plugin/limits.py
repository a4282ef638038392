"""What vLLM can do and AHN cannot yet: each is refused in one sentence, in the front end, before weights are loaded.

All of these would fail later and obscurely, or worse, answer as if nothing were wrong. `SETTINGS` is the table: one row
a setting of vLLM, with how it is read and what of it AHN can serve. To add a limit, add a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm_ahn.bases import BASES
from vllm_ahn.config import STATE_DTYPES, AHNConfig
from vllm_ahn.device import runs_triton
from vllm_ahn.errors import AHNError
from vllm_ahn.plugin import readers
from vllm_ahn.plugin.readers import has_flash_attention

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

BLOCK_SIZES = tuple(range(16, 129, 16))
"""Tokens a block of the cache may hold: what vLLM's attention kernels take for pages that AHN can share."""

LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
"""vLLM's load formats that can read an AHN beside the base: those whose loader goes on to a model's
``secondary_weights`` and reads safetensors there, and ``dummy``, which reads no weights at all."""

SPEC_METHODS = ("ngram", "ngram_gpu", "suffix", "medusa", "custom_class")
"""vLLM's ways to make drafts that need no cache of their own."""

MAX_SPEC_TOKENS = 15
"""Drafts of a step: with the token before them they are not more than `vllm_ahn.kernels.settled.GRANULARITY`."""

GPU_BACKENDS = ("TRITON_ATTN", "FLASH_ATTN")
"""The kernels that AHN layers attend with on GPUs, as ``--attention-backend`` calls them; without it the first."""

DEFAULT_GPU_BLOCK_SIZE = 16
"""Tokens in a block where the user leaves that to vLLM."""

FLASH_DTYPES = ("float16", "bfloat16")
"""What FlashAttention computes in, as far as AHN models do."""

FLASH_BLOCK_SIZES = (16, 32, 48)
"""On Hopper, FlashAttention fetches whole pages of 64 tokens and more, unwritten rows included; these may hold NaN."""


class RequestedFeatures(SimpleNamespace):
    """The vLLM settings that decide whether AHN can serve: an attribute for each row of `SETTINGS`."""

    def __init__(self, **values: Any) -> None:
        defaults = {setting.name: setting.default for setting in SETTINGS}
        if unknown := values.keys() - defaults.keys():
            raise TypeError(f"no such setting: {', '.join(unknown)}")
        super().__init__(**{**defaults, **values})

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> RequestedFeatures:
        """Read what the arguments ask for, before vLLM has looked at any of it."""
        return cls(**{setting.name: setting.arguments(args) for setting in SETTINGS if setting.arguments is not None})

    @classmethod
    def from_vllm_config(cls, config: VllmConfig) -> RequestedFeatures:
        """Read what the whole configuration has come to."""
        return cls(**{setting.name: setting.config(config) for setting in SETTINGS})

    @property
    def flash_attention(self) -> bool:
        """Whether FlashAttention was asked for where there is a choice."""
        return bool(self.runs_triton) and self.attention_backend == "FLASH_ATTN"

    @property
    def gpu_block_size(self) -> int:
        """Tokens in a block on a GPU."""
        return self.block_size or DEFAULT_GPU_BLOCK_SIZE


@dataclasses.dataclass(frozen=True)
class Limit:
    """One thing that AHN cannot serve."""

    served: Callable[[RequestedFeatures], bool]
    """Whether AHN can serve what is asked for."""

    sentence: str
    """What to say where it cannot, a format string over the attributes of `RequestedFeatures`, here ``{f...}``."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting of vLLM, or of the environment that it runs in: one row of the table."""

    name: str
    """The attribute of `RequestedFeatures`."""

    flags: tuple[str, ...]
    """The flags of ``vllm serve`` that it comes from; none for what the model or the environment say."""

    default: Any
    """The value that asks for nothing, and stands for what is still open."""

    arguments: Callable[[Any], Any] | None
    """Reads it from `EngineArgs`; None where these cannot tell yet."""

    config: Callable[[Any], Any]
    """Reads it from `VllmConfig`."""

    limits: tuple[Limit, ...] = ()


def check(features: RequestedFeatures) -> None:
    """Raise `AHNError` for the first unsupported setting."""
    for sentence in refusals(features):
        raise AHNError(sentence)


def refusals(features: RequestedFeatures) -> Iterator[str]:
    """Yield an error for each unsupported setting."""
    for setting in SETTINGS:
        for limit in setting.limits:
            if not limit.served(features):
                yield limit.sentence.format(f=features)


def check_config(config: VllmConfig) -> None:
    """`check` a whole configuration with an AHN model; one without a resolved AHN is refused too."""
    AHNConfig.from_vllm_config(config)
    check(RequestedFeatures.from_vllm_config(config))


def install() -> None:
    """Have vLLM call `check_config` on every configuration with an AHN model, however it came about."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class AHNModelConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: VllmConfig) -> None:
            check_config(vllm_config)

    for base in BASES:
        MODELS_CONFIG_MAP[base.ahn_architecture] = AHNModelConfig


def _list(values: tuple[Any, ...], separator: str = ", ") -> str:
    return separator.join(map(str, values))


_FLASH = "--attention-backend is 'FLASH_ATTN', "

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "device_type", (), "cpu", readers.device_type, readers.device_type,
        (Limit(
            lambda f: f.device_type in ("cpu", "cuda"),
            "AHN runs on CPUs and on GPUs of NVIDIA and AMD, and vLLM runs on {f.device_type!r} here: install vLLM's "
            "CPU build, or serve the base model without --ahn",
        ),),
    ),
    Setting(
        "spec_method", ("--speculative-config", "--spec-method", "--spec-model"), None,
        readers.spec_method, readers.of_speculation("method"),
        (Limit(
            lambda f: f.spec_method in (None, *SPEC_METHODS),
            "AHN does not work with drafts of method {f.spec_method!r} yet, which would take a third group of cache "
            f"blocks: --spec-method is expected to be one of {_list(SPEC_METHODS)}",
        ),
        Limit(
            lambda f: f.spec_method != "ngram_gpu" or f.device_type != "cpu",
            "vLLM makes drafts of method 'ngram_gpu' on GPUs only: --spec-method is expected to be ngram on CPUs",
        )),
    ),
    Setting(
        "spec_tokens", ("--speculative-config", "--spec-tokens"), None,
        readers.spec_tokens, readers.of_speculation("num_speculative_tokens"),
        (Limit(
            lambda f: f.spec_tokens is None or f.spec_tokens <= MAX_SPEC_TOKENS,
            "AHN takes back at most one boundary of its memory, and steps of {f.spec_tokens} drafts may cross more: "
            f"--spec-tokens (num_speculative_tokens) is expected to be at most {MAX_SPEC_TOKENS}",
        ),
        Limit(
            lambda f: f.spec_tokens is None or f.window is None or f.spec_tokens < f.window,
            "AHN does not absorb drafts, which must not leave the window before they are accepted: --ahn-window is "
            "{f.window}, expected more than the {f.spec_tokens} drafts of a step (--spec-tokens)",
        )),
    ),
    Setting(
        "decode_context_parallel_size", ("--decode-context-parallel-size",), 1,
        attrgetter("decode_context_parallel_size"), attrgetter("parallel_config.decode_context_parallel_size"),
        (Limit(
            lambda f: f.decode_context_parallel_size == 1,
            "AHN does not work with decode context parallelism yet: leave out --decode-context-parallel-size "
            "{f.decode_context_parallel_size}",
        ),),
    ),
    Setting(
        "prefill_context_parallel_size", ("--prefill-context-parallel-size",), 1,
        attrgetter("prefill_context_parallel_size"), attrgetter("parallel_config.prefill_context_parallel_size"),
        (Limit(
            lambda f: f.prefill_context_parallel_size == 1,
            "AHN does not work with prefill context parallelism yet: leave out --prefill-context-parallel-size "
            "{f.prefill_context_parallel_size}",
        ),),
    ),
    Setting(
        "kv_connector", ("--kv-transfer-config",), None, readers.connector, readers.connector,
        (Limit(
            lambda f: f.kv_connector is None,
            "AHN does not work with KV connectors yet, which would transfer the window and not the memory: leave out "
            "--kv-transfer-config ({f.kv_connector})",
        ),),
    ),
    Setting(
        "kv_offloading_size", ("--kv-offloading-size",), None,
        attrgetter("kv_offloading_size"), attrgetter("cache_config.kv_offloading_size"),
        (Limit(
            lambda f: f.kv_offloading_size is None,
            "AHN does not work with KV offloading yet, which is a KV connector: leave out --kv-offloading-size "
            "{f.kv_offloading_size:g}",
        ),),
    ),
    Setting("model_dtype", ("--dtype",), None, None, lambda config: str(config.model_config.dtype)[len("torch."):]),
    Setting(
        # Where the base's config.json asks for a quantised KV cache, which "auto" would then mean.
        "base_cache", (), None, None, readers.base_cache,
        (Limit(
            lambda f: f.base_cache is None or f.cache_dtype == f.model_dtype,
            "AHN does not work with a quantised KV cache yet, which the base model asks for ({f.base_cache} in its "
            "config.json): --kv-cache-dtype is {f.cache_dtype!r}, expected {f.model_dtype!r}",
        ),),
    ),
    Setting(
        "cache_dtype", ("--kv-cache-dtype",), "auto",
        readers.text("kv_cache_dtype"), readers.text("cache_config.cache_dtype"),
        (Limit(
            lambda f: f.cache_dtype in ("auto", "float16", "bfloat16", "float32"),
            "AHN does not work with a quantised KV cache yet: --kv-cache-dtype is {f.cache_dtype!r}, expected 'auto'",
        ),
        Limit(
            lambda f: f.model_dtype is None or f.cache_dtype in ("auto", f.model_dtype),
            "AHN does not work with a KV cache of another dtype than the model's yet: --kv-cache-dtype is "
            "{f.cache_dtype!r} and the model is {f.model_dtype}, expected 'auto'",
        )),
    ),
    Setting(
        "mamba_cache_dtype", ("--mamba-cache-dtype",), "auto",
        readers.text("mamba_cache_dtype"), readers.text("cache_config.mamba_cache_dtype"),
        (Limit(
            lambda f: f.mamba_cache_dtype == "auto",
            "AHN's state is the only recurrent one that it keeps: leave out --mamba-cache-dtype "
            "{f.mamba_cache_dtype}, and choose the state's dtype by --mamba-ssm-cache-dtype",
        ),),
    ),
    Setting(
        "mamba_ssm_cache_dtype", ("--mamba-ssm-cache-dtype",), "auto",
        readers.text("mamba_ssm_cache_dtype"), readers.text("cache_config.mamba_ssm_cache_dtype"),
        (Limit(
            lambda f: f.mamba_ssm_cache_dtype in ("auto", *STATE_DTYPES),
            "AHN does not keep its state in {f.mamba_ssm_cache_dtype}: --mamba-ssm-cache-dtype is expected to be auto "
            f"(which is {STATE_DTYPES[0]}) or one of {_list(STATE_DTYPES)}",
        ),),
    ),
    Setting("separate_checkpoint", ("--ahn",), False, readers.separate_checkpoint, readers.separate_checkpoint),
    Setting(
        "load_format", ("--load-format",), "auto",
        readers.text("load_format"), readers.text("load_config.load_format"),
        (Limit(
            lambda f: not f.separate_checkpoint or f.load_format in LOAD_FORMATS,
            "AHN does not work with load format {f.load_format!r}, which does not read the AHN checkpoint's "
            f"safetensors beside the base model's: --load-format is expected to be one of {_list(LOAD_FORMATS)}",
        ),),
    ),
    Setting(
        # Until the platform has chosen, the configuration holds vLLM's generic default, which says nothing.
        "block_size", ("--block-size",), None, attrgetter("block_size"),
        lambda config: config.cache_config.block_size if config.cache_config.user_specified_block_size else None,
        (Limit(
            lambda f: f.block_size is None or f.block_size in BLOCK_SIZES,
            "AHN does not work with blocks of {f.block_size} tokens: --block-size is expected to be one of "
            f"{_list(BLOCK_SIZES)}",
        ),),
    ),
    Setting(
        "prefix_cache_retention_interval", ("--prefix-cache-retention-interval",), 0,
        attrgetter("prefix_cache_retention_interval"), attrgetter("cache_config.prefix_cache_retention_interval"),
        (Limit(
            lambda f: not f.prefix_cache_retention_interval,
            "AHN chooses itself what stays in the prefix cache: leave out --prefix-cache-retention-interval "
            "{f.prefix_cache_retention_interval}, and say how often to keep the memory by --ahn-checkpoint-interval",
        ),),
    ),
    Setting(
        "disable_hybrid_kv_cache_manager", ("--disable-hybrid-kv-cache-manager",), False,
        readers.flag("disable_hybrid_kv_cache_manager"),
        readers.flag("scheduler_config.disable_hybrid_kv_cache_manager"),
        (Limit(
            lambda f: not f.disable_hybrid_kv_cache_manager,
            "AHN needs vLLM's hybrid KV cache manager, which keeps the window and the memory apart: leave out "
            "--disable-hybrid-kv-cache-manager, and whatever else turns that manager off",
        ),),
    ),
    Setting(
        "kv_sharing_fast_prefill", ("--kv-sharing-fast-prefill",), False,
        readers.flag("kv_sharing_fast_prefill"), readers.flag("cache_config.kv_sharing_fast_prefill"),
        (Limit(
            lambda f: not f.kv_sharing_fast_prefill,
            "AHN does not work with KV sharing between layers: leave out --kv-sharing-fast-prefill",
        ),),
    ),
    Setting(
        "microbatches", ("--enable-dbo", "--ubatch-size"), False,
        lambda args: bool(args.enable_dbo) or args.ubatch_size > 1, readers.flag("parallel_config.use_ubatching"),
        (Limit(
            lambda f: not f.microbatches,
            "AHN does not work with microbatching yet: leave out --enable-dbo and --ubatch-size",
        ),),
    ),
    Setting(
        "model_impl", ("--model-impl",), "auto", attrgetter("model_impl"), attrgetter("model_config.model_impl"),
        (Limit(
            lambda f: f.model_impl in ("auto", "vllm"),
            "AHN is implemented for vLLM's own models: --model-impl is {f.model_impl!r}, expected 'auto' or 'vllm'",
        ),),
    ),
    Setting("convert", ("--convert",), "none", attrgetter("convert"), attrgetter("model_config.convert_type")),
    Setting(
        "runner", ("--runner",), "generate", attrgetter("runner"), attrgetter("model_config.runner_type"),
        (Limit(
            lambda f: f.runner in ("auto", "generate") and f.convert in ("auto", "none"),
            "AHN serves text generation only: --runner is {f.runner!r} and --convert is {f.convert!r}, expected "
            "'generate' and 'none'",
        ),),
    ),
    # The attention kernel. The window's mask is an ordinary sliding window only where sinks and window fill blocks
    # (`AHNWindowSpec.rearrangeable`), and FlashAttention has no other.
    Setting("runs_triton", (), False, lambda _: runs_triton(), lambda _: runs_triton()),
    Setting(
        "backend_per_kind", ("--attention-config",), False,
        readers.flag("attention_config.backend_per_kind"), readers.flag("attention_config.backend_per_kind"),
        (Limit(
            lambda f: not f.backend_per_kind,
            "AHN layers are all of one kind: leave out backend_per_kind in --attention-config",
        ),),
    ),
    Setting(
        "attention_backend", ("--attention-backend",), None,
        lambda args: readers.backend(args.attention_backend or args.attention_config.backend),
        lambda config: readers.backend(config.attention_config.backend),
        (Limit(
            lambda f: f.runs_triton or f.attention_backend in (None, "CPU_ATTN"),
            "AHN does not work with the attention backend {f.attention_backend!r}: --attention-backend is expected to "
            "be 'CPU_ATTN' on CPUs, or left out",
        ),
        Limit(
            lambda f: not f.runs_triton or f.attention_backend in (None, *GPU_BACKENDS),
            "AHN does not work with the attention backend {f.attention_backend!r}: --attention-backend is expected to "
            f"be {_list(tuple(map(repr, GPU_BACKENDS)), ' or ')} on GPUs, or left out",
        ),
        Limit(
            lambda f: not f.flash_attention or f.model_dtype in (None, *FLASH_DTYPES),
            _FLASH + "which does not know {f.model_dtype}: --dtype is expected to be one of "
            f"{_list(FLASH_DTYPES)}, or the backend 'TRITON_ATTN'",
        ),
        Limit(
            lambda f: not f.flash_attention or f.gpu_block_size in FLASH_BLOCK_SIZES,
            _FLASH + "which AHN uses with small blocks: --block-size is {f.gpu_block_size}, expected one of "
            f"{_list(FLASH_BLOCK_SIZES)}",
        )),
    ),
    Setting(
        "has_flash_attention", (), False, lambda _: has_flash_attention(), lambda _: has_flash_attention(),
        (Limit(
            lambda f: not f.flash_attention or f.has_flash_attention,
            _FLASH + "which needs an NVIDIA GPU of compute capability 8.0 or higher: leave it out",
        ),),
    ),
    Setting(
        "head_size", (), None, None, lambda config: config.model_config.get_head_size(),
        (Limit(
            lambda f: not (f.flash_attention and f.head_size) or (f.head_size % 8 == 0 and f.head_size <= 256),
            _FLASH + "which takes head sizes up to 256 that are multiples of 8, and the model's is {f.head_size}: "
            "leave it out",
        ),),
    ),
    Setting(
        "sinks", ("--ahn-sinks",), None, readers.length("sinks"), readers.length("sinks"),
        (Limit(
            lambda f: not (f.flash_attention and f.sinks) or f.sinks % f.gpu_block_size == 0,
            _FLASH + "for which sinks must fill their blocks: --ahn-sinks is {f.sinks}, expected a multiple of the "
            "block size, {f.gpu_block_size}",
        ),),
    ),
    Setting(
        "window", ("--ahn-window",), None, readers.length("window"), readers.length("window"),
        (Limit(
            lambda f: not (f.flash_attention and f.window) or f.window >= f.gpu_block_size,
            _FLASH + "for which the window must fill a block: --ahn-window is {f.window}, expected at least the "
            "block size, {f.gpu_block_size}",
        ), Limit(
            lambda f: not (f.flash_attention and f.window) or f.window >= f.gpu_block_size + (f.spec_tokens or 0),
            _FLASH + "for which the window must hold a block and the drafts of a step: --ahn-window is {f.window}, "
            "expected at least the block size, {f.gpu_block_size}, and the {f.spec_tokens} of --spec-tokens",
        ),),
    ),
)  # fmt: skip
"""Every setting of vLLM that decides whether AHN can serve, in the order in which limits are looked at."""
