"""The committed results are what today's programs make of the same measurements."""

import json
from typing import Any

import pytest
import torch

import length
import precision
import serving
from models import Comparison
from report import FOLDER
from vllm_ahn.memory.spec import MEMORIES


def committed(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return result


@pytest.mark.parametrize(("what", "name"), [("gates", "gate-precision"), ("state", "state-precision")])
@torch.inference_mode()
def test_precision(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first mark, after 1,000 of 100,000 tokens."""
    monkeypatch.setattr(precision, "MARKS", precision.MARKS[:1])
    memory = MEMORIES["GatedDeltaNet"]
    precision.verify(memory)
    measured = precision.measure(memory, what, precision.SEGMENT)
    expected = committed(name)["errors"][memory.name]
    assert list(measured) == list(expected) == list(precision.VARIANTS[what])
    for variant, errors in measured.items():
        for part, values in errors["1000"].items():
            assert values == pytest.approx(expected[variant]["1000"][part], rel=1e-3, abs=1e-9), (variant, part)


def test_serving() -> None:
    result = committed("serving-cpu")
    summary = serving.summarise(result["repetitions"])
    assert list(summary) == list(result["summary"])
    for name, row in summary.items():
        for key in ("median", "least", "greatest", "met"):
            assert row.get(key) == pytest.approx(result["summary"][name].get(key)), (name, key)


def test_length() -> None:
    result = committed("length-cpu")
    setting = Comparison(**result["setting"])
    table = [line for line in "\n".join(length.paragraphs(setting, result)).splitlines() if line.startswith("| ")]
    before = [line for line in (FOLDER / "length-cpu.md").read_text().splitlines() if line.startswith("| ")]
    assert [cells(line) for line in table] == [cells(line) for line in before]
    assert len(table) == 3 * (1 + len(result["contexts"]))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]
