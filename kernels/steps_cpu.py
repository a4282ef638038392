"""Steps on a CPU in one compiled kernel: ``steps_cpu.cpp``, built where it is first used.

A wheel for every CPU would have to do with what the oldest of them can. So the kernel is compiled for the CPU at hand,
which takes some seconds once: the library is kept in a folder by what the source, the compiler and the CPU are. It is
written beside its name and then renamed, so processes that build at the same time are not in each other's way, and one
that is killed meanwhile leaves no lock behind. (PyTorch's own builder of extensions has such a lock, and would compile
its headers, which the kernel does not need.)
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_ahn.kernels.pages import StatePages, WindowPages
from vllm_ahn.kernels.settled import GRANULARITY, Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.memory.spec import MemorySpec

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
"""Without ``-ffast-math``: where it is given to the linker, denormals become zero in the whole process."""
COMPILERS = ("g++", "clang++", "c++")
LARGEST_HEAD = 256

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INTEGER, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Arguments(ctypes.Structure):
    """``struct Arguments``, field by field."""

    _fields_ = tuple(
        (name, kind)
        for kind, names in (
            (_INTEGER, "heads kv_heads head_size num_requests num_threads"),
            (_POINTER, "query"),
            (_INTEGER, "query_token query_head"),
            (_POINTER, "requests first_tokens lens computed first_reads keys values gates"),
            (_INTEGER, "window_block window_head block_size num_gates"),
            (_POINTER, "window_table"),
            (_INTEGER, "window_width"),
            (_POINTER, "columns"),
            (_INTEGER, "page columns_per_page num_pages kept"),
            (_POINTER, "state_table"),
            (_INTEGER, "state_width window sinks period turns inner delta keeps_decay decay_from_rate"),
            (_POINTER, "A_log"),
            (ctypes.c_float, "scale"),
            (_POINTER, "o output"),
            (_INTEGER, "output_token output_head"),
            (_POINTER, "z"),
            (_INTEGER, "z_token"),
            (_POINTER, "norm projection router"),
        )
        for name in names.split()
    )


@dataclass(frozen=True)
class ReadOut:
    """What turns what is read into what is added to the output, for memories with a norm a head."""

    output: torch.Tensor
    """``[num_tokens, H, D]`` in the model's dtype, contiguous in ``D``, added to."""
    z: torch.Tensor
    """``[num_tokens, H]`` float32, read-out gates."""
    norm: torch.Tensor
    """``[D]`` in the model's dtype."""
    projection: torch.Tensor
    """``[H, D, D]`` in the model's dtype, contiguous."""
    router: torch.Tensor | None
    """``[N, H]`` float32 contiguous, weights in the order of ``steps.tokens``, or None."""


def absorb_and_read_steps(
    library: ctypes.CDLL,
    query: torch.Tensor,
    window_pages: WindowPages,
    window_table: torch.Tensor,
    state_pages: StatePages,
    state_table: torch.Tensor,
    steps: Steps,
    *,
    memory: MemorySpec,
    settling: Settling,
    scale: float,
    A_log: torch.Tensor | None = None,
    read_out: ReadOut | None = None,
) -> torch.Tensor | None:
    """Absorb one token before each query, then read; write the state where a boundary is crossed.

    Args:
        library: from :func:`load`.
        query, window_pages, window_table, state_pages, state_table, steps, memory, settling, scale, A_log: as those of
            :func:`vllm_ahn.kernels.recurrence.settled.absorb_and_read_steps`.
        read_out: norm, gate, project and add what is read, rounded as `vllm_ahn.memory.base.Memory` does.

    Returns:
        ``o [N, H, D]`` float32, before norm and gate, in the order of ``steps.tokens``; None with a ``read_out``.

    Raises:
        ValueError: shapes, dtypes or strides do not agree.
    """
    heads, size = query.shape[1:]
    layout = window_pages.layout
    window_pages.group_of(query)
    state_pages.check(state_table, heads, size, settling.num_slots)
    if size % 16 or size > LARGEST_HEAD:
        raise ValueError(f"heads must be a multiple of 16 up to {LARGEST_HEAD}, got {size}")
    if query.dtype != layout.dtype:
        raise ValueError(f"queries must be {layout.dtype} as the pages are, got {query.dtype}")
    for name, table in (("window", window_table), ("state", state_table)):
        if table.dtype != torch.int32 or table.stride(-1) != 1:
            raise ValueError(f"rows of the {name} table must be contiguous int32, got {table.dtype}")
    if any(x.dtype != torch.int64 for x in (steps.requests, steps.first_tokens, steps.lens, steps.computed)):
        raise ValueError("steps must be int64")
    if not len(steps.lens) or int(steps.lens.max()) > GRANULARITY:
        raise ValueError(f"one request at least, and at most {GRANULARITY} queries of each, got {steps.lens.tolist()}")
    if A_log is not None and A_log.dtype != torch.float32:
        raise ValueError(f"A_log must be float32, got {A_log.dtype}")
    columns = state_pages.columns
    o = None if read_out else query.new_empty((len(steps.tokens), heads, size), dtype=torch.float32)
    values: dict[str, Any] = {
        "heads": heads,
        "kv_heads": layout.num_kv_heads,
        "head_size": size,
        "num_requests": len(steps.lens),
        "num_threads": torch.get_num_threads(),
        "query": query,
        "query_token": query.stride(0),
        "query_head": query.stride(1),
        "requests": steps.requests,
        "first_tokens": steps.first_tokens,
        "lens": steps.lens,
        "computed": steps.computed,
        "first_reads": steps.first_reads,
        "keys": window_pages.keys,
        "values": window_pages.values,
        "gates": window_pages.gates,
        "window_block": window_pages.pages.stride(0),
        "window_head": window_pages.pages.stride(1),
        "block_size": layout.block_size,
        "num_gates": layout.gates_per_kv_head,
        "window_table": window_table,
        "window_width": window_table.stride(0),
        "columns": columns,
        "page": columns.stride(0),
        "columns_per_page": columns.shape[1],
        "num_pages": state_pages.layout.num_pages,
        "kept": state_pages.layout.kept,
        "state_table": state_table,
        "state_width": state_table.stride(0),
        "window": settling.window,
        "sinks": settling.sinks,
        "period": settling.period,
        "turns": settling.turns,
        "inner": settling.inner,
        "delta": memory.delta,
        "keeps_decay": memory.keeps_decay,
        "decay_from_rate": memory.decay_from_rate,
        "A_log": A_log,
        "scale": scale,
        "o": o,
    }
    if read_out:
        output, projection = read_out.output, read_out.projection
        if not (output.dtype == projection.dtype == read_out.norm.dtype == query.dtype and projection.is_contiguous()):
            raise ValueError(f"output, norm and projection must be {query.dtype}, the latter contiguous")
        weights = [read_out.z] if read_out.router is None else [read_out.z, read_out.router]
        if any(x.dtype != torch.float32 or x.stride(-1) != 1 for x in weights):
            raise ValueError("rows of z and router must be contiguous float32")
        values |= {
            "output": output,
            "output_token": output.stride(0),
            "output_head": output.stride(1),
            "z": read_out.z,
            "z_token": read_out.z.stride(0),
            "norm": read_out.norm,
            "projection": projection,
            "router": read_out.router,
        }
    arguments = _Arguments(
        **{name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    )
    entry: Callable[..., None] = getattr(library, f"{_NAMES[query.dtype]}_{_NAMES[columns.dtype]}")
    entry(ctypes.byref(arguments))  # without Python's lock
    return o


@functools.cache
def load(cache: Path) -> ctypes.CDLL | None:
    """Return the kernel for this CPU, compiled if it is not there yet; None, and a line in the log, if it cannot be.

    Args:
        cache: folder in which libraries are kept.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        logger.warning(
            "AHN: no C++ compiler (%s) is found, so decoding beyond the window runs in plain PyTorch, which takes some "
            "5 times as long in the memory; install one, for instance g++",
            ", ".join(COMPILERS),
        )
        return None
    file = cache / f"steps-{_fingerprint(compiler)}.so"
    try:
        if not file.exists():
            _compile(compiler, file)
        library = ctypes.CDLL(str(file))
    except (OSError, subprocess.SubprocessError) as error:
        message = getattr(error, "stderr", None) or error
        logger.warning(
            "AHN: %s cannot compile %s into %s, so decoding beyond the window runs in plain PyTorch, which takes some "
            "5 times as long in the memory: %s",
            compiler,
            SOURCE.name,
            cache,
            str(message).strip()[:500],
        )
        return None
    if (size := library.size_of_arguments()) != ctypes.sizeof(_Arguments):
        raise RuntimeError(f"{file} takes {size} bytes of arguments, expected {ctypes.sizeof(_Arguments)}")
    return library


def _fingerprint(compiler: str) -> str:
    """Of all that decides what a library is, and on which CPUs its instructions exist."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    described = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kinds = ("model name", "flags", "Features", "CPU part")
        described += "".join(sorted({line for line in lines if line.startswith(kinds)}))
    parts = (SOURCE.read_text(encoding="utf-8"), " ".join(FLAGS), version, platform.machine(), described)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=file.parent, suffix=".unfinished")
    os.close(handle)
    try:
        command = [compiler, *FLAGS, "-o", unfinished, str(SOURCE)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
        os.replace(unfinished, file)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)
