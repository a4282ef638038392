"""Runs one row with one engine in a process of its own.

The process sends events through a pipe, dicts with the keys::

    tasks           answers to come, by task
    answer, kept    the task of an answer that is there, and whether it was kept from an earlier run
    result          the last one: what was measured
    error           or why it was not, one sentence
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from vllm_ahn.errors import AHNError, first_line
from vllm_ahn.tools.evaluate.answers import Answers
from vllm_ahn.tools.evaluate.packages import require
from vllm_ahn.tools.evaluate.plan import Row, versions

MAX_ERROR = 400
"""Characters of an error's sentence."""


def main(row: Row, answers: Path, log: Path, events: Connection) -> None:
    """Run `row`: the target of the process. What vLLM and lm-eval print goes to `log`."""
    os.setsid()  # a process group for the engine's processes too, so that all can be ended
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with log.open("wb") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    # The engine runs in this process: its errors are the worker's, and its scheduler can be read.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    if row.setting.data is not None:
        # lm-eval's RULER tasks name the data set of their essays, and a folder of that name is read if there is one.
        os.environ["NLTK_DATA"] = f"{row.setting.data}/nltk_data"
        os.chdir(row.setting.data)
    try:
        events.send({"result": run(row, answers, lambda **event: events.send(event))})
    except Exception as error:
        traceback.print_exc()
        events.send({"error": sentence(error)})


def run(row: Row, path: Path, send: Callable[..., None]) -> dict[str, Any]:
    """Return what the report needs: ``scores`` or ``perplexity``, and when, how long and on what it was measured.

    Args:
        path: the file of `Answers`.
        send: takes events as keyword arguments.
    """
    started = time.monotonic()
    device = _device_name()
    answers = Answers(path, {**row.identity, "device": device})
    if row.setting.suite.kind == "lm_eval":
        require("lm_eval", "eval")
        from vllm_ahn.tools.evaluate import lm_eval_run

        measured = lm_eval_run.evaluate(row, answers, send)
    else:
        from vllm_ahn.tools.evaluate import perplexity

        measured = {"perplexity": perplexity.measure(row, answers, send)}
    return {
        **measured,
        "device": device,
        "versions": versions(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }


def sentence(error: BaseException) -> str:
    """Return an error's first line, with its class unless it is an `AHNError`."""
    first = " ".join(first_line(error).split())
    if len(first) > MAX_ERROR:
        first = f"{first[:MAX_ERROR]} ..."
    name = type(error).__name__
    return first if isinstance(error, AHNError) or first == name else f"{name}: {first}"


def _device_name() -> str:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from cpuinfo import get_cpu_info

        return str(get_cpu_info().get("brand_raw", "unknown processor"))
    return str(current_platform.get_device_name())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
