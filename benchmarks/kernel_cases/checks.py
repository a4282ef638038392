"""What was computed against what should have been."""

import torch


class Mismatch(Exception):
    """A kernel's result is not its oracle's. What failed is not timed."""


def compare(name: str, got: torch.Tensor, wanted: torch.Tensor, *, mean: float, most: float) -> float:
    """Raise :class:`Mismatch` unless two tensors agree; returns the root mean square error that was found.

    Args:
        name: what they are, for the message.
        got: any float dtype.
        wanted: likewise, of the same shape.
        mean: root mean square error allowed, relative to that of ``wanted``.
        most: error of any element allowed, relative to the largest of ``wanted``.
    """
    if got.shape != wanted.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(wanted.shape)}")
    if got.numel() == 0:
        return 0.0
    got, wanted = got.double(), wanted.double()
    if not bool(got.isfinite().all()):
        raise Mismatch(f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite")
    error = got - wanted
    on_average = float(error.square().mean().sqrt() / wanted.square().mean().sqrt())
    at_most = float(error.abs().max() / wanted.abs().max())
    if not (on_average <= mean and at_most <= most):
        raise Mismatch(
            f"{name}: off by {on_average:.2g} on average and {at_most:.2g} at most, allowed are {mean:.2g}, {most:.2g}"
        )
    return on_average


def untouched(name: str, got: torch.Tensor, before: torch.Tensor) -> None:
    """Raise :class:`Mismatch` unless two tensors are the same bytes, NaN included."""
    different = got.contiguous().view(torch.uint8) != before.contiguous().view(torch.uint8)
    if bool(different.any()):
        raise Mismatch(f"{name}: {int(different.sum())} of {different.numel()} bytes are not what they should be")
