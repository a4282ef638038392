"""``examples/demo.py`` from start to end: what it prints, and that nothing is left of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import psutil
import pytest

from support.paths import EXAMPLES
from support.servers import environment, run

DEMO = EXAMPLES / "demo.py"


def row(printed: str, name: str) -> list[int]:
    """The numbers of a row of the demo's table."""
    match = re.search(rf"^{name}((?: +[0-9,]+)+)$", printed, re.MULTILINE)
    assert match is not None, printed
    return [int(number.replace(",", "")) for number in match[1].split()]


@pytest.mark.slow
@pytest.mark.server
def test_demo(tmp_path: Path) -> None:
    result = run([sys.executable, str(DEMO)], env=environment(tmp_path / "cache"), timeout=240)
    printed = result.stdout
    assert result.returncode == 0, printed + result.stderr
    assert "\nserver stopped" in printed

    prompt = re.search(r"prompt: (\d+) bytes = ([\d.]+) windows of (\d+)", printed)
    assert prompt is not None, printed
    tokens, window = int(prompt[1]), int(prompt[3])
    assert tokens / window >= 8 and float(prompt[2]) == round(tokens / window, 1)
    answer = re.search(r"^(\d+) tokens after (\d+);", printed, re.MULTILINE)
    assert answer is not None, printed
    assert int(answer[2]) == tokens
    length = tokens + int(answer[1])

    seen = re.search(r"read (\d+) times: (\d+) to (\d+) of its (\d+) blocks of (\d+) tokens", printed)
    assert seen is not None, printed
    times, fewest, most, pool, size = map(int, seen.groups())
    assert times > 0
    blocks, block_bytes, held_bytes = row(printed, "AHN, measured")
    full_blocks, full_block_bytes, full_bytes = row(printed, "full attention, computed")
    # The small model: 4 layers, 2 key/value heads of 64, float32, and two gates for each of their 2 query heads beside.
    assert full_block_bytes == 4 * 2 * size * (64 + 64) * 4
    assert block_bytes == 4 * 2 * size * (64 + 64 + 2 * 2) * 4
    assert full_blocks == -(-length // size) and full_bytes == full_blocks * full_block_bytes
    assert pool == (64 << 20) // block_bytes
    assert held_bytes == blocks * block_bytes and blocks == most
    # Window 4 and the block behind it. A state has 4 heads * (64 columns and 16 kept updates) at 66 a page: 5, in each
    # of two slots.
    assert fewest >= window // size + 2 * 5
    assert most <= window // size + 1 + 2 * 5 + 1

    # The last table: bits per byte are the fourth to sixth figures, of them the last beyond the window.
    bits = [float(line.split("|")[7]) for line in printed.splitlines() if re.match(r"\| (full|window|sinks|AHN)", line)]
    full, without, memory = bits
    assert full < memory < without

    url = re.search(r"--port (\d+)", printed)
    assert url is not None
    left = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if url[1] in (p.info["cmdline"] or [])]
    assert not left, left
