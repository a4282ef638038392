"""Keeps vLLM's own log out of the output of a command."""

import logging
import os


def quiet_vllm() -> None:
    """Have vLLM, not yet imported, log errors only, unless ``VLLM_LOGGING_LEVEL`` is set."""
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        # It looks for Triton, and warns if there is none, before it reads the variable.
        logging.getLogger("vllm").setLevel(logging.ERROR)
