"""Layouts and views of pages: planes tile a page, states come back, and what is no such page is refused."""

import pytest
import torch

from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages

LAYOUT = WindowPageLayout(2, 64, 4, 16, torch.bfloat16)


def window_cache(num_blocks: int = 3, kv_heads: int = 2, content: int = 132) -> torch.Tensor:
    return torch.zeros(num_blocks, kv_heads, 16, content, dtype=torch.bfloat16)


@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("heads, kv_heads, head_size, gates", [(14, 2, 64, 2), (4, 4, 80, 1), (5, 1, 128, 2)])
def test_planes_of_a_window_page(block_size: int, heads: int, kv_heads: int, head_size: int, gates: int) -> None:
    """Planes tile a page exactly, and each starts where kernels can load it."""
    layout = WindowPageLayout(kv_heads, head_size, gates * heads // kv_heads, block_size, torch.bfloat16)
    cache = torch.zeros(3, kv_heads, block_size, layout.content_elements, dtype=layout.dtype)
    assert cache[0].numel() * 2 == layout.page_bytes
    pages = WindowPages(cache, layout)
    for value, plane in enumerate((pages.keys, pages.values, pages.gates), start=1):
        plane += value
        assert plane.stride(0) * 2 == layout.page_bytes
        assert plane.storage_offset() * 2 % 16 == 0
        assert plane.stride(1) * 2 % 16 == 0
    written, counts = cache.unique(return_counts=True)
    assert written.tolist() == [1, 2, 3]
    assert counts.tolist() == [plane.numel() for plane in (pages.keys, pages.values, pages.gates)]
    pages.keys_transposed[1, 0, :, 5] = torch.arange(head_size).bfloat16()
    assert torch.equal(
        cache[1, 0].flatten()[5 : head_size * block_size : block_size], torch.arange(head_size).bfloat16()
    )


def test_what_is_no_window_page_is_refused() -> None:
    with pytest.raises(ValueError, match="window pages must be"):
        WindowPages(window_cache(content=128), LAYOUT)
    with pytest.raises(ValueError, match="bfloat16"):
        WindowPages(window_cache().float(), LAYOUT)
    with pytest.raises(ValueError, match="contiguous"):
        WindowPages(window_cache(content=140)[..., :132], LAYOUT)
    WindowPages(window_cache(kv_heads=5)[1:, 1::2], LAYOUT)  # other pages and heads may lie between


def test_queries_that_do_not_fit_window_pages() -> None:
    pages = WindowPages(window_cache(), LAYOUT)
    assert pages.group_of(torch.zeros(3, 10, 64)) == 5
    for query in (torch.zeros(3, 9, 64), torch.zeros(3, 10, 32), torch.zeros(10, 64), torch.zeros(3, 64, 10).mT):
        with pytest.raises(ValueError, match="query must be"):
            pages.group_of(query)


@pytest.mark.parametrize("page_bytes", [8704, 18176, 70016])
@pytest.mark.parametrize("heads, head_size", [(14, 64), (3, 80), (5, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_come_back_from_their_pages(page_bytes: int, heads: int, head_size: int, dtype: torch.dtype) -> None:
    """Whatever pages a state is given, in any order; and no other page changes."""
    layout = StatePageLayout(heads, head_size, page_bytes, dtype)
    columns = page_bytes // (head_size * dtype.itemsize)
    assert layout.num_pages == -(-heads * head_size // columns)
    cache = torch.full((4 * layout.num_pages, 1, 16, page_bytes // 32), float("nan"), dtype=torch.bfloat16)
    pages = StatePages(cache, layout)
    ids = torch.randperm(len(cache))[: 3 * layout.num_pages].view(3, layout.num_pages)
    states = torch.randn(3, heads, head_size, head_size).to(dtype).float()
    pages.scatter(ids, states)
    assert torch.equal(pages.gather(ids), states)
    assert torch.equal(pages.gather(ids.flip(0)), states.flip(0))
    others = torch.ones(len(cache), dtype=torch.bool).index_fill_(0, ids.flatten(), False)
    assert cache[others].isnan().all()


def test_what_is_no_state_page_is_refused() -> None:
    layout = StatePageLayout(4, 64, 2 * 16 * 132 * 2)
    with pytest.raises(ValueError, match="8448 bytes each"):
        StatePages(window_cache(kv_heads=1), layout)
    # A copy would be written to, and the cache would not.
    with pytest.raises(ValueError, match="contiguous"):
        StatePages(window_cache(kv_heads=4)[:, ::2], layout)
    pages = StatePages(window_cache(), layout)
    pages.check(torch.zeros(2, layout.num_pages), 4, 64)
    with pytest.raises(ValueError, match="too narrow"):
        pages.check(torch.zeros(2, layout.num_pages - 1), 4, 64)
    with pytest.raises(ValueError, match="4 heads of 64"):
        pages.check(torch.zeros(2, layout.num_pages), 2, 128)
