"""Which versions of vLLM this package works with; what differs between them is told apart only here.

What vLLM has only under private names is here as well, since that may change with any version.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm_ahn.errors import AHNError

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

OLDEST = (0, 32)
"""The first release (major, minor) that is supported."""

FIRST_UNSUPPORTED = (0, 34)
"""The first release (major, minor) after `OLDEST` that is not known to work."""

SUPPORTED = "vllm>=0.32,<0.34"
"""The same bounds as in ``pyproject.toml``, for messages."""

DEVELOPMENT = (10**9, 0)
"""In place of the number that a "dev" build does not have: newer than any release."""


def check_vllm_version(version: str) -> None:
    """Raise `AHNError` for a release of vLLM outside the bounds; "dev" builds have no number to check."""
    release = _release(version)
    if release == DEVELOPMENT:
        return
    if not OLDEST <= release < FIRST_UNSUPPORTED:
        raise AHNError(
            f"vllm-ahn works with {SUPPORTED}, but vLLM {version} is installed: install one of these, or set "
            "VLLM_PLUGINS to the other plugins' names to run vLLM without AHN"
        )


def _release(version: str) -> tuple[int, int]:
    """Return the release's number, or `DEVELOPMENT`."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return DEVELOPMENT if match is None else (int(match[1]), int(match[2]))


def is_release(major: int, minor: int) -> bool:
    """Return whether the installed vLLM is of this release."""
    import vllm

    return _release(vllm.__version__) == (major, minor)


def can_split_masked_attention(block_size: int) -> bool:
    """Return whether vLLM's Triton attention is exact when it splits a masked sequence into segments.

    Masked means for sinks and window.

    Until 0.32 a segment whose first 16 keys are all masked may drown the others' scores. Blocks of 16 tokens, of which
    none is dropped or kept but for a visible key, have no such tiles; nor has an ordinary sliding window, outside of
    which no tile is visited.
    """
    return block_size == 16 or not is_release(0, 32)


def register_own_specs() -> None:
    """Have vLLM's registry of cache specs add vLLM's own.

    It does so when it is first asked and still empty: whoever registers another spec before would keep them out.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()


def layer_name_codec() -> tuple[Callable[[str], Any], Callable[[Any], str]]:
    """Return what turns a layer's name into an argument of a custom operation, and back.

    Depending on PyTorch's version that is an opaque object or the name itself. Both functions are private to vLLM.
    """
    from vllm.utils.torch_utils import _encode_layer_name, _resolve_layer_name

    return _encode_layer_name, _resolve_layer_name


def register_block(pool: BlockPool, block_hash: BlockHash, block: KVCacheBlock, group_id: int, num_tokens: int) -> None:
    """Let requests find `block`, which has no hash, by `block_hash` in the cache group `group_id`.

    vLLM's public function takes whole rows of a request's blocks, one for each of its block hashes.
    """
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    pool._insert_block_hash(make_block_hash_with_group_id(block_hash, group_id), block, num_tokens=num_tokens)


def leave_out_cache_events(pool: BlockPool, group_id: int) -> None:
    """Have `pool` publish no KV cache events about the cache group `group_id`.

    Its blocks are not blocks of tokens: nothing says that they are stored, and so nothing must say that they are gone.
    """
    from vllm.v1.core.kv_cache_utils import get_group_id

    removed, cached = pool._emit_block_removed_events, pool.emit_cached_block_events

    @wraps(removed)
    def emit_block_removed_events(block_hashes: list[Any]) -> None:
        removed([block_hash for block_hash in block_hashes if get_group_id(block_hash) != group_id])

    @wraps(cached)
    def emit_cached_block_events(request: Any, num_cached_blocks: int, block_size: int, kv_cache_group_id: int) -> None:
        if kv_cache_group_id != group_id:
            cached(request, num_cached_blocks, block_size, kv_cache_group_id)

    pool._emit_block_removed_events = emit_block_removed_events
    pool.emit_cached_block_events = emit_cached_block_events
