"""What a page of each memory looks like.

vLLM's block pool has one page size for all layers and groups, so both memories are laid out over the same bytes:

* A **window page** belongs to the lossless memory. For every KV head it holds three planes over the block's tokens:
  keys, values, and the gates that the compressed memory will need when a token leaves the window.
* A **state page** belongs to the compressed memory. It holds whole columns ``M[:, j]`` of the heads' states, one
  after another, in the state's own dtype. A request's state is the list of pages that its block table names.

The views below read and write such pages in place; they own no memory. Nothing here needs vLLM.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowPageLayout:
    """Sizes of a window page, per layer and tensor-parallel rank."""

    num_kv_heads: int
    head_size: int
    gates_per_kv_head: int
    """Gate values a token keeps per KV head: gates of the memory times query heads per KV head."""
    block_size: int
    """Tokens in a page."""
    dtype: torch.dtype
    """Dtype of keys, values and gates alike."""

    @property
    def content_elements(self) -> int:
        """Elements per KV head and token: a key, a value and the gates.

        The planes of a KV head are ``block_size`` times as long. As block sizes are multiples of 16, every plane
        starts at a multiple of 32 bytes without any padding.
        """
        return 2 * self.head_size + self.gates_per_kv_head

    @property
    def content_bytes(self) -> int:
        return self.content_elements * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.block_size * self.content_bytes


class WindowPages:
    """The planes of all window pages of one layer.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, content_elements]`` in the cache dtype, as vLLM binds it;
            the last two axes are contiguous, the first two may have any stride.
        layout: sizes of a page.

    Attributes:
        keys: ``[num_blocks, num_kv_heads, block_size, head_size]`` as the caller of a kernel names it. On the CPU,
            vLLM's kernels store this plane transposed within each block; see :attr:`keys_transposed`.
        keys_transposed: the same bytes as ``[num_blocks, num_kv_heads, head_size, block_size]``.
        values: ``[num_blocks, num_kv_heads, block_size, head_size]``.
        gates: ``[num_blocks, num_kv_heads, block_size, gates_per_kv_head]``.
    """

    def __init__(self, kv_cache: torch.Tensor, layout: WindowPageLayout) -> None:
        expected = (layout.num_kv_heads, layout.block_size, layout.content_elements)
        if tuple(kv_cache.shape[1:]) != expected:
            raise ValueError(f"window pages must be [num_blocks, {expected}], got {tuple(kv_cache.shape)}")
        self.layout = layout
        self.pages = kv_cache
        slab = kv_cache.view(kv_cache.shape[0], layout.num_kv_heads, -1)
        plane = layout.block_size * layout.head_size
        keys, values, gates = slab.split([plane, plane, slab.shape[-1] - 2 * plane], dim=-1)
        self.keys = keys.unflatten(-1, (layout.block_size, layout.head_size))
        self.keys_transposed = keys.unflatten(-1, (layout.head_size, layout.block_size))
        self.values = values.unflatten(-1, (layout.block_size, layout.head_size))
        self.gates = gates.unflatten(-1, (layout.block_size, layout.gates_per_kv_head))


@dataclass(frozen=True)
class StatePageLayout:
    """How the states of one layer and rank are cut into pages of a given size."""

    num_heads: int
    head_size: int
    """Rows of a column (``D_k``) and columns of a head (``D_v``)."""
    page_bytes: int
    dtype: torch.dtype = torch.float32
    """In which states are kept: what is written is rounded to it, and what is read is float32 again."""

    @property
    def state_bytes(self) -> int:
        """Bytes of the state of one request, without what is left over in its last page."""
        return self.num_heads * self.head_size**2 * self.dtype.itemsize

    @property
    def columns_per_page(self) -> int:
        return self.page_bytes // (self.head_size * self.dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages that hold the state of one request."""
        return -(-self.num_heads * self.head_size // self.columns_per_page)


class StatePages:
    """The states of one layer, spread over pages.

    Args:
        kv_cache: one page of bytes per block, ``[num_blocks, 1, block_size, ...]`` in any dtype, contiguous within
            a block.
        layout: how states are cut.
    """

    def __init__(self, kv_cache: torch.Tensor, layout: StatePageLayout) -> None:
        self.layout = layout
        pages = kv_cache.flatten(1).view(layout.dtype)
        used = layout.columns_per_page * layout.head_size
        self.columns = pages[:, :used].unflatten(-1, (layout.columns_per_page, layout.head_size))
        """``[num_blocks, columns_per_page, D_k]``, a view of the cache."""

    def gather(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Read whole states.

        Args:
            block_ids: ``[num_requests, num_pages]`` integer page ids.

        Returns:
            A new tensor ``[num_requests, num_heads, D_k, D_v]`` in float32 (a transposed view of its columns).
        """
        size = self.layout.head_size
        columns = self.columns[block_ids].flatten(1, 2)[:, : self.layout.num_heads * size]
        return columns.unflatten(1, (self.layout.num_heads, size)).transpose(-1, -2).float()

    def scatter(self, block_ids: torch.Tensor, states: torch.Tensor) -> None:
        """Write whole states, ``[num_requests, num_heads, D_k, D_v]``, to the pages ``[num_requests, num_pages]``."""
        layout = self.layout
        columns = states.new_zeros(
            (len(states), layout.num_pages * layout.columns_per_page, layout.head_size), dtype=layout.dtype
        )
        columns[:, : layout.num_heads * layout.head_size] = states.transpose(-1, -2).flatten(1, 2)
        self.columns[block_ids] = columns.unflatten(1, (layout.num_pages, layout.columns_per_page))
