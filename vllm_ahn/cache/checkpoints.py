"""States in vLLM's prefix cache: checkpoints of requests at a block boundary.

A state takes many pages, and the cache has one block for one key. So page ``j`` of the state at a boundary goes by the
hash of the block that ends there, which covers all tokens before it as well as adapter, salt and pictures, with ``j``
appended.
"""

from collections import defaultdict
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_ahn.plugin.compat import register_block

_boundaries: WeakKeyDictionary[BlockPool, defaultdict[str, set[int]]] = WeakKeyDictionary()


def checkpoints_of_requests(pool: BlockPool) -> defaultdict[str, set[int]]:
    """Return what the managers of one pool share: the boundaries, in tokens, of each request's checkpoints.

    Those that it has hit or left behind while it runs, some of which may have been evicted since.
    """
    return _boundaries.setdefault(pool, defaultdict(set))


def page_key(block_hash: BlockHash, page: int) -> BlockHash:
    """Return what takes a block's hash for one page of a checkpoint at its end."""
    return BlockHash(block_hash + page.to_bytes(4, "big"))


def find_checkpoint(
    pool: BlockPool, block_hash: BlockHash, num_pages: int, group_ids: list[int]
) -> list[list[KVCacheBlock]] | None:
    """Return the pages of a checkpoint, ``[num_pages][len(group_ids)]``, or None if one of them is missing.

    The first page is looked at first, and is the first to be evicted.
    """
    pages = []
    for page in range(num_pages):
        blocks = pool.get_cached_block(page_key(block_hash, page), group_ids)
        if blocks is None:
            return None
        pages.append(blocks)
    return pages


def register_checkpoint(
    pool: BlockPool, block_hash: BlockHash, pages: Sequence[KVCacheBlock], group_id: int, boundary: int
) -> None:
    """Let others find the state of ``boundary`` tokens in ``pages``, none of which has a hash."""
    for page, block in enumerate(pages):
        register_block(pool, page_key(block_hash, page), block, group_id, boundary)
