"""vLLM's default compilation gives the golden tokens.

Each engine has a process of its own: a second one in a process that has compiled may not start.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.golden_data import CONFIGURATIONS
from support.servers import environment, run

pytestmark = pytest.mark.slow

NAMES = ("gdn_qwen2", "mamba2_qwen2", "dn_qwen3")
"""Every memory and both families. Without sinks nothing else is compiled: they are the attention operation's affair."""

DYNAMO_TRACE_ONCE = 2
"""``CompilationMode`` that vLLM's CPU platform compiles with by default; 0 is none."""


def compiled(name: str, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    result = folder / "result.json"
    env = environment(folder / "cache", VLLM_LOGGING_LEVEL="WARNING")
    process = run([sys.executable, "-m", "support.compile_case", name, str(result)], env=env, timeout=400)
    assert process.returncode == 0, process.stderr[-4000:]
    written = [path for path in (folder / "cache").rglob("*") if path.is_file()]
    return {**json.loads(result.read_text()), "cached_files": len(written)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[dict[str, Any]]]]:
    """Run all configurations, two at a time."""
    folder = tmp_path_factory.mktemp("compile")
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(compiled, name, folder / name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_golden_tokens(name: str, results: dict[str, Future[dict[str, Any]]]) -> None:
    result = results[name].result()
    expected = [case.tokens.tolist() for case in CONFIGURATIONS[name].cases()]
    assert result["together"] == expected
    assert result["alone"] == expected
    assert result["mode"] == DYNAMO_TRACE_ONCE and result["backend"] == "inductor"
    assert result["cached_files"] > 0, "nothing was compiled"
