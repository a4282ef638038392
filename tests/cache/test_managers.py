"""The two memories' specs and managers: who holds how many blocks, and when."""

import types
from collections.abc import Iterator

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.utils.math_utils import cdiv

from support.cache_case import specs
from support.engines import cache_manager, engine
from support.golden_data import CONFIGURATIONS

GDN = CONFIGURATIONS["gdn_qwen2"]


def config(max_model_len: int, max_in_flight_tokens: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(max_model_len=max_model_len),
        max_in_flight_tokens=max_in_flight_tokens,
        parallel_config=types.SimpleNamespace(decode_context_parallel_size=1),
    )


def test_specs_share_a_page_size_and_never_a_group() -> None:
    window, state = specs(100, 10, 64, 16)
    assert window.page_size_bytes == state.page_size_bytes == 2 * 16 * (2 * 64 + 14) * 2
    assert window.dtype == state.dtype
    assert not window.is_uniform_with_collection({"a": window, "b": state})
    assert not state.is_uniform_with_collection({"b": state, "a": window})
    assert window.prefix_cacheable and state.prefix_cacheable


@pytest.mark.parametrize("max_model_len, has_state", [(110, False), (111, True), (100_000, True)])
def test_memory_of_the_longest_request(max_model_len: int, has_state: bool) -> None:
    window, state = specs(100, 10, 64, 16)
    blocks = min(cdiv(max_model_len, 16), 1 + cdiv(100 + 64, 16) + 1)
    vllm_config = config(max_model_len, 64)
    assert window.max_memory_usage_bytes(vllm_config) == blocks * window.page_size_bytes  # type: ignore[arg-type]
    pages = state.pages_per_request if has_state else 0
    assert state.max_memory_usage_bytes(vllm_config) == pages * state.page_size_bytes  # type: ignore[arg-type]


@pytest.fixture(
    params=[(24, 8, False), (24, 0, True), (33, 17, False), (33, 17, True), (50, 40, True)],
    ids=lambda p: f"W{p[0]}-S{p[1]}{'-caching' * p[2]}",
)
def served(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, int, int, bool]]:
    window, sinks, caching = request.param
    ahn = {"checkpoint": str(GDN.ahn), "window": window, "sinks": sinks}
    with engine(GDN.base, ahn, block_size=16, max_num_batched_tokens=40, enable_prefix_caching=caching) as llm:
        yield llm, window, sinks, caching


def test_blocks_held_at_every_step(served: tuple[LLM, int, int, bool]) -> None:
    """From the first token to far past the window: what is needed is held, and hardly more."""
    llm, window, sinks, caching = served
    manager = cache_manager(llm)
    window_manager, state_manager = manager.coordinator.single_type_managers
    null = manager.block_pool.null_block
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request("0", {"prompt_token_ids": GDN.case(100).prompt.tolist()}, params)
    (request,) = llm.llm_engine.engine_core.engine_core.scheduler.requests.values()
    name, most = request.request_id, 0
    while llm.llm_engine.has_unfinished_requests():
        computed = request.num_computed_tokens
        llm.llm_engine.step()
        if name not in window_manager.req_to_blocks:
            break
        total = request.num_computed_tokens
        held = {i for i, block in enumerate(window_manager.req_to_blocks[name]) if block is not null}
        # The state in the pages lags behind, up to a block; with prefix caching that is before the last token.
        oldest_needed = max(0, max(computed - caching, window + sinks) // 16 * 16 - window)
        needed = {i // 16 for i in range(total) if i < sinks or i >= oldest_needed}
        assert held == needed
        assert len(held) == window_manager.spec.num_held_blocks(total, computed)
        states = state_manager.req_to_blocks.get(name, [])
        assert len(states) == ((1 + caching) * state_manager.num_pages if total > window + sinks else 0)
        most = max(most, len(held))
    cap = window_manager.kv_cache_spec.max_admission_blocks_per_request(1024)
    assert most <= cap
    assert manager.usage == 0


def test_a_prompt_longer_than_the_pool_is_admitted() -> None:
    """The pool holds 320 tokens; a request of 900 needs few of them at a time."""
    ahn = {"checkpoint": str(GDN.ahn), "window": 24, "sinks": 8}
    with engine(GDN.base, ahn, block_size=16, num_gpu_blocks_override=20, max_num_batched_tokens=64) as llm:
        prompt = torch.randint(512, (900,), generator=torch.Generator().manual_seed(0))
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([{"prompt_token_ids": prompt.tolist()}], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 20
