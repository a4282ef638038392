"""Two tensor-parallel processes give the golden tokens: heads, gates, states, and Mamba2's norm over all of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.golden_data import CONFIGURATIONS, GENERATED

PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    llm = LLM(**job["arguments"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], params, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


@pytest.mark.parametrize("name", ["gdn_qwen2", "mamba2_qwen2", "dn_qwen3"])
def test_same_tokens_as_one(name: str, tmp_path: Path) -> None:
    golden = CONFIGURATIONS[name]
    program = tmp_path / "generate.py"  # a file, since vLLM's workers import the main module again
    program.write_text(PROGRAM)
    job = {
        "prompts": [case.prompt.tolist() for case in golden.cases()],
        "max_tokens": GENERATED,
        "arguments": {
            "model": str(golden.base),
            "additional_config": {
                "ahn": {"checkpoint": str(golden.ahn), "window": golden.window, "sinks": golden.sinks}
            },
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
    result = subprocess.run(
        [sys.executable, str(program), json.dumps(job)], capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    # Workers that are slow to end are logged after it, on the same stream.
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("[[")]
    tokens = json.loads(line)
    assert tokens == [case.tokens.tolist() for case in golden.cases()]
