"""Compile every kernel for GPUs that are not there, and report registers and spills.

    python benchmarks/compile_report.py [--targets sm_90 gfx942] [--head-sizes 128] [--json FILE]

Calls the kernels' own Python functions on tensors without data, under a driver that claims to be the GPU and stops
before a launch: what is compiled is what a GPU would run, specialisations included. Needs torch and triton alone.

Spills are bytes of local memory a thread (CUDA) or vector registers (AMD), ``shared`` is bytes a program.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_cases.layer import Step
from kernel_cases.own_attention import paged_attention
from kernel_cases.setting import Model, Setting
from report import parser, table
from vllm_ahn.kernels.settled import GRANULARITY
from vllm_ahn.kernels.tables import compact_block_table, compact_width
from vllm_ahn.memory.spec import MEMORIES, MemorySpec

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942", "gfx950")
}
HEAD_SIZES = (64, 80, 96, 128, 256)


@contextmanager
def compiling_for(target: GPUTarget) -> Iterator[list[Any]]:
    """Within it, launches compile for ``target`` and go no further. Yields the list of what was compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    claim = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: f"{target.backend} {target.arch}",  # kernels are cached by device
        get_current_stream=lambda device: 0,
    )
    driver.set_active(claim)
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def resources(kernel: Any) -> dict[str, Any]:
    """Return a compiled kernel's name and what it takes of a device."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        # Stack is where spilled registers go, and these kernels put nothing else there.
        patterns = (r"REG:(\d+)", r"STACK:(\d+)")
    else:
        text, patterns = kernel.asm["amdgcn"], (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)")
    found = [re.search(pattern, text) for pattern in patterns]
    if None in found:
        raise ValueError(f"no {patterns[found.index(None)]} in what the compiler left")
    meta, (registers, spills) = kernel.metadata, (int(match[1]) for match in found)
    used = {"warps": meta.num_warps, "registers": registers, "spills": spills, "shared": meta.shared}
    return {"kernel": kernel.name.strip("_"), **used}


Case = tuple[str, Callable[[], Any]]
TOKENS = 32
GDN, DN, MAMBA2 = (MEMORIES[name] for name in ("GatedDeltaNet", "DeltaNet", "Mamba2"))


def cases(head_sizes: Sequence[int] = HEAD_SIZES, dtypes: Sequence[torch.dtype] = (torch.bfloat16,)) -> Iterator[Case]:
    """Yield what is launched for layers of 16 heads in groups of 8, with its name."""
    yield "any", _step(128, torch.bfloat16, GDN).plan_decode
    for block_size in (16, 32):
        for requests in (None, _indices(TOKENS)):
            name = "a row a request" if requests is None else "rows of requests"
            for how, rearrange in (("rearranged", True), ("masked", False)):
                yield f"blocks of {block_size}, {name}, {how}", partial(_compact, block_size, requests, rearrange)
    for group in (5, 8) if 128 in head_sizes else ():
        for segments in (1, 16):
            for window in (None, 32640):
                kind = "chunk" if segments == 1 else "split decode"
                case = f"benchmark's attention, D=128 group {group}, {kind}, {'window' if window else 'full'}"
                yield case, partial(_attention, group, segments, window)
    for size in head_sizes:
        for state in (torch.float32, torch.bfloat16):
            yield f"D={size} state {_name(state)}", partial(_states, _step(size, torch.bfloat16, GDN, state))
        for dtype in dtypes:
            of = f"D={size} {_name(dtype)}"
            for name, memory in MEMORIES.items():
                for state in (torch.float32, torch.bfloat16):
                    step = _step(size, dtype, memory, state)
                    for queries in (1, 4, GRANULARITY) if state == torch.float32 else (1,):
                        yield f"{of} {name} state {_name(state)}, {queries} queries", partial(step.decode, queries)
                yield f"{of} {name}", _step(size, dtype, memory).gather
            for gates, kept in ((0, None), (1, DN), (2, GDN)):
                yield f"{of} {gates} gates", _step(size, dtype, kept).write
            for memory in (GDN, MAMBA2):
                for router in (None, _indices(TOKENS, 16, dtype=torch.float32)):
                    for read in (torch.float32, dtype):  # of decodes and of chunks
                        norm = f"norm over {'all heads' if memory.norm_all_heads else 'a head'}"
                        case = f"{of} of {_name(read)} {norm}{'' if router is None else ', router'}"
                        step = _step(size, dtype, memory)
                        yield case, partial(step.read_out, step.o.to(read), step.rows, router)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _indices(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _step(
    head_size: int, dtype: torch.dtype, memory: MemorySpec | None, state: torch.dtype = torch.float32, group: int = 8
) -> Step:
    """Return a batch of decodes past ``W + S``, in groups of so many query heads, in tensors without data."""
    setting = Setting(torch.device("meta"), None, dtype=dtype, state_dtype=state)
    kv_heads = 2 if group == 8 else 4
    model = Model("any", group * kv_heads, kv_heads, head_size)
    return Step(setting, model, memory, [setting.capacity + 1] * TOKENS, [1] * TOKENS, range(1))


def _states(step: Step) -> None:
    step.scatter_states(step.gather_states())


def _compact(block_size: int, requests: torch.Tensor | None, rearrange: bool) -> None:
    compact = _indices(TOKENS, compact_width(32640, 128, block_size, 1024))
    rows = (_indices(TOKENS, 131072 // block_size), requests, _indices(TOKENS + 1), _indices(TOKENS))
    compact_block_table(*rows, 32640, 128, block_size, rearrange, compact, _indices(TOKENS))


def _attention(group: int, segments: int, window: int | None) -> None:
    step = _step(128, torch.bfloat16, None, group=group)
    queries = (step.output, step.starts, step.lens, step.pool.window_table)
    sizes = {"max_query_len": 1024 if segments == 1 else 1, "segments": segments}
    paged_attention(step.query, *step.pool.planes[:2], *queries, **sizes, window=window, sinks=128, scale=0.1)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    options.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16"])
    options.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = options.parse_args()
    results = []
    for case, launch in cases(arguments.head_sizes, [getattr(torch, dtype) for dtype in arguments.dtypes]):
        for target in arguments.targets:
            with compiling_for(TARGETS[target]) as compiled:
                launch()
            for used in map(resources, compiled):
                results.append({"kernel": used.pop("kernel"), "case": case, "target": target, **used})
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    print(table(list(results[0]), [list(map(str, result.values())) for result in results], left=3))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
