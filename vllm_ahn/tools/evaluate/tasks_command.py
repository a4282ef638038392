"""``vllm-ahn tasks``: where the evaluation tasks lie, for lm-eval's ``--include_path``."""

from __future__ import annotations

import argparse

from vllm_ahn.tools.evaluate import TASKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds nothing: there is nothing to ask for."""


def run(args: argparse.Namespace) -> int:
    """Prints the folder and returns 0."""
    print(TASKS)
    return 0
