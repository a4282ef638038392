"""The GPU path with what the golden data does not have, against the reference: checkpoint options, and half precision.

The counterpart, in few engines since each is slow in the interpreter, of ``test_reference.py``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from support.interpreted_engine import run
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

pytestmark = [pytest.mark.slow, pytest.mark.gpu_path]

MAX_TOKENS = 4
TOLERANCE = 1e-3


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(500, (length,), generator=generator).tolist() for length in lengths]


def engine_logits(
    paths: TinyPaths, window: int, sinks: int, asked: list[list[int]], folder: Path, **arguments: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor], dict[str, Any]]:
    """The sequences that the engine made, less the last token, its logits for each, and what ran in its worker."""
    file = folder / "logits.pt"
    setting = {"checkpoint": str(paths.ahn), "window": window, "sinks": sinks}
    result = run(paths.base, setting, asked, MAX_TOKENS, logits=file, **arguments)
    (worker,) = result["workers"]
    assert worker["core"] == "GPUCore"
    sequences = [torch.tensor(prompt + tokens[:-1]) for prompt, tokens in zip(asked, result["tokens"], strict=True)]
    return sequences, torch.load(file), worker


def test_all_options(tmp_path: Path) -> None:
    """Own query projection, router, a layer of full attention, and sinks and window that fill no block."""
    window, sinks = 37, 9
    paths = make_tiny(tmp_path, seed=5, use_q_proj=True, use_router=True, fa_layer_ids="1")
    sequences, logits, _ = engine_logits(
        paths,
        window,
        sinks,
        prompts(1, 46, 47, 60, 120),
        tmp_path,
        block_size=16,
        max_num_batched_tokens=80,
        max_num_seqs=8,
        constants={"gpu.plan.MASKED_QUERIES": 32, "paged.triton.SEGMENTS": 4},
    )
    reference = from_folders(paths.base, paths.ahn, window, sinks, recurrence="naive")
    for sequence, got in zip(sequences, logits, strict=True):
        with torch.no_grad():
            expected = reference(sequence[None], last=MAX_TOKENS)[0]
        assert (got - expected).abs().max() <= TOLERANCE, len(sequence)


def test_half_precision_without_sinks(tmp_path: Path) -> None:
    """A bfloat16 model with norms of queries and keys, its states in bfloat16 too, and a router over Mamba2."""
    window = 40
    paths = make_tiny(tmp_path, seed=6, model_type="qwen3", memory="Mamba2", use_router=True, dtype="bfloat16")
    sequences, logits, worker = engine_logits(
        paths,
        window,
        0,
        prompts(7, 40, 70, 120),
        tmp_path,
        dtype="bfloat16",
        mamba_ssm_cache_dtype="bfloat16",
        block_size=32,
        max_num_batched_tokens=80,
        max_num_seqs=8,
    )
    assert worker["state_dtypes"] == ["torch.bfloat16"]
    exact, half, without = (
        from_folders(paths.base, ahn, window, 0, recurrence="naive", dtype=dtype)
        for ahn, dtype in ((paths.ahn, torch.float32), (paths.ahn, torch.bfloat16), ("none", torch.float32))
    )
    for sequence, got in zip(sequences, logits, strict=True):
        with torch.no_grad():
            expected, rounded, forgetful = (
                model(sequence[None], last=MAX_TOKENS)[0].float() for model in (exact, half, without)
            )
        error, usual, absence = (float((x - expected).square().mean().sqrt()) for x in (got, rounded, forgetful))
        # No more than what bfloat16 costs the reference, whose states are float32; and next to what a memory makes of
        # the logits it is nothing.
        assert error < 1.5 * usual, len(sequence)
        if len(sequence) > window + 1:
            assert error < absence / 5, len(sequence)
