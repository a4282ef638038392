"""Layouts and views of the pages in which both memories live.

vLLM's block pool has one page size for all layers and groups, so both memories are laid out over the same bytes:

* A **window page** belongs to the lossless memory. For every KV head it holds three planes over the block's tokens:
  keys, values, and the gates that the compressed memory will need when a token leaves the window.
* A **state page** belongs to the compressed memory. It holds whole columns ``M[:, j]`` of the heads' states, one
  after another, in the state's own dtype, and behind them as many updates ``u_i`` of each head as are kept, each as
  long as a column (:mod:`vllm_ahn.kernels.settled`). A request has as many states as it has slots; its block table
  names their pages, slot by slot.

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
    kept: int = 0
    """Updates that are kept of each head."""

    @property
    def num_columns(self) -> int:
        """Columns of all heads, and the kept updates behind them: head ``h``'s begin at column ``H D + h kept``."""
        return self.num_heads * (self.head_size + self.kept)

    @property
    def state_bytes(self) -> int:
        """Bytes of one state and its kept updates, without what is left over in its last page."""
        return self.num_columns * self.head_size * self.dtype.itemsize

    @property
    def columns_per_page(self) -> int:
        """Whole columns that a page holds."""
        return self.page_bytes // (self.head_size * self.dtype.itemsize)

    @property
    def num_pages(self) -> int:
        """Pages of one state. A slot is so many entries of a block table."""
        return -(-self.num_columns // self.columns_per_page)


class StatePages:
    """The states of one layer, spread over pages.

    Args:
        kv_cache: one page of bytes per block, ``[num_blocks, ...]`` in any dtype; blocks are contiguous and may have
            any stride.
        layout: how states are cut.

    Attributes:
        columns: ``[num_blocks, columns_per_page, D]``, a view of the cache.

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

    def check(self, table: torch.Tensor, num_heads: int, head_size: int, num_slots: int = 1) -> None:
        """Raise ``ValueError`` unless ``table [num_requests, width]`` can name the pages of states of such heads."""
        layout = self.layout
        if (layout.num_heads, layout.head_size) != (num_heads, head_size):
            raise ValueError(
                f"pages hold states of {layout.num_heads} heads of {layout.head_size}, not {num_heads} of {head_size}"
            )
        needed = num_slots * layout.num_pages
        if table.shape[1] < needed:
            raise ValueError(f"a state table of {table.shape[1]} pages a request is too narrow for {needed}")

    def slots(self, table: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Return the page ids of one slot a row, ``[R, num_pages]`` int64.

        Args:
            table: ``[R, >= num_slots * num_pages]`` int32, rows of the state group's block table.
            slots: ``[R]`` int64.
        """
        pages = torch.arange(self.layout.num_pages)
        return table.gather(1, slots.unsqueeze(-1) * self.layout.num_pages + pages).long()

    def gather(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Read whole states.

        Args:
            block_ids: ``[R, num_pages]`` integer page ids.

        Returns:
            A new tensor ``[R, num_heads, D_k, D_v]`` in float32 (a transposed view of its columns).
        """
        return self._columns(block_ids, 0, self.layout.head_size).transpose(-1, -2).float()

    def scatter(self, block_ids: torch.Tensor, states: torch.Tensor) -> None:
        """Write whole states, ``[R, num_heads, D_k, D_v]``, to the pages ``[R, num_pages]``."""
        self._set_columns(block_ids, 0, states.transpose(-1, -2))

    def gather_kept(self, block_ids: torch.Tensor) -> torch.Tensor:
        """Read the kept updates of the same pages, a new tensor ``[R, num_heads, kept, D_v]`` in float32."""
        layout = self.layout
        return self._columns(block_ids, layout.num_heads * layout.head_size, layout.kept).float()

    def scatter_kept(self, block_ids: torch.Tensor, updates: torch.Tensor, rows: torch.Tensor) -> None:
        """Write updates where they are kept.

        Args:
            block_ids: ``[N, num_pages]`` integer page ids, of the state of each update.
            updates: ``[N, num_heads, D_v]``.
            rows: ``[N]`` int64, below ``kept``.
        """
        layout = self.layout
        heads = torch.arange(layout.num_heads)
        columns = layout.num_heads * layout.head_size + heads * layout.kept + rows.unsqueeze(-1)
        pages = block_ids.gather(1, columns // layout.columns_per_page)
        self.columns[pages, columns % layout.columns_per_page] = updates.to(layout.dtype)

    def _places(self, block_ids: torch.Tensor, first: int, per_head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages ``[R, H * per_head]`` and columns in them ``[H * per_head]``, from column ``first`` on."""
        columns = first + torch.arange(self.layout.num_heads * per_head)
        return block_ids[:, columns // self.layout.columns_per_page], columns % self.layout.columns_per_page

    def _columns(self, block_ids: torch.Tensor, first: int, per_head: int) -> torch.Tensor:
        pages, columns = self._places(block_ids, first, per_head)
        return self.columns[pages, columns].unflatten(1, (self.layout.num_heads, per_head))

    def _set_columns(self, block_ids: torch.Tensor, first: int, columns: torch.Tensor) -> None:
        pages, places = self._places(block_ids, first, columns.shape[2])
        self.columns[pages, places] = columns.flatten(1, 2).to(self.layout.dtype)
