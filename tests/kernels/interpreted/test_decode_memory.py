"""decode_memory against recurrent_step on gathered states."""

import pytest
import torch

from support.paged_case import PagedCase, Shape, WithoutDelta, decay_and_rate, poisoned, random_gates
from vllm_ahn.kernels import l2_normalize, recurrent_step
from vllm_ahn.kernels.decode import decode_memory, decode_reads
from vllm_ahn.memory.spec import MEMORIES

NAMES = ("GatedDeltaNet", "DeltaNet", "Mamba2")
# window, sinks, block size, heads, KV heads, head size, dtype
CASES = [
    (20, 3, 16, 2, 1, 64, torch.float32),
    (33, 0, 32, 3, 3, 80, torch.bfloat16),
    (7, 65, 64, 5, 1, 96, torch.float16),
    (16, 16, 16, 4, 2, 128, torch.bfloat16),
    (1, 1, 16, 2, 2, 256, torch.float32),
]


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    print("torch seed", torch.seed())


def check(shape: Shape, window: int, sinks: int, num_requests: int, **choices: int) -> None:
    """A batch of decodes past the window, entering the memory and inside the window, chunks, and padding.

    Six requests are one of each; of more, the others are anything.
    """
    capacity = window + sinks
    kinds = [*range(6), *torch.randint(6, (num_requests,)).tolist()][:num_requests]
    lengths = {
        0: lambda: capacity + 2 + int(torch.randint(40, ())),  # past
        1: lambda: capacity + 1,  # entering: t = W + S
        2: lambda: capacity,  # the last token that fits
        3: lambda: 1 + int(torch.randint(capacity, ())),  # inside
        4: lambda: capacity + 5,  # a chunk of three
        5: lambda: 0,  # padding
    }
    seq_lens = torch.tensor([lengths[kind]() for kind in kinds], dtype=torch.int32)
    new_tokens = torch.tensor([0 if kind == 5 else 3 if kind == 4 else 1 for kind in kinds])
    # Padding comes last.
    order = sorted(range(num_requests), key=lambda i: kinds[i] == 5)
    seq_lens, new_tokens, kinds = seq_lens[order], new_tokens[order], [kinds[i] for i in order]
    query_start_loc = torch.zeros(num_requests + 1, dtype=torch.int32)
    query_start_loc[1:] = new_tokens.cumsum(0)

    case = PagedCase(shape, num_requests, capacity + 48, apart=2)
    A_log = torch.randn(shape.heads)
    q = torch.randn(int(new_tokens.sum()) + 2, 2, shape.heads, shape.head_size).to(shape.dtype)[:, 1]
    reads = [i for i, kind in enumerate(kinds) if kind in (0, 1)]
    inputs = {}
    for i in reads:
        k, v = torch.randn(2, shape.kv_heads, shape.head_size).to(shape.dtype)
        gates = random_gates(shape).to(shape.dtype)
        state = torch.randn(shape.heads, shape.head_size, shape.head_size).to(shape.state_dtype).float()
        case.put_tokens(case.slots(i, seq_lens[i : i + 1] - 1 - window), k[None], v[None], gates[None])
        if kinds[i] == 0:
            case.put_state(i, state)
        else:
            state.zero_()
        inputs[i] = (k, v, gates.float(), state)
    before = case.cache.clone()

    found = torch.full((num_requests,), -7, dtype=torch.int32)
    decode_reads(query_start_loc, seq_lens, capacity, found)
    assert found.tolist() == [int(query_start_loc[i]) if i in reads else -1 for i in range(num_requests)]
    o = poisoned(num_requests, shape.heads, shape.head_size)
    decode_memory(
        q,
        case.window,
        case.window_table,
        case.state,
        case.state_table,
        found,
        seq_lens,
        o,
        memory=shape.spec,
        window=window,
        sinks=sinks,
        scale=shape.scale,
        A_log=A_log if shape.memory == "Mamba2" else None,
        **choices,
    )

    touched = torch.zeros(len(before), dtype=torch.bool)
    for i in range(num_requests):
        if i not in reads:
            assert o[i].isnan().all(), f"request {i} has nothing to read"
            continue
        k, v, gates, state = inputs[i]
        g, b = decay_and_rate(shape, gates, A_log)
        wanted, new_state = recurrent_step(
            l2_normalize(q[query_start_loc[i]])[None].double(),
            l2_normalize(k)[None].double(),
            v[None].double(),
            g[None],
            b[None],
            shape.scale,
            shape.delta,
            state[None],
        )
        torch.testing.assert_close(o[i].double(), wanted[0], rtol=2e-5, atol=2e-5)
        # A bfloat16 state is rounded once; the read is of the state before that.
        tolerance = 2e-5 if shape.state_dtype == torch.float32 else 8e-3
        torch.testing.assert_close(case.get_state(i).double(), new_state[0], rtol=tolerance, atol=tolerance)
        touched[case.state_table[i, : shape.state_layout.num_pages].long()] = True
    assert torch.equal(case.cache[~touched].view(torch.uint8), before[~touched].view(torch.uint8))


@pytest.mark.parametrize("memory", NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_memory_equals_recurrent_step(case: tuple, memory: str) -> None:
    window, sinks, block_size, heads, kv_heads, head_size, dtype = case
    shape = Shape(heads, kv_heads, head_size, block_size, memory, dtype)
    for num_requests in (1, 6):
        check(shape, window, sinks, num_requests)


def test_decode_memory_of_many_requests() -> None:
    check(Shape(3, 1, 64, 16, "GatedDeltaNet", torch.bfloat16), 9, 2, 33)


@pytest.mark.parametrize("block_v, memory", zip((4, 16, 64), NAMES, strict=True))
def test_decode_memory_with_other_tiles(block_v: int, memory: str) -> None:
    """Tiles narrower and wider than the 33 or 32 columns of a page, some of which lie in two."""
    check(Shape(2, 1, 64, 32, memory, torch.bfloat16), 12, 5, 2, block_v=block_v, num_warps=2)


def test_decode_memory_follows_flags() -> None:
    check(WithoutDelta(4, 2, 64, 16, "GatedDeltaNet"), 12, 5, 2)


def test_decode_memory_with_a_bfloat16_state() -> None:
    for memory in NAMES:
        check(Shape(2, 1, 80, 16, memory, torch.bfloat16, torch.bfloat16), 12, 5, 2)


@pytest.mark.parametrize(
    "memories, state_dtype", [(NAMES, torch.float32), (("GatedDeltaNet",), torch.bfloat16)], ids=["float32", "bfloat16"]
)
def test_decode_memory_step_by_step_equals_recurrent_step(memories: tuple[str, ...], state_dtype: torch.dtype) -> None:
    """A request that starts at ``W + S`` on pages of NaN and goes on; the state is rounded after each step."""
    window, sinks, steps = 6, 12, 8  # what is absorbed lies in two blocks
    for memory in memories:
        shape = Shape(2, 1, 64, 16, memory, state_dtype=state_dtype)
        case = PagedCase(shape, 1, window + sinks + steps)
        A_log = torch.randn(shape.heads)
        state = torch.zeros(1, shape.heads, shape.head_size, shape.head_size, dtype=torch.float64)
        for t in range(window + sinks, window + sinks + steps):
            q = torch.randn(1, shape.heads, shape.head_size)
            k, v = torch.randn(2, 1, shape.kv_heads, shape.head_size)
            gates = random_gates(shape, 1)
            case.put_tokens(case.slots(0, torch.tensor([t - window])), k, v, gates)
            o = poisoned(1, shape.heads, shape.head_size)
            decode_memory(
                q,
                case.window,
                case.window_table,
                case.state,
                case.state_table,
                torch.tensor([0], dtype=torch.int32),
                torch.tensor([t + 1], dtype=torch.int32),
                o,
                memory=shape.spec,
                window=window,
                sinks=sinks,
                scale=shape.scale,
                A_log=A_log,
            )
            g, b = decay_and_rate(shape, gates, A_log)
            wanted, state = recurrent_step(
                l2_normalize(q),
                l2_normalize(k),
                v,
                g,
                b,
                shape.scale,
                shape.delta,
                state,
            )
            state = state.to(state_dtype).double()
            if state_dtype == torch.float32:
                torch.testing.assert_close(o, wanted.float(), rtol=3e-5, atol=3e-5)
            else:
                # What lies halfway between two bfloat16 values may be rounded to the other: in few elements.
                torch.testing.assert_close(o, wanted.float(), rtol=3e-4, atol=3e-4)
                assert (case.get_state(0) != state[0]).double().mean() < 0.01


def test_decode_memory_refuses_what_does_not_fit() -> None:
    shape = Shape(4, 2, 64, 16, "Mamba2")
    case = PagedCase(shape, 1, 20)
    pages = (case.window, case.window_table, case.state)
    read = torch.zeros(1, dtype=torch.int32)
    q, o = torch.zeros(1, 4, 64), torch.zeros(1, 4, 64)
    settings = {"memory": MEMORIES["Mamba2"], "window": 4, "sinks": 1, "scale": 1.0}
    with pytest.raises(ValueError, match="A_log"):
        decode_memory(q, *pages, case.state_table, read, read, o, **settings)
    with pytest.raises(ValueError, match="gates"):
        decode_memory(q, *pages, case.state_table, read, read, o, **(settings | {"memory": MEMORIES["GatedDeltaNet"]}))
    settings["A_log"] = torch.zeros(4)
    with pytest.raises(ValueError, match="too narrow"):
        decode_memory(q, *pages, case.state_table[:, :1], read, read, o, **settings)
    with pytest.raises(ValueError, match="float32"):
        decode_memory(q, *pages, case.state_table, read, read, o.bfloat16(), **settings)
    with pytest.raises(ValueError, match="query must"):
        decode_memory(q[:, :3], *pages, case.state_table, read, read, o, **settings)
