"""Arguments that several commands take."""

from __future__ import annotations

import argparse

from vllm_ahn.config import STATE_DTYPES


def add_state_dtype(parser: argparse._ActionsContainer) -> None:
    """Add ``state_dtype``, one of `STATE_DTYPES`, under the name and with the values that ``vllm serve`` gives it."""
    parser.add_argument(
        "--mamba-ssm-cache-dtype",
        dest="state_dtype",
        type=lambda value: STATE_DTYPES[0] if value == "auto" else value,
        choices=STATE_DTYPES,
        default=STATE_DTYPES[0],
        help="dtype of the memory's state, as in vllm serve (default: %(default)s)",
    )
