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
from vllm_ahn.kernels.settled import Settling


class _OwnGroup(AttentionSpec):
    """Layers of one spec class form a group of their own, never mixed with another class."""

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class AHNWindowSpec(_OwnGroup):
    """Pages of the lossless memory: sinks, window, and what is in flight."""

    settling: Settling
    """``W`` and ``S``, and how far the state lags behind."""
    max_in_flight_tokens: int
    """Most tokens of one request that are scheduled but not yet settled; their blocks cannot be given back."""
    retain_all: bool = False
    """Keep every block, for models in which some layers are plain full attention."""
    max_drafts: int = 0
    """Most drafts of a request in a step, which are verified together with its next token."""
    checkpointed: bool = False
    """Prefixes are cached, and beyond ``W + S`` a hit needs a checkpoint of the state."""

    @property
    def window(self) -> int:
        """``W``."""
        return self.settling.window

    @property
    def sinks(self) -> int:
        """``S``."""
        return self.settling.sinks

    @property
    def capacity(self) -> int:
        """``W + S``."""
        return self.settling.capacity

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold sinks; they are never given back."""
        return cdiv(self.sinks, self.block_size)

    def first_kept_block(self, num_settled_tokens: int) -> int:
        """First block of the window, once so many tokens are computed and no step that began with fewer is in flight.

        Blocks between the sinks' and this one lie wholly inside what the state in the pages has absorbed, and are given
        back. The tokens since its boundary are needed again in every step up to the next.
        """
        if self.retain_all:
            return 0
        # Of the boundary at the end of a block, the last that a hit in the prefix cache can resume from: if the same
        # tokens come again, it has to be before the last of them.
        num_tokens = num_settled_tokens - 1 if self.checkpointed else num_settled_tokens
        boundary = self.settling.boundary(num_tokens) // self.block_size * self.block_size
        return max(0, boundary - self.window) // self.block_size

    def num_held_blocks(self, num_tokens: int, num_settled_tokens: int) -> int:
        """Blocks of a request that has ``num_tokens``, in flight or settled, when blocks were last given back."""
        given_back = max(0, self.first_kept_block(num_settled_tokens) - self.sink_blocks)
        return cdiv(num_tokens, self.block_size) - given_back

    @property
    def rearrangeable(self) -> bool:
        """Whether sinks fill their blocks and the window at least one, and a step's drafts.

        Then a block table can be rearranged so that a plain sliding window of ``W + S`` over it shows a query just what
        it should see; :mod:`vllm_ahn.attention.cpu.lossless` says how and why.
        """
        return self.sinks % self.block_size == 0 and self.window >= self.block_size + self.max_drafts

    def max_admission_blocks_per_request(self, max_model_len: int) -> int:
        """Most blocks one request ever holds.

        Between two steps it keeps the blocks of the sinks, those of the ``W`` tokens before the end of its last whole
        block, and the tokens behind that; during a step those in flight are added.
        """
        all_blocks = cdiv(max_model_len, self.block_size)
        if self.retain_all:
            return all_blocks
        behind = self.block_size - (not self.checkpointed) + self.max_in_flight_tokens
        moving = cdiv(self.window, self.block_size) + cdiv(behind, self.block_size)
        return min(self.sink_blocks + moving, all_blocks)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.max_admission_blocks_per_request(vllm_config.model_config.max_model_len) * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class AHNStateSpec(_OwnGroup):
    """Pages of the compressed memory, taken only once a request outgrows the lossless one."""

    settling: Settling
    """Says from when on a request has a state, and how many slots it takes."""
    num_pages: int
    """Pages of one slot."""
    checkpoint_interval: int = 0
    """Within a prompt, one checkpoint goes to the prefix cache behind each multiple of so many tokens; 0 for none."""

    @property
    def capacity(self) -> int:
        """``W + S``: a request with more tokens than this has a state."""
        return self.settling.capacity

    @property
    def pages_per_request(self) -> int:
        """Pages of all slots of a request."""
        return self.settling.num_slots * self.num_pages

    @property
    def uses_slot_mapping(self) -> bool:
        return False

    def num_held_blocks(self, num_tokens: int) -> int:
        """Pages of a request with ``num_tokens``, in flight or settled."""
        return self.pages_per_request if num_tokens > self.capacity else 0

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        return self.num_held_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # The V1 model runner computes a slot mapping for every attention group, this one included, and indexes its
        # block table by position: the row must be as wide as the window group's for that to stay in bounds.
        return max(super().max_num_blocks_per_req(vllm_config, max_len), self.pages_per_request)


def window_spec(
    layout: WindowPageLayout,
    settling: Settling,
    *,
    max_in_flight_tokens: int = 0,
    retain_all: bool = False,
    max_drafts: int = 0,
    checkpointed: bool = False,
) -> AHNWindowSpec:
    """The spec of a layer's lossless memory."""
    return AHNWindowSpec(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_size,
        dtype=layout.dtype,
        state_content_bytes=layout.content_bytes,
        dcp_sharded=False,
        settling=settling,
        max_in_flight_tokens=max_in_flight_tokens,
        retain_all=retain_all,
        max_drafts=max_drafts,
        checkpointed=checkpointed,
    )


def state_spec(
    layout: StatePageLayout, settling: Settling, *, block_size: int, dtype: torch.dtype, checkpoint_interval: int = 0
) -> AHNStateSpec:
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
        settling=settling,
        num_pages=layout.num_pages,
        checkpoint_interval=checkpoint_interval,
    )
