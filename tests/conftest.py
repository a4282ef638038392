"""Settings that must be in place before vLLM is imported, for engines that run inside the test process; fixtures."""

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from support.paths import TESTS

os.environ.update(
    # For programs of `support` that tests start.
    PYTHONPATH=os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH")))),
    # The engine in this process, with this process's threads: it starts in about a second.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # the models are tiny; threads would only wait for each other
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that have slow tests, so that no worker waits long for another's last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def needles(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """lm-eval's own generator of RULER's samples, without downloads: one short sample instead of 500 long ones.

    Yields the lengths that it is asked for.
    """
    import nltk

    monkeypatch.setattr(nltk, "download", lambda name: True)
    from lm_eval.tasks.ruler import prepare_niah

    asked: list[int] = []
    generate, haystack = prepare_niah.generate_samples, prepare_niah.get_haystack

    def one_sample(hay: Any, *, max_seq_length: int, **rest: Any) -> list[dict[str, Any]]:
        asked.append(max_seq_length)
        samples = generate(hay, **rest | {"max_seq_length": 1500, "num_samples": 1})
        return [sample | {"max_length": max_seq_length} for sample in samples]

    def essays(type_haystack: str) -> Any:
        return ["The", "bell", "is", "late."] * 400 if type_haystack == "essay" else haystack(type_haystack)

    monkeypatch.setattr(prepare_niah, "generate_samples", one_sample)
    monkeypatch.setattr(prepare_niah, "get_haystack", essays)
    monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    # lm-eval executes the file behind a task's function once and keeps the module: not the one patched here.
    name = "lm_eval.tasks.ruler.niah_utils"
    sys.modules.pop(name, None)
    yield asked
    sys.modules.pop(name, None)
