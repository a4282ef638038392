"""The lossless memory's blocks: sinks and window are kept, the ones in between go back to the pool."""

from collections.abc import Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from vllm_ahn.cache.checkpoints import checkpoints_of_requests
from vllm_ahn.cache.specs import AHNWindowSpec


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
        self._checkpoints = checkpoints_of_requests(self.block_pool)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks that lie wholly inside ``[S, n - W)`` once ``n`` tokens are computed."""
        first_kept = self.spec.first_kept_block(processed_computed_tokens)
        if self.spec.checkpointed:
            self._forget_useless_blocks(request_id, first_kept)
        self._remove_blocks_in_range(request_id, self.spec.sink_blocks, first_kept)

    def _forget_useless_blocks(self, request_id: str, first_kept: int) -> None:
        """Take blocks that no hit can use any more out of the prefix cache before they are freed.

        Each would push out one that may still serve: freed blocks go the faster the longer ago they were used, but
        those without a hash first of all. Up to ``W + S`` every block serves, and beyond that the window of a
        checkpoint.
        """
        spec, blocks = self.spec, self.req_to_blocks.get(request_id, [])
        boundaries = self._checkpoints.get(request_id, ())
        first = max(spec.sink_blocks, spec.capacity // spec.block_size)
        for index in range(min(first_kept, len(blocks)) - 1, first - 1, -1):
            block = blocks[index]
            if block.is_null:
                break
            start = index * spec.block_size
            serves = any(start < boundary <= start + spec.window + spec.block_size - 1 for boundary in boundaries)
            if block.ref_cnt == 1 and block.block_hash is not None and not serves:
                self.block_pool.evict_blocks({block.block_id})

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
        if not new_computed_blocks:
            return super().get_num_blocks_to_allocate(
                request_id,
                num_tokens,
                new_computed_blocks,
                total_computed_tokens,
                num_local_computed_tokens,
                num_tokens_main_model,
                apply_admission_cap,
                prefill_end,
            )
        # vLLM counts null blocks of a hit as held, which under the cap would hide what the request is going to hold.
        num_null = sum(block.is_null for block in new_computed_blocks)
        num_required = cdiv(num_tokens, self.block_size) - num_null
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            num_required = min(num_required, self.max_admission_blocks_per_request)
        num_missing = max(0, num_required - (len(new_computed_blocks) - num_null))
        return num_missing + self._get_num_evictable_blocks(new_computed_blocks)

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
        """The longest cached prefix of whole blocks.

        Up to ``W + S`` tokens every block is needed. Beyond that a request can resume with those of the sinks and of
        the last ``W`` tokens, and the blocks in between are null blocks in the answer.
        """
        assert isinstance(kv_cache_spec, AHNWindowSpec)
        spec, groups = kv_cache_spec, range(len(kv_cache_group_ids))
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            spec.block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )

        def cached(index: int) -> list[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[index], kv_cache_group_ids)

        num_blocks = max_length // spec.block_size
        num_dense = num_blocks if spec.retain_all else min(num_blocks, spec.capacity // spec.block_size)
        found: list[list[KVCacheBlock]] = []
        # Sinks may end in a block that reaches beyond W + S.
        for index in range(min(num_blocks, max(num_dense, spec.sink_blocks))):
            blocks = cached(index)
            if blocks is None:
                break
            found.append(blocks)
        if num_blocks > num_dense and len(found) >= spec.sink_blocks:
            end, run = _last_run(cached, num_blocks, cdiv(spec.window, spec.block_size))
            if end > num_dense:
                sinks = found[: min(spec.sink_blocks, end - len(run))]
                between = [[block_pool.null_block for _ in groups]] * (end - len(run) - len(sinks))
                num_dense, found = end, sinks + between + run
        found = found[:num_dense]
        return tuple([blocks[group] for blocks in found] for group in groups), len(found) * spec.block_size


def _last_run(cached: Any, num_blocks: int, length: int) -> tuple[int, list[list[KVCacheBlock]]]:
    """Return where the last run of ``length`` cached blocks among the first ``num_blocks`` ends, and the run.

    The end is 0 if there is none.
    """
    run: list[list[KVCacheBlock]] = []
    for index in range(num_blocks - 1, -1, -1):
        blocks = cached(index)
        if blocks is None:
            if index < length:
                break
            run = []
            continue
        run.append(blocks)
        if len(run) == length:
            return index + length, run[::-1]
    return 0, []
