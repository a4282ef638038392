"""FlashAttention without a GPU: vLLM's own Python interface of it, over operations that plain torch computes.

:func:`install` puts both where vLLM's GPU build has them. The operations check what the compiled ones check, and what
these would read wrongly without a word: alignment, lengths beyond the bounds that the host gave, schedules that were
made for another batch. Keys and values behind a sequence's end are not looked at, as they are not by FlashAttention.
"""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Float32, which FlashAttention does not know, lets tests compare tokens and small differences."""

calls: list[dict[str, Any]] = []
"""What the operations were asked, newest last: ``version``, ``batch``, ``max_seqlen_q``, ``window``, ``scheduled``."""


def install(version: int) -> None:
    """Let vLLM have FlashAttention of this version, 2 or 3, in this process."""
    from vllm.v1.attention.backends import fa_utils

    torch.ops._vllm_fa2_C = SimpleNamespace(varlen_fwd=_varlen_fwd)  # type: ignore[attr-defined]
    torch.ops._vllm_fa3_C = SimpleNamespace(fwd=_fwd, get_scheduler_metadata=_get_scheduler_metadata)  # type: ignore[attr-defined]
    flash = interface()
    fa_utils.flash_attn_varlen_func = flash.flash_attn_varlen_func
    fa_utils.get_scheduler_metadata = flash.get_scheduler_metadata
    fa_utils.get_flash_attn_version = lambda **_: version


def interface() -> ModuleType:
    """The module of vLLM that calls the compiled operations; its package cannot be imported where there are none."""
    import vllm

    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("flash_attn_interface", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    num_heads_k: int,
    headdim: int,
    headdim_v: int,
    qkv_dtype: torch.dtype,
    seqused_k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: None,
    cu_seqlens_k_new: None,
    seqused_q: None,
    leftpad_k: None,
    page_size: int,
    max_seqlen_k_new: int,
    is_causal: bool,
    window_left: int,
    window_right: int,
    has_softcap: bool,
    num_splits: int,
    pack_gqa: None,
    sm_margin: int,
) -> torch.Tensor:
    assert qkv_dtype in DTYPES and page_size % 16 == 0 and is_causal and headdim == headdim_v
    sizes = (batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, page_size)
    return _schedule(seqused_k, cu_seqlens_q, (*sizes, window_left, window_right, num_splits))


def _schedule(seqused_k: torch.Tensor, cu_seqlens_q: torch.Tensor, numbers: tuple[int, ...]) -> torch.Tensor:
    """A stand-in that depends on all that the real one may depend on; its length depends on the batch's size alone."""
    batch = len(seqused_k)
    schedule = torch.zeros(1 + -(-batch // 4) * 8, dtype=torch.int32)
    schedule[0] = hash(numbers) % 2**31
    schedule[1 : 1 + batch] = seqused_k
    schedule[1 + batch : 1 + 2 * batch] = cu_seqlens_q.diff()
    return schedule


def _fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_new: None,
    v_new: None,
    q_v: None,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: None,
    cu_seqlens_k_new: None,
    seqused_q: None,
    seqused_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    page_table: torch.Tensor,
    kv_batch_idx: None,
    leftpad_k: None,
    rotary_cos: None,
    rotary_sin: None,
    seqlens_rotary: None,
    q_descale: None,
    k_descale: None,
    v_descale: None,
    softmax_scale: float,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    scheduler_metadata: torch.Tensor | None,
    num_splits: int,
    pack_gqa: None,
    sm_margin: int,
    s_aux: None,
    cp_world_size: int,
    cp_rank: int,
    cp_tot_seqused_k: None,
) -> tuple[torch.Tensor, ...]:
    assert {k_new, v_new, q_v, cu_seqlens_k, cu_seqlens_k_new, seqused_q, kv_batch_idx, leftpad_k} == {None}
    assert {rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, s_aux} == {None}
    # Copies to Hopper's shared memory want a stride of 16 bytes on every axis but the last, of axes of size 1 too.
    assert all(stride * x.itemsize % 16 == 0 for x in (q, k, v) for stride in x.stride()[:-1])
    if scheduler_metadata is not None:
        sizes = (len(seqused_k), max_seqlen_q, max_seqlen_k, q.shape[1], k.shape[2], q.shape[2], k.shape[1])
        expected = _schedule(seqused_k, cu_seqlens_q, (*sizes, window_left, window_right, num_splits))
        assert torch.equal(scheduler_metadata, expected), "a schedule for something else"
    bounds, window = (max_seqlen_q, max_seqlen_k), (window_left, window_right)
    _attend(q, k, v, out, cu_seqlens_q, seqused_k, page_table, bounds, softmax_scale, is_causal, window, softcap)
    _note(3, seqused_k, max_seqlen_q, window_left, scheduler_metadata is not None)
    return out, torch.empty(0), torch.empty(0), torch.empty(0)


def _varlen_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    seqused_k: torch.Tensor,
    leftpad_k: None,
    block_table: torch.Tensor,
    alibi_slopes: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    return_softmax: bool,
    num_splits: int,
    gen: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert p_dropout == 0 and num_splits <= 1  # `cu_seqlens_k` is not looked at beside `seqused_k`
    bounds, window = (max_seqlen_q, max_seqlen_k), (window_left, window_right)
    _attend(q, k, v, out, cu_seqlens_q, seqused_k, block_table, bounds, softmax_scale, is_causal, window, softcap)
    _note(2, seqused_k, max_seqlen_q, window_left, scheduled=False)
    return out, torch.empty(0)


def _note(version: int, seqused_k: torch.Tensor, max_seqlen_q: int, window: int, scheduled: bool) -> None:
    calls.append(
        {
            "version": version,
            "batch": len(seqused_k),
            "max_seqlen_q": max_seqlen_q,
            "window": window,
            "scheduled": scheduled,
        }
    )


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    bounds: tuple[int, int],
    scale: float,
    causal: bool,
    window: tuple[int, int],
    softcap: float,
) -> None:
    batch = len(seqused_k)
    pages, block_size, kv_heads, head_size = k.shape
    assert q.dtype in DTYPES and k.dtype == v.dtype == out.dtype == q.dtype
    assert v.shape == k.shape and out.shape == q.shape and q.shape[2] == head_size
    assert len(q) >= int(cu_seqlens_q[-1])
    assert q.shape[1] % kv_heads == 0 and head_size % 8 == 0 and head_size <= 256 and block_size % 16 == 0
    for x in (q, k, v, out):
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]
        assert all(stride * x.itemsize % 16 == 0 for stride in strides[:-1])
    assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1 and len(block_table) == batch
    for x, length in ((cu_seqlens_q, batch + 1), (seqused_k, batch)):
        assert x.dtype == torch.int32 and x.is_contiguous() and x.shape == (length,)
    assert causal and window[1] in (-1, 0) and softcap == 0
    assert int(cu_seqlens_q.diff().max()) <= bounds[0] and int(seqused_k.max()) <= bounds[1]
    assert bounds[1] <= block_table.shape[1] * block_size
    starts = cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        queries = q[starts[row] : starts[row + 1]]
        if not len(queries):
            continue
        blocks = block_table[row, : -(-length // block_size)].long()
        assert length >= len(queries) and int(blocks.min()) >= 0 and int(blocks.max()) < pages
        keys, values = (x[blocks].flatten(0, 1)[:length].double() for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // kv_heads, 1) for x in (keys, values))
        t = torch.arange(length - len(queries), length)[:, None]
        distance = t - torch.arange(length)
        visible = (distance >= 0) & ((distance <= window[0]) | (window[0] < 0))
        scores = torch.einsum("thd,jhd->htj", queries.double(), keys) * scale
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        # Only keys that no query of the row sees may be anything at all.
        seen = visible.any(0)
        attended = torch.einsum("htj,jhd->thd", weights[:, :, seen], values[seen])
        out[starts[row] : starts[row + 1]] = attended.to(out.dtype)
