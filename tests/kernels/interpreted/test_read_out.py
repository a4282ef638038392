"""read_out and gated_squares against the memories' read-out formulas in plain torch."""

import pytest
import torch
from torch.nn import functional as F

from support.paged_case import poisoned
from vllm_ahn.kernels.read_out import gated_squares, read_out

# heads, head size, dtype, with a router where the norm is over a head, and where it is over all heads
CASES = [
    (2, 64, torch.float32, (True, False)),
    (3, 80, torch.bfloat16, (False, True)),
    (5, 96, torch.float16, (True, False)),
    (3, 128, torch.bfloat16, (False, True)),
    (1, 256, torch.float32, (False, False)),
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print("torch seed", torch.seed())


def normalise(o: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, all_heads: bool) -> torch.Tensor:
    """``y [n, H, D]`` in float64 from ``o [n, H, D]`` and ``z [n, H]``."""
    o, gate, weight = o.double(), F.silu(z.double()).unsqueeze(-1), weight.double()
    if all_heads:
        y = (o * gate).flatten(1)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * weight
        return y.unflatten(1, o.shape[1:])
    return o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * weight * gate


@pytest.mark.parametrize("all_heads", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_read_out_equals_formula(case: tuple, all_heads: bool) -> None:
    heads, head_size, dtype, with_router = case
    routed = with_router[all_heads]
    for num_reads in (1, 16, 33):
        num_tokens = num_reads + 7
        reads = torch.randperm(num_tokens)[:num_reads].int()
        active = torch.rand(num_reads) < 0.7
        if num_reads == 33:
            active[:16] = False  # a whole block of requests inside the window
        reads[~active] = -1
        o = torch.randn(num_reads, heads, head_size) * torch.logspace(-3, 1, num_reads).view(-1, 1, 1)
        o[~active] = torch.nan
        z = torch.randn(num_tokens, heads + 3)[:, :heads]
        attention = torch.randn(num_tokens, 2, heads, head_size).to(dtype)[:, 1]
        attention_before = attention.clone()
        router = torch.rand(num_reads, heads) if routed else None
        if router is not None:
            router[~active] = torch.nan  # the logarithm of a negative share
        weight = (1 + 0.1 * torch.randn(heads * head_size if all_heads else head_size)).to(dtype)
        o_proj = (torch.randn(heads, head_size, head_size) * head_size**-0.5).to(dtype)
        squares = None
        if all_heads:
            squares = poisoned(num_reads)
            gated_squares(o, z, reads, squares)
            gated = o * F.silu(z[reads.long().clamp(min=0)]).unsqueeze(-1)
            wanted = gated.double().square().sum((1, 2)).masked_fill(~active, 0)
            torch.testing.assert_close(squares.double(), wanted, rtol=1e-5, atol=1e-9)
        read_out(
            o,
            z,
            reads,
            weight,
            o_proj,
            attention,
            squares=squares,
            norm_size=heads * head_size if all_heads else None,
            router=router,
        )
        wanted = attention_before.double()
        reading = reads[active].long()
        y = normalise(o[active], z[reading], weight, all_heads)
        m = torch.einsum("nhi,hij->nhj", y, o_proj.double())
        wanted[reading] += m if router is None else m * router[active].double().unsqueeze(-1)
        torch.testing.assert_close(attention.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        untouched = torch.ones(num_tokens, dtype=torch.bool)
        untouched[reading] = False
        assert torch.equal(attention[untouched], attention_before[untouched])


def test_gated_squares_of_more_heads_than_one_block() -> None:
    o, z = torch.randn(2, 21, 256), torch.randn(2, 21)
    reads, squares = torch.tensor([1, 0], dtype=torch.int32), poisoned(2)
    gated_squares(o, z, reads, squares)
    wanted = (o * F.silu(z.flip(0)).unsqueeze(-1)).square().sum((1, 2))
    torch.testing.assert_close(squares, wanted, rtol=1e-5, atol=0)


def test_read_out_of_half_precision_reads() -> None:
    """What the chunk kernels return is in the model dtype."""
    heads, head_size, num_reads = 4, 64, 20
    o = torch.randn(num_reads, heads, head_size).bfloat16()
    z = torch.randn(num_reads, heads)
    reads = torch.arange(num_reads).int().flip(0)
    weight, o_proj = torch.rand(head_size).bfloat16(), torch.randn(heads, head_size, head_size).bfloat16() / 8
    output = torch.zeros(num_reads, heads, head_size).bfloat16()
    read_out(o, z, reads, weight, o_proj, output)
    y = normalise(o, z[reads.long()], weight, False)
    wanted = torch.einsum("nhi,hij->nhj", y, o_proj.double()).flip(0)
    torch.testing.assert_close(output.double(), wanted, rtol=3e-2, atol=3e-2)


def test_squares_of_two_ranks_add_up() -> None:
    """Mamba2 under tensor parallelism: each rank sums its heads, the norm is that of all."""
    heads, head_size, num_reads = 4, 64, 5
    o, z = torch.randn(num_reads, heads, head_size), torch.randn(num_reads, heads)
    reads = torch.arange(num_reads).int()
    weight, o_proj = torch.randn(heads * head_size), torch.randn(heads, head_size, head_size) / 8
    parts = [slice(0, 2), slice(2, 4)]
    squares = torch.zeros(num_reads)
    for part in parts:
        partial = poisoned(num_reads)
        gated_squares(o[:, part].contiguous(), z[:, part], reads, partial)
        squares += partial
    output = torch.zeros(num_reads, heads, head_size)
    for part in parts:
        read_out(
            o[:, part].contiguous(),
            z[:, part],
            reads,
            weight.view(heads, head_size)[part].flatten(),
            o_proj[part],
            output[:, part],
            squares=squares,
            norm_size=heads * head_size,
        )
    wanted = torch.einsum("nhi,hij->nhj", normalise(o, z, weight, True), o_proj.double())
    torch.testing.assert_close(output.double(), wanted, rtol=2e-5, atol=2e-5)


def test_read_out_refuses_what_does_not_fit() -> None:
    o, z, reads = torch.zeros(3, 2, 64), torch.zeros(3, 2), torch.zeros(3, dtype=torch.int32)
    weight, o_proj, output = torch.zeros(64), torch.zeros(2, 64, 64), torch.zeros(3, 2, 64)
    with pytest.raises(ValueError, match="agree"):
        read_out(o, z[:, :1], reads, weight, o_proj, output)
    with pytest.raises(ValueError, match="o_proj"):
        read_out(o, z, reads, weight, o_proj.mT, output)
    with pytest.raises(ValueError, match="together"):
        read_out(o, z, reads, weight, o_proj, output, squares=torch.zeros(3))
    with pytest.raises(ValueError, match="norm_weight"):
        read_out(o, z, reads, weight, o_proj, output, squares=torch.zeros(3), norm_size=128)
    with pytest.raises(ValueError, match="router"):
        read_out(o, z, reads, weight, o_proj, output, router=torch.zeros(3))
    with pytest.raises(ValueError, match="output"):
        read_out(o, z, reads, weight, o_proj, output[:, :1])
