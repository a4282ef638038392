"""Compile every kernel for GPUs that are not there, and report registers and spills.

    python benchmarks/compile_report.py [--targets sm_90 gfx942] [--head-sizes 128] [--json FILE]

Calls the kernels' own Python functions on tensors without data, under a driver that claims to be the GPU and stops
before a launch: what is compiled is what a GPU would run, specialisations included. Needs torch and triton alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[1]))

from kernel_cases.layer import Layer, Step
from kernel_cases.own_attention import paged_attention
from kernel_cases.setting import Model, Setting
from report import parser, table
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


Case = tuple[str, Callable[[], Any]]
TOKENS = 32
META = torch.device("meta")
"""Tensors without data."""
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
                    yield f"{of} {name} state {_name(state)}", _step(size, dtype, memory, state).decode
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
    return torch.empty(shape, dtype=dtype, device=META)


def _step(
    head_size: int, dtype: torch.dtype, memory: MemorySpec | None, state: torch.dtype = torch.float32, group: int = 8
) -> Step:
    """Return a batch of decodes past ``W + S``, in groups of so many query heads."""
    setting = Setting(META, None, dtype=dtype, state_dtype=state)
    kv_heads = 2 if group == 8 else 4
    model = Model("any", group * kv_heads, kv_heads, head_size)
    return Layer(setting, model, memory, [setting.capacity + 1] * TOKENS, [1] * TOKENS, range(1)).step()


def _states(step: Step) -> None:
    step.scatter_states(step.gather_states())


def _compact(block_size: int, requests: torch.Tensor | None, rearrange: bool) -> None:
    compact = _indices(TOKENS, compact_width(32640, 128, block_size, 1024))
    rows = (_indices(TOKENS, 131072 // block_size), requests, _indices(TOKENS + 1), _indices(TOKENS))
    compact_block_table(*rows, 32640, 128, block_size, rearrange, compact, _indices(TOKENS))


def _attention(group: int, segments: int, window: int | None) -> None:
    step = _step(128, torch.bfloat16, None, group=group)
    queries = (step.output, step.starts, step.lens, step.window_table)
    sizes = {"max_query_len": 1024 if segments == 1 else 1, "segments": segments}
    paged_attention(step.query, *step.layer.pool.planes[:2], *queries, **sizes, window=window, sinks=128, scale=0.1)


def compile_all(targets: Sequence[str], todo: Sequence[Case]) -> list[Compiled]:
    """Return what each case takes on each target, a line a kernel."""
    results = []
    for case, launch in todo:
        for target in targets:
            with compiling_for(TARGETS[target]) as compiled:
                launch()
            results += [resources(kernel, case, target) for kernel in compiled]
    return results


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options.add_argument("--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES))
    options.add_argument("--dtypes", nargs="+", choices=("bfloat16", "float16"), default=["bfloat16"])
    options.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = options.parse_args()
    todo = list(cases(arguments.head_sizes, [getattr(torch, dtype) for dtype in arguments.dtypes]))
    results = compile_all(arguments.targets, todo)
    print(f"torch {torch.__version__}, triton {triton.__version__}")
    headers = [field.name for field in fields(Compiled)]
    print(table(headers, [list(map(str, astuple(result))) for result in results], left=3))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
