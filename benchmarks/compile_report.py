"""Compile every kernel for GPUs that are not there, and report registers and spills.

    python benchmarks/compile_report.py [--targets sm_90 gfx942] [--head-sizes 128] [--json FILE]

Calls the kernels' own Python functions on tensors without data, under a driver that claims to be the GPU and stops
before a launch: what is compiled is what a GPU would run, specialisations included. Needs torch and triton alone.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_cases.own_attention import paged_attention

from vllm_ahn.kernels.cache_write import write_window_pages
from vllm_ahn.kernels.decode import decode_memory, decode_reads
from vllm_ahn.kernels.pages import StatePageLayout, StatePages, WindowPageLayout, WindowPages
from vllm_ahn.kernels.prefill_gather import gather_states, gather_stretches, scatter_states
from vllm_ahn.kernels.prefill_plan import PrefillPlan
from vllm_ahn.kernels.read_out import gated_squares, read_out
from vllm_ahn.kernels.tables import compact_block_table, compact_width
from vllm_ahn.memory.spec import MEMORIES, MemorySpec

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
HEAD_SIZES = (64, 80, 96, 128, 256)


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes of a device."""

    kernel: str
    case: str
    target: str
    warps: int
    registers: int
    spills: int
    """CUDA: bytes of local memory a thread; AMD: vector registers spilled."""
    shared: int
    """Bytes of shared memory a program."""


class _Claim:
    """A driver that says it is the target. Nothing can be launched with it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend} {self.target.arch}"  # kernels are cached by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Within it, launches compile for ``target`` and go no further. Yields the list of what was compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    driver.set_active(_Claim(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(kernel: Any, case: str, target: str) -> Compiled:
    """Read registers and spills from a compiled kernel."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        # Stack is where spilled registers go, and these kernels put nothing else there.
        registers, spills = _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spills = (_number(rf"\.{name}:\s*(\d+)", assembly) for name in ("vgpr_count", "vgpr_spill_count"))
    meta = kernel.metadata
    return Compiled(kernel.name.strip("_"), case, target, meta.num_warps, registers, spills, meta.shared)


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in what the compiler left")
    return int(match[1])


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _indices(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return _empty(*shape, dtype=dtype)


def _window_pages(kv_heads: int, head_size: int, gates: int, block_size: int, dtype: torch.dtype) -> WindowPages:
    layout = WindowPageLayout(kv_heads, head_size, gates, block_size, dtype)
    return WindowPages(_empty(64, kv_heads, block_size, layout.content_elements, dtype=dtype), layout)


Case = tuple[str, Callable[[], None]]


def cases(head_sizes: Sequence[int] = HEAD_SIZES, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> Iterator[Case]:
    """What is launched for layers of 16 heads in groups of 8, with its name."""
    yield "any", lambda: decode_reads(_indices(33), _indices(32), 32768, _indices(32))
    for block_size in (16, 32):
        for requests in (None, _indices(TOKENS)):
            name = "a row a request" if requests is None else "rows of requests"
            for how, rearrange in (("rearranged", True), ("masked", False)):
                yield f"blocks of {block_size}, {name}, {how}", _compact(block_size, requests, rearrange)
    if 128 in head_sizes:
        for group in (5, 8):
            for segments in (1, 16):
                for window in (None, 32640):
                    kind = "chunk" if segments == 1 else "split decode"
                    case = f"benchmark's attention, D=128 group {group}, {kind}, {'window' if window else 'full'}"
                    yield case, _attention(group, segments, window)
    for head_size in head_sizes:
        for state_dtype in (torch.float32, torch.bfloat16):
            yield f"D={head_size} state {str(state_dtype).removeprefix('torch.')}", _states(head_size, state_dtype)
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            for memory in MEMORIES.values():
                for state_dtype in (torch.float32, torch.bfloat16):
                    state = str(state_dtype).removeprefix("torch.")
                    yield (
                        f"D={head_size} {name} {memory.name} state {state}",
                        _decode(head_size, dtype, memory, state_dtype),
                    )
                yield f"D={head_size} {name} {memory.name}", _gather(head_size, dtype, memory)
            for num_gates in (0, 1, 2):
                yield f"D={head_size} {name} {num_gates} gates", _write(head_size, dtype, num_gates)
            for all_heads in (False, True):
                for routed in (False, True):
                    for read_dtype in (torch.float32, dtype):  # of decodes and of chunks
                        norm = f"norm over {'all heads' if all_heads else 'a head'}{', router' if routed else ''}"
                        read = str(read_dtype).removeprefix("torch.")
                        case = f"D={head_size} {name} of {read} {norm}"
                        yield case, _read_out(head_size, dtype, read_dtype, all_heads, routed)


HEADS, KV_HEADS, GROUP, BLOCK_SIZE, TOKENS = 16, 2, 8, 16, 32


def _state_pages(head_size: int, state_dtype: torch.dtype) -> StatePages:
    # A page need not be whole columns: it is as large as a window page.
    cache = _window_pages(KV_HEADS, head_size, GROUP, BLOCK_SIZE, torch.bfloat16).pages
    return StatePages(cache, StatePageLayout(HEADS, head_size, cache[0].numel() * cache.itemsize, state_dtype))


def _decode(head_size: int, dtype: torch.dtype, memory: MemorySpec, state_dtype: torch.dtype) -> Callable[[], None]:
    def launch() -> None:
        decode_memory(
            _empty(TOKENS, HEADS, head_size, dtype=dtype),
            _window_pages(KV_HEADS, head_size, memory.num_gates * GROUP, BLOCK_SIZE, dtype),
            _indices(TOKENS, 4096),
            _state_pages(head_size, state_dtype),
            _indices(TOKENS, 4096),
            _indices(TOKENS),
            _indices(TOKENS),
            _empty(TOKENS, HEADS, head_size),
            memory=memory,
            window=32640,
            sinks=128,
            scale=1.0,
            A_log=_empty(HEADS),
        )

    return launch


def _plan() -> PrefillPlan:
    tokens, long = _indices(TOKENS), _indices(TOKENS, dtype=torch.int64)
    return PrefillPlan((TOKENS,), tokens, long, long, _indices(1), _indices(1), _indices(2), _indices(1, 2))


def _gather(head_size: int, dtype: torch.dtype, memory: MemorySpec) -> Callable[[], None]:
    def launch() -> None:
        query = _empty(TOKENS, HEADS, head_size, dtype=dtype)
        pages = _window_pages(KV_HEADS, head_size, memory.num_gates * GROUP, BLOCK_SIZE, dtype)
        gather_stretches(query, pages, _plan(), memory=memory, A_log=_empty(HEADS))

    return launch


def _states(head_size: int, state_dtype: torch.dtype) -> Callable[[], None]:
    def launch() -> None:
        pages, table, plan = _state_pages(head_size, state_dtype), _indices(TOKENS, 4096), _plan()
        scatter_states(gather_states(pages, table, plan), pages, table, plan)

    return launch


def _write(head_size: int, dtype: torch.dtype, num_gates: int) -> Callable[[], None]:
    def launch() -> None:
        qkv = _empty(TOKENS, HEADS + 2 * KV_HEADS, head_size, dtype=dtype)
        _, key, value = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        gates = _empty(TOKENS, HEADS, num_gates) if num_gates else None
        slots = _indices(TOKENS, dtype=torch.int64)
        pages = _window_pages(KV_HEADS, head_size, max(num_gates, 1) * GROUP, BLOCK_SIZE, dtype)
        write_window_pages(key, value, gates, slots, pages)

    return launch


def _compact(block_size: int, requests: torch.Tensor | None, rearrange: bool) -> Callable[[], None]:
    def launch() -> None:
        width = compact_width(32640, 128, block_size, 1024)
        compact_block_table(
            _indices(TOKENS, 131072 // block_size),
            requests,
            _indices(TOKENS + 1),
            _indices(TOKENS),
            window=32640,
            sinks=128,
            block_size=block_size,
            rearrange=rearrange,
            compact_table=_indices(TOKENS, width),
            compact_lens=_indices(TOKENS),
        )

    return launch


def _attention(groups: int, segments: int, window: int | None) -> Callable[[], None]:
    def launch() -> None:
        queries = 1024 if segments == 1 else 1
        kv_heads, head_size = 4, 128
        pages = _window_pages(kv_heads, head_size, groups, BLOCK_SIZE, torch.bfloat16)
        query = _empty(TOKENS, kv_heads * groups, head_size, dtype=torch.bfloat16)
        paged_attention(
            query,
            pages.keys,
            pages.values,
            torch.empty_like(query),
            _indices(TOKENS + 1),
            _indices(TOKENS),
            _indices(TOKENS, 4096),
            max_query_len=queries,
            window=window,
            sinks=128,
            scale=0.1,
            segments=segments,
        )

    return launch


def _read_out(
    head_size: int, dtype: torch.dtype, read_dtype: torch.dtype, all_heads: bool, routed: bool
) -> Callable[[], None]:
    def launch() -> None:
        o, z, rows = _empty(TOKENS, HEADS, head_size, dtype=read_dtype), _empty(TOKENS, HEADS), _indices(TOKENS)
        squares = _empty(TOKENS) if all_heads else None
        if squares is not None:
            gated_squares(o, z, rows, squares)
        read_out(
            o,
            z,
            rows,
            _empty(HEADS * head_size if all_heads else head_size, dtype=dtype),
            _empty(HEADS, head_size, head_size, dtype=dtype),
            _empty(TOKENS, HEADS, head_size, dtype=dtype),
            squares=squares,
            norm_size=HEADS * head_size if all_heads else None,
            router=_empty(TOKENS, HEADS) if routed else None,
        )

    return launch


def report(targets: Sequence[str], todo: Sequence[Case]) -> list[Compiled]:
    """Compile cases for targets and print a table, one line a kernel."""
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(f"{'kernel':24} {'case':68} {'target':7} {'warps':>5} {'registers':>9} {'spills':>6} {'shared':>6}")
    results = []
    for case, launch in todo:
        for target in targets:
            with compiling_for(TARGETS[target]) as compiled:
                launch()
            for result in (resources(kernel, case, target) for kernel in compiled):
                print(
                    f"{result.kernel:24} {result.case:68} {result.target:7} {result.warps:5} {result.registers:9} "
                    f"{result.spills:6} {result.shared:6}",
                    flush=True,
                )
                results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile kernels ahead of time and report registers and spills.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16"])
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    todo = list(cases(arguments.head_sizes, [getattr(torch, dtype) for dtype in arguments.dtypes]))
    results = report(arguments.targets, todo)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
