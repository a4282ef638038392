"""GPU code on the CPU: Triton's interpreter runs every kernel on CPU tensors.

``install()`` has to be called before Triton's users (flash-linear-attention, vLLM) are imported, in a process that
was started with ``TRITON_INTERPRET=1``: Triton reads that variable when a kernel is defined, also of the kernels in its
own library. So tests that need the interpreter live in ``tests/kernels/interpreted``, and
``tests/kernels/test_interpreted.py`` runs them in processes of their own.
"""

import importlib
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any


def active() -> bool:
    """Whether this process was started for the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class InterpreterDriver:
    """What Triton and its users ask of a device's driver, answered for the CPU."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cpu", 0, 1)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def install() -> None:
    """Make the interpreter's driver Triton's only one.

    Raises:
        RuntimeError: the process was not started with ``TRITON_INTERPRET=1``.
    """
    if not active():
        raise RuntimeError("the interpreter needs TRITON_INTERPRET=1 from the start of the process")
    from triton.backends import backends
    from triton.runtime.driver import driver

    backends["cpu"] = SimpleNamespace(driver=InterpreterDriver, compiler=None)
    driver.set_active(InterpreterDriver())
    _mend_bfloat16()
    _mend_masks()
    _tune_nothing()


def _tune_nothing() -> None:
    """What a configuration costs here says nothing: autotuned kernels take their last, which has the largest blocks."""
    from triton.runtime.autotuner import Autotuner

    if hasattr(Autotuner, "tunes_nothing"):
        return
    init = Autotuner.__init__

    def init_with_one(self: Any, fn: Any, arg_names: Any, configs: Any, *rest: Any, **kwargs: Any) -> None:
        init(self, fn, arg_names, configs[-1:], *rest, **kwargs)

    Autotuner.__init__ = init_with_one
    Autotuner.tunes_nothing = True


def _mend_bfloat16() -> None:
    """Round to bfloat16 and multiply it as devices do.

    NumPy has no bfloat16. The interpreter keeps its bits, cuts off those that do not fit instead of rounding to
    nearest, and ``tl.dot`` multiplies the bits.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, np

    if hasattr(InterpreterBuilder, "bfloat16_mended"):
        return
    cast_impl, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast(self: Any, x: Any, dtype: Any) -> Any:
        given, wanted = x.dtype.scalar, dtype.scalar
        if given == tl.bfloat16 and wanted == tl.float32:
            return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), wanted)
        if given == tl.float32 and wanted == tl.bfloat16:
            bits = np.ascontiguousarray(x.data).view(np.uint32).reshape(x.data.shape)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(x.data), np.uint16(0x7FC0), rounded), wanted)
        return cast_impl(self, x, dtype)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return create_dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
    InterpreterBuilder.bfloat16_mended = True


def _mend_masks() -> None:
    """Take for true what is not zero: a bool combined with a Python number becomes an integer here, and no mask."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "masks_mended"):
        return
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def mended(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), tl.int1)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        return load(self, ptrs, mended(mask), *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, ptrs, value, mended(mask), *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = masked_load, masked_store
    InterpreterBuilder.masks_mended = True


def _tensor_range(*bounds: Any) -> Iterator[Any]:
    """``range`` whose values are Triton scalars, as they are in a compiled loop: they know ``.to(dtype)``."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle, np

    for value in range(*(int(bound) for bound in bounds)):
        yield tl.tensor(TensorHandle(np.array([value], dtype=np.int32), tl.int32), tl.int32)


def install_for_fla() -> None:
    """Let flash-linear-attention's chunk kernels run in the interpreter: they call methods of their loop counters."""
    install()
    for name in ("fla.ops.common.chunk_delta_h", "fla.ops.common.chunk_h"):
        module = importlib.import_module(name)
        module.range = _tensor_range  # type: ignore[attr-defined]
