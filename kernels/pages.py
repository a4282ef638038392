"""Layouts and views of the pages in which both memories live.

vLLM's block pool has one page size for all layers and groups, so both memories are laid out over the same bytes:

* A **window page** belongs to the lossless memory. For every KV head it holds three planes over the block's tokens:
  keys, values, and the gates that the compressed memory will need when a token leaves the window.
* A **state page** belongs to the compressed memory. It holds whole columns ``M[:, j]`` of the heads' states, one
  after another, in the state's own dtype. A request's state is the list of pages that its block table names.

The views own no memory; whoever has one reads and writes the pages in place. Triton kernels find the same addresses
by the helpers of :mod:`vllm_ahn.kernels.page_addresses`. Nothing here needs Triton or vLLM.
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
        """Bytes per KV head and token."""
        return self.content_elements * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.num_kv_heads * self.block_size * self.content_bytes


class WindowPages:
    """The planes of all window pages of one layer.

    Args:
        kv_cache: ``[num_blocks, num_kv_heads, block_size, content_elements]`` in the layout's dtype, as vLLM binds it;
            the last two axes are contiguous, the first two may have any stride.
        layout: sizes of a page.

    Attributes:
        keys: ``[num_blocks, num_kv_heads, block_size, head_size]`` as the caller of a kernel names it. On the CPU,
            vLLM's kernels store this plane transposed within each block; see :attr:`keys_transposed`.
        keys_transposed: the same bytes as ``[num_blocks, num_kv_heads, head_size, block_size]``.
        values: ``[num_blocks, num_kv_heads, block_size, head_size]``.
        gates: ``[num_blocks, num_kv_heads, block_size, gates_per_kv_head]``.

    Raises:
        ValueError: ``kv_cache`` is not made of such pages.
    """

    def __init__(self, kv_cache: torch.Tensor, layout: WindowPageLayout) -> None:
        expected = (layout.num_kv_heads, layout.block_size, layout.content_elements)
        if tuple(kv_cache.shape[1:]) != expected:
            raise ValueError(f"window pages must be [num_blocks, {expected}], got {tuple(kv_cache.shape)}")
        if kv_cache.dtype != layout.dtype:
            raise ValueError(f"window pages must be {layout.dtype}, got {kv_cache.dtype}")
        if not kv_cache[0, 0].is_contiguous():
            raise ValueError(f"heads of window pages must be contiguous, got strides {kv_cache.stride()}")
        self.layout = layout
        self.pages = kv_cache
        slab = kv_cache.view(kv_cache.shape[0], layout.num_kv_heads, -1)
        plane = layout.block_size * layout.head_size
        keys, values, gates = slab.split([plane, plane, slab.shape[-1] - 2 * plane], dim=-1)
        self.keys = keys.unflatten(-1, (layout.block_size, layout.head_size))
        self.keys_transposed = keys.unflatten(-1, (layout.head_size, layout.block_size))
        self.values = values.unflatten(-1, (layout.block_size, layout.head_size))
        self.gates = gates.unflatten(-1, (layout.block_size, layout.gates_per_kv_head))

    def group_of(self, query: torch.Tensor) -> int:
        """Return how many query heads share a KV head.

        Args:
            query: ``[num_tokens, num_heads, head_size]``, contiguous in its last axis.

        Raises:
            ValueError: the query has other heads than the pages.
        """
        kv_heads, head_size = self.layout.num_kv_heads, self.layout.head_size
        if query.dim() != 3 or query.shape[1] % kv_heads or query.shape[2] != head_size or query.stride(2) != 1:
            raise ValueError(
                f"query must be [T, a multiple of {kv_heads}, {head_size}], heads contiguous, got {tuple(query.shape)}"
            )
        return query.shape[1] // kv_heads


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
        """Whole columns that a page holds."""
        return self.page_bytes // (self.head_size * self.dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages that hold the state of one request."""
        return -(-self.num_heads * self.head_size // self.columns_per_page)


class StatePages:
    """The states of one layer, spread over pages.

    Args:
        kv_cache: one page of bytes per block, ``[num_blocks, ...]`` in any dtype; blocks are contiguous and may have
            any stride.
        layout: how states are cut.

    Attributes:
        columns: ``[num_blocks, columns_per_page, D_k]``, a view of the cache.

    Raises:
        ValueError: ``kv_cache`` is not made of such pages.
    """

    def __init__(self, kv_cache: torch.Tensor, layout: StatePageLayout) -> None:
        page = kv_cache[0]
        page_bytes = page.numel() * page.element_size()
        if page_bytes != layout.page_bytes or not page.is_contiguous():
            raise ValueError(
                f"state pages must be contiguous, of {layout.page_bytes} bytes each, got {page_bytes} bytes with "
                f"strides {page.stride()}"
            )
        self.layout = layout
        used = layout.columns_per_page * layout.head_size
        pages = kv_cache.flatten(1).view(layout.dtype)
        self.columns = pages[:, :used].unflatten(-1, (layout.columns_per_page, layout.head_size))

    def check(self, table: torch.Tensor, num_heads: int, head_size: int) -> None:
        """Raise ``ValueError`` unless ``table [num_requests, width]`` can name the pages of states of such heads."""
        layout = self.layout
        if (layout.num_heads, layout.head_size) != (num_heads, head_size):
            raise ValueError(
                f"pages hold states of {layout.num_heads} heads of {layout.head_size}, not {num_heads} of {head_size}"
            )
        if table.shape[1] < layout.num_pages:
            raise ValueError(f"a state table of {table.shape[1]} pages a request is too narrow for {layout.num_pages}")

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
