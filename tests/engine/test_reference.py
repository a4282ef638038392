"""The engine against the whole-model reference, where there is no golden data: options, shapes, lengths at random."""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.engines import engine, greedy, worker_layers
from vllm_ahn.attention.layer import AHNState
from vllm_ahn.kernels import naive_recurrence
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.reference import from_folders
from vllm_ahn.reference.memory import RECURRENCES
from vllm_ahn.tools.tiny import make_tiny

MAX_TOKENS = 12
TOLERANCE = 1e-3

MODELS: dict[str, dict[str, Any]] = {
    "q-proj": {"memory": "GatedDeltaNet", "use_q_proj": True},
    "q-proj-qwen3": {"memory": "GatedDeltaNet", "use_q_proj": True, "model_type": "qwen3"},
    "router": {"memory": "GatedDeltaNet", "use_router": True},
    "router-mamba2-qwen3": {"memory": "Mamba2", "use_router": True, "model_type": "qwen3"},
    "router-deltanet": {"memory": "DeltaNet", "use_router": True},
    "some-full-layers": {"memory": "GatedDeltaNet", "fa_layer_ids": "1", "layers": 4},
    "most-layers-full": {"memory": "Mamba2", "fa_layer_ids": "0,2,3", "layers": 4},
    "all-options": {"memory": "GatedDeltaNet", "fa_layer_ids": "0", "use_router": True, "use_q_proj": True},
    "one-kv-head": {"memory": "Mamba2", "heads": 4, "kv_heads": 1},
    "odd-group": {"memory": "GatedDeltaNet", "heads": 6, "kv_heads": 2, "hidden": 192},
    "no-groups-head-80": {"memory": "DeltaNet", "heads": 2, "kv_heads": 2, "hidden": 160},
    "head-112": {"memory": "GatedDeltaNet", "model_type": "qwen3", "heads": 2, "kv_heads": 1, "head_dim": 112},
    "head-256": {"memory": "Mamba2", "model_type": "qwen3", "heads": 2, "kv_heads": 1, "head_dim": 256},
    "tied-qwen2": {"memory": "DeltaNet", "tie_word_embeddings": True},
}


@pytest.mark.parametrize("sinks_fill_blocks", [False, True], ids=["gathered", "rearranged"])
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, sinks_fill_blocks: bool, tmp_path: Path) -> None:
    """Prompts of every kind of length in one batch, chunks that end anywhere, windows at odd numbers.

    Attention past W + S has two ways, by whether sinks and window fill blocks; see `vllm_ahn.attention.window`.
    """
    seed = list(MODELS).index(name)
    generator = torch.Generator().manual_seed(seed)
    block_size = (16, 32, 64)[seed % 3]
    window, sinks = (int(n) for n in torch.randint(1, 60, (2,), generator=generator))
    if sinks_fill_blocks:
        window, sinks = window + block_size, seed % 3 * block_size
    elif sinks % block_size == 0:
        sinks += 1
    capacity = window + sinks
    lengths = [1, capacity, capacity + 1, capacity + 20, 150, 333]
    prompts = [torch.randint(500, (length,), generator=generator) for length in lengths]
    paths = make_tiny(tmp_path, seed=seed, **MODELS[name])
    with engine(
        paths.base,
        {"checkpoint": str(paths.ahn), "window": window, "sinks": sinks},
        block_size=block_size,
        max_num_batched_tokens=(50, 600)[seed % 2],
        max_num_seqs=8,
        logprobs_mode="raw_logits",
    ) as llm:
        results = greedy(llm, prompts, MAX_TOKENS, logprobs=-1)
    reference = from_folders(paths.base, paths.ahn, window, sinks, recurrence="naive")
    for prompt, (tokens, logits) in zip(prompts, results, strict=True):
        sequence = torch.cat((prompt, torch.tensor(tokens[:-1], dtype=torch.long)))
        with torch.no_grad():
            expected = reference(sequence[None], last=MAX_TOKENS)[0]
        assert logits is not None
        assert (logits - expected).abs().max() <= TOLERANCE, len(prompt)


def recurrence_in_bfloat16(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`naive_recurrence` as decodes run it with bfloat16 states, for ``W = 20`` and ``S = 4``.

    The state is rounded at boundaries, and an update, where the delta rule makes it necessary to keep it, once it has
    been read.
    """
    *tokens, scale, delta, state = arguments
    rule, outputs = Settling(window=20, sinks=4), []
    boundaries = {rule.absorbed(boundary) - rule.sinks for boundary in range(32, 1024, 16)}
    if state is None:
        q, k, v = tokens[:3]
        state = q.new_zeros(len(q), q.shape[2], k.shape[-1], v.shape[-1])
    for index, token in enumerate(zip(*(x.split(1, dim=1) for x in tokens), strict=True)):
        _, k, _, g, _ = token
        before = state * g[:, 0].exp()[..., None, None]
        o, state = naive_recurrence(*token, scale, delta, state)
        if delta:
            key = k[:, 0].repeat_interleave(state.shape[1] // k.shape[2], dim=1)
            update = ((state - before) * key.unsqueeze(-1)).sum(-2) / key.square().sum(-1, keepdim=True)
            state = before + key.unsqueeze(-1) * update.bfloat16().to(state.dtype).unsqueeze(-2)
        if index + 1 in boundaries:
            state = state.bfloat16().to(state.dtype)
        outputs.append(o)
    return torch.cat(outputs, dim=1), state


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "DeltaNet", "Mamba2"])
def test_a_state_in_bfloat16(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``--mamba-ssm-cache-dtype bfloat16`` states are rounded at boundaries, and kept updates at once."""
    monkeypatch.setitem(RECURRENCES, "bfloat16", recurrence_in_bfloat16)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(500, (length,), generator=generator) for length in (20, 24, 150)]
    paths = make_tiny(tmp_path, seed=3, memory=memory)
    with engine(
        paths.base,
        {"checkpoint": str(paths.ahn), "window": 20, "sinks": 4},
        mamba_ssm_cache_dtype="bfloat16",
        max_num_batched_tokens=64,
        logprobs_mode="raw_logits",
    ) as llm:
        states = [layer for layer in worker_layers(llm).values() if isinstance(layer, AHNState)]
        assert {state.pages.columns.dtype for state in states if state.pages is not None} == {torch.bfloat16}
        results = greedy(llm, prompts, MAX_TOKENS, logprobs=-1)
    errors = {}
    for recurrence in ("naive", "bfloat16"):
        reference = from_folders(paths.base, paths.ahn, 20, 4, recurrence=recurrence)
        for prompt, (tokens, logits) in zip(prompts, results, strict=True):
            sequence = torch.cat((prompt, torch.tensor(tokens[:-1], dtype=torch.long)))
            with torch.no_grad():
                expected = reference(sequence[None], last=MAX_TOKENS)[0]
            assert logits is not None
            errors[recurrence, len(prompt)] = float((logits - expected).abs().max())
    for length in (20, 24):
        # All that is absorbed is absorbed by decodes. The reference rounds where they do, but for an element now and
        # then that lies halfway between two values of bfloat16.
        assert errors["bfloat16", length] < 5e-3, errors
    # The longer of them comes past a boundary; without rounding the reference is far off.
    assert errors["naive", 24] > 3 * errors["bfloat16", 24], errors
    # A chunk rounds at its end alone. Elements are off by at most 2^-9 of themselves each time; logits, whose standard
    # deviation is 1.7, by some hundredths.
    assert errors["naive", 150] < 0.1, errors


def test_window_and_sinks_are_what_the_setting_says(tmp_path: Path) -> None:
    """The comparison above is sharp: a window or sinks off by one would show."""
    paths = make_tiny(tmp_path, seed=1)
    tokens = torch.randint(500, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = {
            (window, sinks): from_folders(paths.base, paths.ahn, window, sinks)(tokens, last=1)
            for window, sinks in ((40, 9), (41, 9), (40, 10))
        }
    assert (logits[40, 9] - logits[41, 9]).abs().max() > 2 * TOLERANCE
    assert (logits[40, 9] - logits[40, 10]).abs().max() > 2 * TOLERANCE


def test_a_merged_checkpoint_needs_no_setting(tmp_path: Path) -> None:
    merged = make_tiny(tmp_path, seed=2, merged=True, use_q_proj=True)
    apart = make_tiny(tmp_path, seed=2, use_q_proj=True)
    prompts = [torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)) for n in (30, 90, 200)]
    results = []
    for base, ahn in (
        (merged.base, {"window": 40, "sinks": 5}),
        (apart.base, {"checkpoint": str(apart.ahn), "window": 40, "sinks": 5}),
    ):
        with engine(base, ahn) as llm:
            results.append(greedy(llm, prompts, MAX_TOKENS, logprobs=-1))
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(*results, strict=True):
        assert tokens == other_tokens
        assert logprobs is not None and other_logprobs is not None
        assert torch.equal(logprobs, other_logprobs)
    with engine(merged.base, max_model_len=2048) as llm:
        ahn = llm.llm_engine.vllm_config.additional_config["ahn"]
        assert (ahn["window"], ahn["sinks"]) == (32640, 128)
