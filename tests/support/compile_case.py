"""One golden configuration through a compiled engine, in a process of its own.

    python -m support.compile_case NAME RESULT.json

RESULT.json gets, for every golden prompt, the tokens of the engine, once all prompts at once and once in
chunks of 64 tokens at most, and how vLLM compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import conftest  # noqa: F401  what must be set before vLLM is imported
from support.engines import engine, greedy
from support.golden_data import CONFIGURATIONS, GENERATED


def main(name: str, result: Path) -> None:
    golden = CONFIGURATIONS[name]
    setting = {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}
    prompts = [case.prompt for case in golden.cases()]
    with engine(golden.base, setting, enforce_eager=False, max_num_batched_tokens=64) as llm:
        together = [tokens for tokens, _ in greedy(llm, prompts, GENERATED)]
        alone = [greedy(llm, [prompt], GENERATED)[0][0] for prompt in prompts]
        compilation = llm.llm_engine.vllm_config.compilation_config
        mode, backend = compilation.mode, compilation.backend
    values = {"together": together, "alone": alone, "mode": int(mode), "backend": backend}
    result.write_text(json.dumps(values))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
