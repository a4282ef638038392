"""The two cache specs that tell vLLM what an AHN layer keeps.

Both describe pages of the same size, so that vLLM draws them from one block pool. They derive from ``AttentionSpec``
itself: vLLM treats subclasses of its sliding-window and full-attention specs in ways that would drop the sinks, promote
the layers to full attention, or extend the window.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from vllm_ahn.kernels.pages import StatePageLayout, WindowPageLayout


class _OwnGroup(AttentionSpec):
    """Layers of one spec class form a group of their own, never mixed with another class."""

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class AHNWindowSpec(_OwnGroup):
    """Pages of the lossless memory: sinks, window, and what is in flight."""

    window: int
    """``W``: tokens that a query sees, itself included, besides the sinks."""
    sinks: int
    """``S``: first tokens of a sequence, always seen and never absorbed."""
    max_in_flight_tokens: int
    """Most tokens of one request that are scheduled but not yet settled; their blocks cannot be given back."""
    retain_all: bool = False
    """Keep every block, for models in which some layers are plain full attention."""

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may have before the compressed memory is used."""
        return self.window + self.sinks

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold sinks; they are never given back."""
        return cdiv(self.sinks, self.block_size)

    def first_kept_block(self, num_settled_tokens: int) -> int:
        """First block of the window, once so many tokens are computed and no step that began with fewer is in flight.

        Blocks between the sinks' and this one lie wholly inside ``[S, n - W)`` and are given back. Token ``n - W``
        itself is still needed: the next step absorbs it.
        """
        return 0 if self.retain_all else max(0, num_settled_tokens - self.window) // self.block_size

    def num_held_blocks(self, num_tokens: int, num_settled_tokens: int) -> int:
        """Blocks of a request that has ``num_tokens``, in flight or settled, when blocks were last given back."""
        given_back = max(0, self.first_kept_block(num_settled_tokens) - self.sink_blocks)
        return cdiv(num_tokens, self.block_size) - given_back

    @property
    def rearrangeable(self) -> bool:
        """Whether sinks fill their blocks and the window at least one.

        Then a block table can be rearranged so that a plain sliding window of ``W + S`` over it shows a query just what
        it should see; :mod:`vllm_ahn.attention.cpu.lossless` says how and why.
        """
        return self.sinks % self.block_size == 0 and self.window >= self.block_size

    def max_admission_blocks_per_request(self, max_model_len: int) -> int:
        """Most blocks one request ever holds.

        Between two steps it keeps the blocks of the sinks and of the last ``W`` tokens, the oldest of which is absorbed
        next; during a step the tokens in flight are added. The window starts anywhere in a block, hence one more.
        """
        all_blocks = cdiv(max_model_len, self.block_size)
        if self.retain_all:
            return all_blocks
        moving = cdiv(self.window + self.max_in_flight_tokens, self.block_size) + 1
        return min(self.sink_blocks + moving, all_blocks)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.max_admission_blocks_per_request(vllm_config.model_config.max_model_len) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class AHNStateSpec(_OwnGroup):
    """Pages of the compressed memory, taken only once a request outgrows the lossless one."""

    capacity: int
    """``W + S``: a request with more tokens than this has a state."""
    num_pages: int
    """Pages of one state."""

    @property
    def prefix_cacheable(self) -> bool:
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def num_held_blocks(self, num_tokens: int) -> int:
        """Pages of a request with ``num_tokens``, in flight or settled."""
        return self.num_pages if num_tokens > self.capacity else 0

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.num_held_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # The V1 model runner computes a slot mapping for every attention group, this one included, and indexes its
        # block table by position: the row must be as wide as the window group's for that to stay in bounds.
        return max(super().max_num_blocks_per_req(vllm_config, max_len), self.num_pages)


def window_spec(
    layout: WindowPageLayout, *, window: int, sinks: int, max_in_flight_tokens: int = 0, retain_all: bool = False
) -> AHNWindowSpec:
    """The spec of a layer's lossless memory."""
    return AHNWindowSpec(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_size,
        dtype=layout.dtype,
        state_content_bytes=layout.content_bytes,
        dcp_sharded=False,
        window=window,
        sinks=sinks,
        max_in_flight_tokens=max_in_flight_tokens,
        retain_all=retain_all,
    )


def state_spec(layout: StatePageLayout, *, block_size: int, dtype: torch.dtype, capacity: int) -> AHNStateSpec:
    """The spec of a layer's compressed memory, on pages of ``layout.page_bytes``.

    ``dtype`` is the window pages' dtype, not the state's: vLLM would zero new blocks of a cache with two dtypes, which
    nothing here needs, as a state is never read before it is written.
    """
    content_bytes, rest = divmod(layout.page_bytes, block_size)
    if rest:
        raise ValueError(f"a page of {layout.page_bytes} bytes does not divide into {block_size} slots")
    return AHNStateSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=layout.head_size,
        dtype=dtype,
        state_content_bytes=content_bytes,
        dcp_sharded=False,
        capacity=capacity,
        num_pages=layout.num_pages,
    )
