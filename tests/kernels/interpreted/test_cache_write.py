"""write_window_pages against plain indexing."""

import pytest
import torch

from support.paged_case import PagedCase, Shape, random_gates
from vllm_ahn.kernels.cache_write import write_window_pages

SHAPES = [
    Shape(2, 1, 64, 16, "GatedDeltaNet", torch.bfloat16),
    Shape(6, 3, 80, 32, "DeltaNet", torch.float16),
    Shape(10, 2, 96, 64, "Mamba2", torch.float32),
    Shape(7, 7, 128, 16, "GatedDeltaNet", torch.bfloat16),
    Shape(5, 1, 256, 32, "Mamba2", torch.bfloat16),
]


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print("torch seed", torch.seed())


@pytest.mark.parametrize("with_gates", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_write_window_pages_equals_indexing(shape: Shape, with_gates: bool) -> None:
    """Scattered slots, padding, strided inputs; everything else in the pool stays as it was."""
    for tokens, apart in ((1, 1), (2, 3), (33, 2)):
        case = PagedCase(shape, 2, 40, apart=apart)
        wanted = PagedCase(shape, 2, 40, apart=apart)
        wanted.window_table = case.window_table
        # Keys and values lie side by side with queries, as vLLM's fused projection makes them.
        qkv = torch.randn(tokens, shape.heads + 2 * shape.kv_heads, shape.head_size).to(shape.dtype)
        _, key, value = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], dim=1)
        gates = random_gates(shape, tokens)
        positions = torch.randperm(40)[:tokens]
        requests = torch.arange(tokens) % 2
        slots = case.slots(requests, positions)
        padding = torch.rand(tokens) < 0.2
        qkv[padding] = torch.nan
        real = ~padding
        wanted.put_tokens(slots[real], key[real], value[real], gates[real] if with_gates else None)
        if tokens == 2:  # tokens behind the last slot pad the batch
            key, value = torch.cat((key, key[:1])), torch.cat((value, value[:1]))
        write_window_pages(
            key,
            value,
            gates if with_gates else None,
            slots.masked_fill(padding, -1),
            case.window,
        )
        torch.testing.assert_close(case.cache, wanted.cache, rtol=0, atol=0, equal_nan=True)


def test_write_window_pages_refuses_what_does_not_fit() -> None:
    shape = SHAPES[1]
    case = PagedCase(shape, 1, 20)
    key = torch.zeros(3, shape.kv_heads, shape.head_size)
    slots = torch.tensor([16, 17, 18])
    with pytest.raises(ValueError, match="must be"):
        write_window_pages(key[..., :-1], key[..., :-1], None, slots, case.window)
    with pytest.raises(ValueError, match="contiguous"):
        write_window_pages(key.mT.contiguous().mT, key, None, slots, case.window)
    with pytest.raises(ValueError, match="gates"):
        write_window_pages(key, key, torch.zeros(3, 5, 1), slots, case.window)
