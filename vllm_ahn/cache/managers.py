"""Who holds which block: the scheduler's side of the two memories."""

from collections.abc import Sequence
from typing import Any, NoReturn

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_ahn.cache.specs import AHNStateSpec, AHNWindowSpec


class AHNWindowManager(SingleTypeKVCacheManager):
    """Keeps the blocks of sinks and window, gives the ones in between back to the pool.

    Blocks are nulled here, on the scheduler's side only. The workers' block tables are append-only and keep the old
    ids, so kernels decide by position what they may read.
    """

    def __init__(self, kv_cache_spec: AHNWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        # vLLM sets this cap for its own recycling specs only. Without it the scheduler would not admit a prompt that is
        # longer than the pool, although it never holds all of it.
        self.max_admission_blocks_per_request = (
            None if kv_cache_spec.retain_all else kv_cache_spec.max_admission_blocks_per_request(2**62)
        )

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks that lie wholly inside ``[S, n - W)`` once ``n`` tokens are computed."""
        first_kept = self.spec.first_kept_block(processed_computed_tokens)
        self._remove_blocks_in_range(request_id, self.spec.sink_blocks, first_kept)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest cached prefix of at most ``W + S`` tokens.

        States are not cached. A request may resume where its state is still zero, which is up to ``W + S`` tokens:
        the token after them is the first that absorbs one.
        """
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        block_size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        hit: tuple[list[KVCacheBlock], ...] = tuple([] for _ in kv_cache_group_ids)
        for index in range(min(max_length, kv_cache_spec.capacity) // block_size):
            blocks = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if not blocks:
                break
            for group_hit, block in zip(hit, blocks, strict=True):
                group_hit.append(block)
        num_blocks = len(hit[0]) * block_size // alignment_tokens * alignment_tokens // block_size
        for group_hit in hit:
            del group_hit[num_blocks:]
        return hit, num_blocks * block_size

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> list[bool] | None:
        """Keep blocks beyond ``W + S`` out of the prefix cache: no hit can reach them."""
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        last_useful = kv_cache_spec.capacity // kv_cache_spec.block_size
        if end_block <= last_useful:
            return None
        return [block < last_useful for block in range(start_block, end_block)]


class AHNStateManager(SingleTypeKVCacheManager):
    """Takes the pages of a request's state when it first outgrows ``W + S`` tokens, all at once."""

    def __init__(self, kv_cache_spec: AHNStateSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.num_pages = kv_cache_spec.num_pages

    def _num_missing_pages(self, request_id: str, num_tokens: int) -> int:
        return max(0, self.spec.num_held_blocks(num_tokens) - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        return self._num_missing_pages(request_id, num_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        blocks = self.block_pool.get_new_blocks(self._num_missing_pages(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """States are not cached, and vLLM asks only managers of specs that are."""
        raise NotImplementedError("the compressed memory takes no part in prefix caching")
