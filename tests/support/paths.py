"""Where things lie in the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
GOLDEN = TESTS / "golden"
"""Outputs of the published implementation."""
BENCHMARKS = ROOT / "benchmarks"
EXAMPLES = ROOT / "examples"
