"""Two tensor-parallel processes give the golden tokens: heads, gates, states, and Mamba2's norm over all of them."""

import json
import sys

import pytest

from support.golden_data import CONFIGURATIONS, GENERATED
from support.servers import run

pytestmark = pytest.mark.slow

NAMES = ("gdn_qwen2", "mamba2_qwen2", "dn_qwen3")

# One engine after the other: what takes long is to import vLLM.
PROGRAM = """
import json, pathlib, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.loads(pathlib.Path(sys.argv[1]).read_text())
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    for name, case in job["cases"].items():
        llm = LLM(**job["arguments"], **case["arguments"])
        outputs = llm.generate([{"prompt_token_ids": p} for p in case["prompts"]], params, use_tqdm=False)
        llm.llm_engine.engine_core.shutdown()
        print("RESULT", name, json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """The tokens for every golden prompt of each configuration."""
    folder = tmp_path_factory.mktemp("two-processes")
    program, job_file = folder / "generate.py", folder / "job.json"
    program.write_text(PROGRAM)  # a file, since vLLM's workers import the main module again
    cases = {}
    for golden in map(CONFIGURATIONS.__getitem__, NAMES):
        ahn = {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}
        cases[golden.name] = {
            "prompts": [case.prompt.tolist() for case in golden.cases()],
            "arguments": {"model": str(golden.base), "additional_config": {"ahn": ahn}},
        }
    job = {
        "cases": cases,
        "max_tokens": GENERATED,
        "arguments": {
            "tensor_parallel_size": 2,
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": 32,
            "max_num_batched_tokens": 64,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "kv_cache_memory_bytes": 64 << 20,
        },
    }
    job_file.write_text(json.dumps(job))
    process = run([sys.executable, str(program), str(job_file)], timeout=500)
    assert process.returncode == 0, process.stderr[-4000:]
    # Workers log on the same stream.
    lines = [line.split(maxsplit=2) for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    return {name: json.loads(tokens) for _, name, tokens in lines}


@pytest.mark.parametrize("name", NAMES)
def test_same_tokens_as_one(name: str, results: dict[str, list[list[int]]]) -> None:
    assert results[name] == [case.tokens.tolist() for case in CONFIGURATIONS[name].cases()]
