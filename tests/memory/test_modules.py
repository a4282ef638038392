"""The reference's memories against vectors of the published implementation, one memory at a time."""

import pytest
import torch

from support import golden_data
from vllm_ahn.kernels import chunk_recurrence, l2_normalize, naive_recurrence
from vllm_ahn.reference.memory import Memory, make_memory

MEMORIES = ["GatedDeltaNet", "DeltaNet", "Mamba2"]
HIDDEN, HEADS, HEAD_DIM = 128, 4, 32


def load(name: str) -> tuple[Memory, list[dict[str, torch.Tensor]]]:
    parameters, segments = golden_data.module_vectors(name)
    memory = make_memory(name, HIDDEN, HEADS, HEAD_DIM, use_q_proj=False)
    parameters.pop("D", None)  # in published GatedDeltaNet checkpoints, used by nothing
    memory.load_state_dict(parameters)
    assert [segment["q"].shape[1] for segment in segments] == [12, 5, 1, 1]
    return memory, segments


@pytest.mark.parametrize("name", MEMORIES)
def test_gates(name: str) -> None:
    memory, segments = load(name)
    for segment in segments:
        g, b = memory.gates(segment["hidden_ab"])
        assert g.shape == b.shape == (1, segment["q"].shape[1], HEADS)
        if name == "Mamba2":
            rate = torch.nn.functional.softplus(segment["beta"] + memory.dt_bias)
            torch.testing.assert_close(b, rate, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(g, -memory.A_log.exp() * rate, rtol=1e-5, atol=1e-6)
        else:
            torch.testing.assert_close(b, segment["beta"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(g, segment.get("alpha", torch.zeros_like(g)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recurrence", [naive_recurrence, chunk_recurrence])
@pytest.mark.parametrize("name", MEMORIES)
def test_core_and_state(name: str, recurrence) -> None:
    """Four segments, each continuing the state of the one before."""
    memory, segments = load(name)
    state = None
    for i, segment in enumerate(segments):
        g, b = memory.gates(segment["hidden_ab"])
        q, k = l2_normalize(segment["q"]), l2_normalize(segment["k"])
        o, state = recurrence(q, k, segment["v"], g, b, memory.scale, memory.delta, state)
        what = f"segment {i}"
        torch.testing.assert_close(o, segment["core"], rtol=0, atol=1e-6, msg=lambda m, w=what: f"{w} core: {m}")
        torch.testing.assert_close(state, segment["state"], rtol=0, atol=2e-6, msg=lambda m, w=what: f"{w} state: {m}")


@pytest.mark.parametrize("recurrence", ["naive", "chunk"])
@pytest.mark.parametrize("name", MEMORIES)
def test_out(name: str, recurrence: str) -> None:
    memory, segments = load(name)
    state = None
    for i, segment in enumerate(segments):
        g, b = memory.gates(segment["hidden_ab"])
        m, state = memory.absorb_and_read(
            segment["q"], segment["k"], segment["v"], g, b, segment["hidden_g"], state, recurrence
        )
        wanted = segment["out"].unflatten(-1, (HEADS, HEAD_DIM))
        torch.testing.assert_close(m, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, i=i: f"segment {i}: {m}")
        assert wanted.abs().max() > 0.1
