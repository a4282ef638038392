"""Engines on the GPU path without a GPU: the V2 model runner and all Triton kernels, interpreted on the CPU.

vLLM's CPU platform takes its V2 model runner as soon as it finds a Triton backend named "cpu" in the process, which
``interpreter.install()`` puts there; ``VLLM_AHN_TRITON=1`` then chooses the Triton core of AHN layers. All of it has to
be in place before vLLM is imported, which takes ten seconds. So this file is also a program that imports what an engine
needs and then forks a process of its own for each engine that :func:`run` asks it for. With several workers vLLM starts
their processes, which import this file again as their main module.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

if __name__ in ("__main__", "__mp_main__"):
    from support import interpreter

    interpreter.install_for_fla()

ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_AHN_TRITON": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to call `prepare` in workers
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

TWO_PROCESSES = {
    "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    # For tensor parallelism vLLM compiles a function of its embedding, with a compiler that takes the interpreter's
    # driver for a GPU's.
    "TORCHDYNAMO_DISABLE": "1",
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
    logits: Path | None = None,
    flash_version: int | None = None,
    answers: list[list[int]] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Continue prompts greedily with an interpreted engine in a process of its own.

    Args:
        base: the base model's folder.
        ahn: what a user gives as ``additional_config["ahn"]``.
        prompts: token prompts, all submitted at once.
        max_tokens: tokens to generate for each.
        environment: variables to set beside, or instead of, :data:`ENVIRONMENT`.
        constants: values for constants of modules in ``vllm_ahn.attention``, by "room.module.NAME". Smaller ones let a
            small batch come to what only large ones do otherwise, and the interpreter finish sooner. For an engine in
            one process.
        warm_up: run the kernels' warm-up first, which the interpreter has no need of.
        logits: a file that gets the raw logits, ``[max_tokens, vocab]`` for each prompt.
        flash_version: attend by an emulated FlashAttention of this version, which knows float32 too.
        answers: what `spoilt_drafts` makes drafts of, for each prompt.
        arguments: the engine's.

    Returns:
        ``tokens``, a list for each prompt; ``preemptions``; ``hits``, tokens that were found in the prefix cache;
        ``accepted``, how often so many of `spoilt_drafts`' drafts were accepted, and ``drafted``, how many drafts there
        were of whatever kind; for each worker in ``workers`` what ran in it:
        ``runner``, ``core``, ``layers``, ``state_dtypes``; ``flash_calls``, see ``flash_emulation.calls``.
    """
    job = {
        "base": str(base),
        "ahn": ahn,
        "prompts": prompts,
        "max_tokens": max_tokens,
        "constants": constants or {},
        "warm_up": warm_up,
        "logits": None if logits is None else str(logits),
        "flash_version": flash_version,
        "answers": answers,
        "arguments": arguments if logits is None else {"logprobs_mode": "raw_logits", **arguments},
    }
    return _starter(environment or {}).run(job)


_starters: dict[tuple[tuple[str, str], ...], "_Starter"] = {}


def _starter(environment: dict[str, str]) -> "_Starter":
    """Return the process that starts engines with these variables; there is one at a time, of a gigabyte."""
    key = tuple(environment.items())
    if key not in _starters:
        for other in _starters.values():
            other.end()
        _starters.clear()
        _starters[key] = _Starter(environment)
    return _starters[key]


class _Starter:
    """The program below: a process that forks one for each job, with these variables beside :data:`ENVIRONMENT`."""

    def __init__(self, environment: dict[str, str]) -> None:
        from support.servers import end_with_parent

        self.process = subprocess.Popen(
            [sys.executable, "-m", "support.interpreted_engine"],
            env=os.environ | ENVIRONMENT | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=end_with_parent,
        )

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            self.process.stdin.write(json.dumps({**job, "folder": folder}) + "\n")
            self.process.stdin.flush()
            said = []
            for line in self.process.stdout:
                said.append(line)
                if line == ended(folder):
                    break
            log, result = Path(folder, "log"), Path(folder, "result.json")
            said += [log.read_text()] if log.exists() else []
            assert result.exists(), "".join(said)[-10000:]
            values: dict[str, Any] = json.loads(result.read_text())
            return values

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def ended(folder: str) -> str:
    """Return the line that says that the job of this folder has ended."""
    return f"the job in {folder} has ended\n"


def prepare(worker: Any, warm_up: bool) -> dict[str, Any]:
    """Poison a worker's pages before any request, and return what the worker is."""
    from vllm_ahn.attention.layer import AHNAttention, AHNState
    from vllm_ahn.attention.warm_up import warm_up as warm_up_layer

    layers = worker.vllm_config.compilation_config.static_forward_context
    for layer in layers.values():
        if layer.kv_cache.is_floating_point():
            layer.kv_cache.fill_(float("nan"))
    ours = [layer for layer in layers.values() if isinstance(layer, AHNAttention)]
    if warm_up:
        warm_up_layer(ours[0])
    runner = type(worker.model_runner)
    states = [layer for layer in layers.values() if isinstance(layer, AHNState)]
    return {
        "runner": f"{runner.__module__}.{runner.__qualname__}",
        "core": type(ours[0].core).__name__ if ours else None,
        "layers": [layer.layer_name for layer in ours],
        "state_dtypes": sorted({str(layer.pages.columns.dtype) for layer in states if layer.pages is not None}),
    }


def main() -> None:
    """Fork a process for each job on standard input, a line each, and say when it has ended."""
    import support.engines  # noqa: F401  and with it vLLM

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        os.waitpid(pid, 0)
        sys.stdout.write(ended(job["folder"]))
        sys.stdout.flush()


def child(job: dict[str, Any]) -> NoReturn:
    """Do a job, with what is printed and its result in files of the job's folder, and leave."""
    from support.servers import end_with_parent

    end_with_parent()
    log = os.open(Path(job["folder"], "log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        result = json.dumps(do(job))
        Path(job["folder"], "result.json").write_text(result)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job's engine."""
    import torch

    from support import flash_emulation, spoilt_drafts
    from support.engines import engine, greedy, metric
    from vllm_ahn.plugin import limits

    for name, value in job["constants"].items():
        module, constant = name.rsplit(".", 1)
        owner = importlib.import_module(f"vllm_ahn.attention.{module}")
        assert hasattr(owner, constant)
        setattr(owner, constant, value)
    if job["flash_version"]:
        flash_emulation.install(job["flash_version"])
        limits.has_flash_attention = lambda: True
        limits.FLASH_DTYPES += ("float32",)
        job["arguments"]["attention_backend"] = "FLASH_ATTN"
    if job["answers"]:
        spoilt_drafts.expect(zip(job["prompts"], job["answers"], strict=True))
    with engine(job["base"], job["ahn"], **job["arguments"]) as llm:
        workers = llm.collective_rpc(prepare, args=(job["warm_up"],))
        results = greedy(llm, job["prompts"], job["max_tokens"], logprobs=-1 if job["logits"] else None)
        preemptions, hits = metric(llm, "vllm:num_preemptions"), metric(llm, "vllm:prefix_cache_hits")
        drafted = metric(llm, "vllm:spec_decode_num_draft_tokens") if "speculative_config" in job["arguments"] else 0
    if job["logits"]:
        torch.save([logits for _, logits in results], job["logits"])
    return {
        "tokens": [tokens for tokens, _ in results],
        "preemptions": preemptions,
        "hits": hits,
        "accepted": dict(spoilt_drafts.accepted),
        "drafted": drafted,
        "workers": workers,
        "flash_calls": flash_emulation.calls,
    }


if __name__ == "__main__":
    main()
