"""The loss curve as a picture."""

from __future__ import annotations

import json
import pathlib


def plot_curve(data: pathlib.Path, image: pathlib.Path) -> None:
    """Draw the loss over the steps, from the ``loss.json`` `data` to the PNG `image`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curve = json.loads(data.read_text(encoding="utf-8"))
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([entry["step"] for entry in curve], [entry["loss"] for entry in curve], color="#1f5fa8")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.savefig(image, dpi=150)
    pyplot.close(figure)
