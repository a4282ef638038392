"""One engine on the GPU path without a GPU: the V2 model runner and all Triton kernels, interpreted on the CPU.

vLLM's CPU platform takes its V2 model runner as soon as it finds a Triton backend named "cpu" in the process, which
``interpreter.install()`` puts there; ``VLLM_AHN_TRITON=1`` then chooses the Triton core of AHN layers. All of it has to
be in place before vLLM is imported, so every engine has a process of its own: :func:`run` starts one.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_AHN_TRITON": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def run(
    base: Path,
    ahn: dict[str, Any] | None,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    environment: dict[str, str] | None = None,
    constants: dict[str, int] | None = None,
    warm_up: bool = False,
    flash_version: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Greedy continuations from an interpreted engine in a process of its own.

    Args:
        base: the base model's folder.
        ahn: what a user gives as ``additional_config["ahn"]``.
        prompts: token prompts, all submitted at once.
        max_tokens: tokens to generate for each.
        environment: variables to set beside, or instead of, :data:`ENVIRONMENT`.
        constants: values for constants of modules in ``vllm_ahn.attention.gpu``, by "module.NAME". Smaller ones let a
            small batch come to what only large ones do otherwise, and the interpreter finish sooner.
        warm_up: run the kernels' warm-up first, which the interpreter has no need of.
        flash_version: attend by an emulated FlashAttention of this version, which knows float32 too.
        arguments: the engine's.

    Returns:
        ``tokens``, a list for each prompt; ``preemptions``; ``vllm``, ``runner`` and ``core``, what ran;
        ``flash_calls``, see ``flash_emulation.calls``.
    """
    job = {
        "base": str(base),
        "ahn": ahn,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "constants": constants or {},
        "warm_up": warm_up,
        "flash_version": flash_version,
        "arguments": arguments,
    }
    process = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | ENVIRONMENT | (environment or {}),
        input=json.dumps(job),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-5000:]
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Do the job on standard input; the last line of standard output is the result."""
    import interpreter

    interpreter.install_for_fla()

    import vllm

    import flash_emulation
    from engines import engine, greedy, metric, worker_layers
    from vllm_ahn.attention import core
    from vllm_ahn.attention.gpu import warm_up
    from vllm_ahn.attention.layer import AHNAttention
    from vllm_ahn.plugin import attention_backends, features

    job = json.load(sys.stdin)
    for name, value in job["constants"].items():
        module, constant = name.split(".")
        owner = importlib.import_module(f"vllm_ahn.attention.gpu.{module}")
        assert hasattr(owner, constant)
        setattr(owner, constant, value)
    if job["flash_version"]:
        flash_emulation.install(job["flash_version"])
        features._has_flash_attention = lambda: True
        attention_backends.FLASH_DTYPES += ("float32",)
        job["arguments"]["attention_backend"] = "FLASH_ATTN"
    with engine(job["base"], job["ahn"], **job["arguments"]) as llm:
        for layer in worker_layers(llm).values():
            if layer.kv_cache.is_floating_point():
                layer.kv_cache.fill_(float("nan"))
        if job["warm_up"]:
            warm_up.warm_up(next(layer for layer in worker_layers(llm).values() if isinstance(layer, AHNAttention)))
        results = greedy(llm, job["prompts"], job["max_tokens"])
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        runner = type(worker.model_runner)
        result = {
            "tokens": [tokens for tokens, _ in results],
            "preemptions": metric(llm, "vllm:num_preemptions"),
            "vllm": vllm.__version__,
            "runner": f"{runner.__module__}.{runner.__qualname__}",
            "flash_calls": flash_emulation.calls,
            "core": core.core().__name__ if job["ahn"] else None,
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
