"""The compressed memory's pages, and their checkpoints in the prefix cache.

After every step with ``n`` computed tokens, the slots of a request hold the states of the last block boundary and of
the last one before ``n``, see :mod:`vllm_ahn.kernels.settled`. Either is a checkpoint: with it, and with sinks and
window before it, a request of the same tokens can go on there. Checkpoints come about

* when a request ends or is preempted: its own pages go to the prefix cache, no copy is made;
* at the end of a prompt, for those who send it again or go on differently;
* within a prompt, at the first end of a chunk behind each multiple of some tokens, for those who share its beginning.

The last two are copies, made by the worker at the start of the step that is being scheduled. They are asked for when
the whole step is scheduled, out of what is still free, and belong to no request: like all cached blocks they are free,
and go when they are needed. So no request waits for a checkpoint or is preempted for one.

A hit takes the pages of the checkpoint for the request's own, and leaves a copy of them in the cache, if there is room.
So a hit never needs more blocks than none. Where another request has taken them in the same step, it is a copy itself.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from vllm_ahn.cache.checkpoints import checkpoints_of_requests, find_checkpoint, register_checkpoint
from vllm_ahn.cache.specs import AHNStateSpec
from vllm_ahn.plugin.compat import leave_out_cache_events


@dataclasses.dataclass
class _Hit:
    """A checkpoint that was found for a request, before its pages are the request's own."""

    boundary: int
    pages: list[KVCacheBlock]
    taken: bool
    """Whether these very pages become the request's own; else they are copied."""


@dataclasses.dataclass
class _Progress:
    """How far a request has come with its checkpoints."""

    resumed_at: int = 0
    """Where it went on from a checkpoint; tokens."""
    saved_at: int = 0
    """The last boundary of which there is a checkpoint; tokens."""
    prompt_saved: bool = False
    request: Request | None = None


class AHNStateManager(SingleTypeKVCacheManager):
    """Takes the pages of a request's state when it first outgrows ``W + S`` tokens, all at once; keeps checkpoints."""

    def __init__(self, kv_cache_spec: AHNStateSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.spec = kv_cache_spec
        self.num_pages = kv_cache_spec.num_pages
        self._progress: dict[str, _Progress] = {}
        self._hits: dict[str, _Hit] = {}
        self._lent: dict[str, list[KVCacheBlock]] = {}
        """Requests' own pages that others find until this step is scheduled: those of hits that were taken."""
        self._scheduled: dict[str, None] = {}
        """Requests of this step that may still make checkpoints, in order."""
        self._checkpoints = checkpoints_of_requests(self.block_pool)
        if self.block_pool.enable_kv_cache_events:
            leave_out_cache_events(self.block_pool, self.kv_cache_group_id)

    @property
    def has_positionally_stable_blocks(self) -> bool:
        return False

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
        num_missing = self._num_missing_pages(request_id, num_tokens)
        if _all_free(new_computed_blocks):
            return num_missing  # those that were found are free, and among the missing ones
        return num_missing + self._get_num_evictable_blocks(new_computed_blocks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        self.num_cached_block[request_id] = 0
        if new_computed_blocks:
            boundary, taken = num_local_computed_tokens, _all_free(new_computed_blocks)
            self.block_pool.touch(new_computed_blocks)
            self._hits[request_id] = _Hit(boundary, list(new_computed_blocks), taken)
            self._progress[request_id] = _Progress(resumed_at=boundary, saved_at=boundary)
            self._checkpoints[request_id].add(boundary)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        held = self.req_to_blocks[request_id]
        num_missing = self._num_missing_pages(request_id, num_tokens)
        hit = self._hits.pop(request_id, None)
        if hit is not None and hit.taken:
            num_missing -= self.num_pages
        blocks = self.block_pool.get_new_blocks(num_missing)
        held.extend(blocks)
        if hit is not None and hit.taken:
            first = self._first_page(hit.boundary)
            held[first:first] = hit.pages
            self._lent[request_id] = hit.pages
        elif hit is not None:
            own = self._slot(held, hit.boundary)
            for block in own:
                block.ref_cnt += 1
            self._pending_cow_copies.extend(zip(hit.pages, own, strict=True))
        return blocks

    def _num_missing_pages(self, request_id: str, num_tokens: int) -> int:
        return max(0, self.spec.num_held_blocks(num_tokens) - len(self.req_to_blocks.get(request_id, ())))

    def _first_page(self, boundary: int) -> int:
        return self.spec.settling.slot(boundary) * self.num_pages

    def _slot(self, held: Sequence[KVCacheBlock], boundary: int) -> Sequence[KVCacheBlock]:
        first = self._first_page(boundary)
        return held[first : first + self.num_pages]

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Take down that the request is scheduled. What is saved is decided when all are."""
        progress = self._progress.setdefault(request.request_id, _Progress())
        progress.request = request
        if not progress.prompt_saved:
            self._scheduled[request.request_id] = None

    def take_pending_cow_copies(self) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        """Return the copies that the worker makes at the start of this step, all of which is scheduled by now.

        The scheduler gives back a reference to both blocks of each. A new block has none besides, so that it is free
        then, and in the cache.
        """
        copies = super().take_pending_cow_copies()
        for pages in self._lent.values():
            copies += self._leave_copy(pages)
        self._lent.clear()
        for name in self._scheduled:
            for boundary, block_hash in self._wanted(self._progress[name]):
                copies += self._save(name, boundary, block_hash)
        self._scheduled.clear()
        return copies

    def _leave_copy(self, pages: Sequence[KVCacheBlock]) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        if self.block_pool.get_num_free_blocks() < self.num_pages:
            self.block_pool.evict_blocks({page.block_id for page in pages})
            return []
        copies = self._copy(pages)
        for page, copy in copies:
            self.block_pool.move_block_hashes(page, copy)
        return copies

    def _save(self, name: str, boundary: int, block_hash: BlockHash) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        copies = []
        if not self._is_cached(block_hash):
            if self.block_pool.get_num_free_blocks() < self.num_pages:
                return []
            copies = self._copy(self._slot(self.req_to_blocks[name], boundary))
            self._register(boundary, block_hash, [copy for _, copy in copies])
        self._checkpoints[name].add(boundary)
        return copies

    def _copy(self, pages: Sequence[KVCacheBlock]) -> list[tuple[KVCacheBlock, KVCacheBlock]]:
        for page in pages:
            page.ref_cnt += 1
        return list(zip(pages, self.block_pool.get_new_blocks(self.num_pages), strict=True))

    def _is_cached(self, block_hash: BlockHash) -> bool:
        return find_checkpoint(self.block_pool, block_hash, self.num_pages, [self.kv_cache_group_id]) is not None

    def _register(self, boundary: int, block_hash: BlockHash, pages: Sequence[KVCacheBlock]) -> None:
        register_checkpoint(self.block_pool, block_hash, pages, self.kv_cache_group_id, boundary)

    def _wanted(self, progress: _Progress) -> list[tuple[int, BlockHash]]:
        """The boundaries of which a running request should leave a checkpoint now, with their hashes."""
        request, interval = progress.request, self.spec.checkpoint_interval
        assert request is not None
        num_prompt_tokens = request.num_prompt_tokens
        settled = [entry for entry in self._settled(progress) if entry[0] <= num_prompt_tokens]
        if request.num_computed_tokens >= num_prompt_tokens:
            progress.prompt_saved = True
            return settled
        since = max(self.spec.capacity, progress.saved_at)
        settled = [entry for entry in settled if interval and entry[0] // interval > since // interval][:1]
        for boundary, _ in settled:
            progress.saved_at = boundary
        return settled

    def _settled(self, progress: _Progress) -> Iterator[tuple[int, BlockHash]]:
        """The boundaries, descending, whose states are in the request's slots when all that is in flight is done.

        Yields each with the hash of the block that ends there.
        """
        request = progress.request
        if request is None:
            return
        most = request.num_computed_tokens
        # With asynchronous scheduling drafts may be in flight, which count as computed and may be rejected.
        least = most - max(0, request.num_output_placeholders - 1)
        hashes = resolve_block_hashes(request.block_hashes, self.block_pool.hash_block_size, self.block_size)
        for index in dict.fromkeys((least // self.block_size, (least - 1) // self.block_size)):
            boundary = index * self.block_size
            used_again_at = boundary + self.spec.settling.turns * self.block_size
            is_there = boundary >= progress.resumed_at and most < used_again_at
            if boundary > self.spec.capacity and is_there and index <= len(hashes):
                yield boundary, hashes[index - 1]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Leave the request's own states in the prefix cache."""
        held = super().pop_blocks_for_free(request_id)
        progress = self._progress.pop(request_id, None)
        self._scheduled.pop(request_id, None)
        self._checkpoints.pop(request_id, None)
        if self._lent.pop(request_id, None) is None and progress is not None and held:
            for boundary, block_hash in self._settled(progress):
                if not self._is_cached(block_hash):
                    self._register(boundary, block_hash, self._slot(held, boundary))
        # They are freed from the last to the first. A checkpoint's first page is to be evicted first.
        return held[::-1]

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
        """The longest prefix of which there is a checkpoint, with its pages; else up to ``W + S`` tokens.

        Up to there a state is zero, and needs no pages.
        """
        assert isinstance(kv_cache_spec, AHNStateSpec)
        spec, groups = kv_cache_spec, range(len(kv_cache_group_ids))
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            spec.block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        for index in range(max_length // spec.block_size, spec.capacity // spec.block_size, -1):
            pages = find_checkpoint(block_pool, hashes[index - 1], spec.num_pages, kv_cache_group_ids)
            if pages is not None:
                return tuple([page[group] for page in pages] for group in groups), index * spec.block_size
        num_blocks = min(max_length, spec.capacity) // spec.block_size
        return tuple([] for _ in groups), num_blocks * spec.block_size


def _all_free(blocks: Sequence[KVCacheBlock]) -> bool:
    return all(block.ref_cnt == 0 for block in blocks)
