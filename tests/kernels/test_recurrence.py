"""The recurrence: chunk_recurrence against naive_recurrence, that against its formula."""

from collections.abc import Iterator

import pytest
import torch

from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence
from vllm_ahn.kernels.recurrence.triangular import unit_lower_inverse

# batch, tokens, query heads, key/value heads, Dk, Dv
SHAPES = [
    (1, 1, 2, 1, 4, 4),
    (2, 130, 6, 2, 16, 24),
    (3, 65, 4, 4, 7, 5),
    (2, 200, 3, 1, 32, 8),
    (1, 64, 5, 1, 1, 3),
]
SCALE = 0.3


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """New random inputs in every run; the seed is in the captured output of a test that fails."""
    print("torch seed", torch.seed())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Tensors that are allocated without being written hold NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def make_inputs(shape: tuple[int, ...], decay: float, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """q, k, v, g, b and a state; a tenth of the tokens decay by up to ``exp(-decay)``, the others little."""
    batch, length, heads, kv_heads, key_dim, value_dim = shape
    q = l2_normalize(torch.randn(batch, length, heads, key_dim, dtype=dtype))
    k = l2_normalize(torch.randn(batch, length, kv_heads, key_dim, dtype=dtype))
    v = torch.randn(batch, length, kv_heads, value_dim, dtype=dtype)
    g = -decay * torch.rand(batch, length, heads, dtype=dtype)
    g = torch.where(torch.rand_like(g) < 0.1, g, g.clamp(min=-1) * 0.01)
    b = torch.rand(batch, length, heads, dtype=dtype)
    return [q, k, v, g, b, torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)]


def naive(inputs: list[torch.Tensor], delta: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return naive_recurrence(*inputs[:5], SCALE, delta, inputs[5])


def assert_same(
    got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...], tolerance: float, what: str = ""
) -> None:
    for name, a, b in zip(("o", "state"), got, wanted, strict=True):
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, name=name: f"{what} {name}: {m}",
        )


def test_naive_is_the_formula() -> None:
    """One head, written with matrices as in the documentation."""
    q, k, v, g, b, state = make_inputs((1, 5, 1, 1, 3, 4), decay=1.0)
    for delta in (False, True):
        memory, outputs = state[0, 0].clone(), []
        for t in range(5):
            memory = g[0, t, 0].exp() * memory
            u = b[0, t, 0] * (v[0, t, 0] - (memory.T @ k[0, t, 0] if delta else 0))
            memory = memory + torch.outer(k[0, t, 0], u)
            outputs.append(SCALE * memory.T @ q[0, t, 0])
        before = state.clone()
        got = naive_recurrence(q, k, v, g, b, SCALE, delta, state)
        assert_same(got, (torch.stack(outputs)[None, :, None], memory[None, None]), 1e-12)
        assert torch.equal(state, before)


def test_naive_shares_keys_in_a_group() -> None:
    """Query heads 0..2 use key/value head 0, heads 3..5 head 1."""
    q, k, v, g, b, state = make_inputs((2, 7, 6, 2, 3, 4), decay=1.0)
    together = naive_recurrence(q, k, v, g, b, SCALE, True, state)
    for head in range(6):
        h, kv = slice(head, head + 1), slice(head // 3, head // 3 + 1)
        alone = naive_recurrence(q[:, :, h], k[:, :, kv], v[:, :, kv], g[:, :, h], b[:, :, h], SCALE, True, state[:, h])
        assert_same(alone, (together[0][:, :, h], together[1][:, h]), 1e-12, f"head {head}")


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunk_recurrence_equals_naive(shape: tuple[int, ...], delta: bool, poisoned_memory: None) -> None:
    for decay in (0.0, 1.0, 100.0, 1e4):
        inputs = make_inputs(shape, decay)
        wanted = naive(inputs, delta)
        for chunk_size in (1, 5, 16, 64, 100):
            what = f"decay {decay} chunk_size {chunk_size}"
            with torch.no_grad():
                got = chunk_recurrence(*inputs[:5], SCALE, delta, inputs[5], chunk_size)
                single = chunk_recurrence(*(x.float() for x in inputs[:5]), SCALE, delta, inputs[5].float(), chunk_size)
            assert_same(got, wanted, 1e-10, what)
            assert single[0].dtype == single[1].dtype == torch.float32
            assert_same(single, wanted, 2e-5, f"float32 {what}")
        recorded = chunk_recurrence(*inputs[:5], SCALE, delta, inputs[5], 16)
        assert_same(recorded, wanted, 1e-10, f"with autograd, decay {decay}")


@pytest.mark.parametrize("delta", [False, True])
def test_chunk_recurrence_equals_naive_however_many_chunks_at_once(
    delta: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks worked on one, two and all at a time."""
    shape = (2, 100, 4, 2, 8, 6)
    inputs = make_inputs(shape, decay=1.0)
    wanted = naive(inputs, delta)
    for elements in (1, 2 * 2 * 4 * 16 * 16, 1 << 24):
        monkeypatch.setattr("vllm_ahn.kernels.recurrence.chunk.PARALLEL_ELEMENTS", elements)
        with torch.no_grad():
            got = chunk_recurrence(*inputs[:5], SCALE, delta, inputs[5], 16)
        assert_same(got, wanted, 1e-10, f"{elements} elements at once")


@pytest.mark.parametrize("recurrence", [naive_recurrence, chunk_recurrence])
def test_no_tokens(recurrence) -> None:
    inputs = make_inputs((2, 0, 4, 2, 3, 5), decay=1.0)
    o, state = recurrence(*inputs[:5], SCALE, True, inputs[5])
    assert o.shape == (2, 0, 4, 5)
    assert torch.equal(state, inputs[5])
    o, state = recurrence(*inputs[:5], SCALE, True)
    assert torch.equal(state, torch.zeros(2, 4, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("recurrence", [naive_recurrence, chunk_recurrence])
@pytest.mark.parametrize("delta", [False, True])
def test_a_sequence_in_segments(recurrence, delta: bool) -> None:
    inputs = make_inputs((2, 150, 4, 2, 8, 6), decay=1.0)
    wanted = naive(inputs, delta)
    state, outputs = inputs[5], []
    for start, end in ((0, 1), (1, 8), (8, 8), (8, 72), (72, 150)):
        o, state = recurrence(*(x[:, start:end] for x in inputs[:5]), SCALE, delta, state)
        outputs.append(o)
    assert_same((torch.cat(outputs, 1), state), wanted, 1e-10)


@pytest.mark.parametrize("delta", [False, True])
def test_padding_leaves_the_state(delta: bool) -> None:
    """Tokens with b = 0 and g = 0, wherever they are, change nothing."""
    inputs = make_inputs((2, 90, 4, 2, 8, 6), decay=1.0)
    real = torch.rand(90) < 0.6
    inputs[3] = inputs[3] * real[:, None]
    inputs[4] = inputs[4] * real[:, None]
    wanted = naive([x[:, real] for x in inputs[:5]] + [inputs[5]], delta)
    for recurrence in (naive_recurrence, chunk_recurrence):
        o, state = recurrence(*inputs[:5], SCALE, delta, inputs[5])
        assert_same((o[:, real], state), wanted, 1e-10, recurrence.__name__)


def test_half_precision_inputs() -> None:
    """bfloat16 q, k, v: computed in float32 from the rounded values."""
    inputs = make_inputs((2, 100, 4, 2, 8, 6), decay=1.0, dtype=torch.float32)
    inputs[:3] = [x.bfloat16() for x in inputs[:3]]
    wanted = naive([x.double() for x in inputs], True)
    for recurrence in (naive_recurrence, chunk_recurrence):
        o, state = recurrence(*inputs[:5], SCALE, True, inputs[5])
        assert o.dtype == state.dtype == torch.float32
        assert_same((o, state), wanted, 1e-5, recurrence.__name__)


def test_repeated_keys_stay_exact() -> None:
    """One key again and again at rate 1: the worst case for a series in place of the inverse."""
    inputs = make_inputs((1, 256, 2, 1, 16, 16), decay=0.0)
    inputs[1][:] = inputs[1][:, :1].clone()
    inputs[4][:] = 1.0
    wanted = naive(inputs, True)
    single = chunk_recurrence(*(x.float() for x in inputs[:5]), SCALE, True, inputs[5].float())
    assert_same(single, wanted, 2e-5)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("length", [1, 40])
def test_chunk_recurrence_gradients_equal_naive(delta: bool, length: int) -> None:
    inputs = make_inputs((2, length, 4, 2, 5, 6), decay=2.0)
    weights = torch.randn(2, length, 4, 6).double(), torch.randn(2, 4, 5, 6).double()
    gradients = {}
    for recurrence in (naive_recurrence, chunk_recurrence):
        leaves = [x.clone().requires_grad_() for x in inputs]
        arguments = (*leaves[:5], SCALE, delta, leaves[5])
        o, state = recurrence(*arguments, 16) if recurrence is chunk_recurrence else recurrence(*arguments)
        ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
        gradients[recurrence] = [leaf.grad for leaf in leaves]
    for name, a, b in zip("qkvgbs", gradients[chunk_recurrence], gradients[naive_recurrence], strict=True):
        assert a is not None and b is not None and b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 16, 24, 50, 64, 100])
def test_unit_lower_inverse_equals_linalg_inv(size: int, poisoned_memory: None) -> None:
    matrix = torch.randn(3, size, size, dtype=torch.float64) / size**0.5
    wanted = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + matrix.tril(-1))
    upper = torch.full((size, size), torch.nan, dtype=torch.float64).triu()
    got = unit_lower_inverse(matrix.tril(-1) + upper)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_unit_lower_inverse_gradient() -> None:
    strict = (torch.randn(2, 11, 11, dtype=torch.float64) * 0.3).tril(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: unit_lower_inverse(x.tril(-1)), (strict,))


def test_l2_normalize() -> None:
    x = torch.randn(3, 4, 5)
    torch.testing.assert_close(l2_normalize(x), x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    assert torch.equal(l2_normalize(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert l2_normalize(x.bfloat16()).dtype == torch.float32
    assert l2_normalize(x.double()).dtype == torch.float64


@pytest.mark.parametrize("recurrence", [naive_recurrence, chunk_recurrence])
def test_shapes_that_do_not_agree(recurrence) -> None:
    q, k, v, g, b, state = make_inputs((2, 5, 4, 2, 3, 3), decay=1.0)
    with pytest.raises(ValueError, match="g must have shape"):
        recurrence(q, k, v, g[:, :4], b, SCALE, True)
    with pytest.raises(ValueError, match="not a multiple"):
        recurrence(q[:, :, :3], k, v, g[..., :3], b[..., :3], SCALE, True)
    with pytest.raises(ValueError, match="state must have shape"):
        recurrence(q, k, v, g, b, SCALE, True, state[:1])
    with pytest.raises(ValueError, match="v must have shape"):
        recurrence(q, k, v[:, :, :1], g, b, SCALE, True)
