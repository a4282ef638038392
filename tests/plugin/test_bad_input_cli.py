"""Every bad input through the real ``vllm serve``: one sentence, exit code 1, and nothing started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_ahn.tools.tiny import make_tiny

Tensors = dict[str, torch.Tensor]
LAYER = "model.layers.1.ahn.fn"
pytestmark = pytest.mark.slow

OTHER_COMMANDS = ("bench", "run-batch")
TIMEOUT = 60  # seconds a refused server may take to end


def copy_checkpoint(
    source: Path, target: Path, *, tensors: Callable[[Tensors], object] | None = None, **config: Any
) -> Path:
    """A copy with its tensors changed in place by `tensors` and keys of its config replaced (None: gone)."""
    target.mkdir(parents=True)
    values = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    weights = load_file(source / "model.safetensors")
    if tensors is not None:
        tensors(weights)
    save_file(weights, target / "model.safetensors")
    return target


def put(name: str, value: float) -> Callable[[Tensors], None]:
    def change(weights: Tensors) -> None:
        weights[f"{LAYER}.{name}"].view(-1)[-1] = value

    return change


def damaged(source: Path, target: Path, damage: Callable[[bytes], bytes]) -> Path:
    copy_checkpoint(source, target)
    file = target / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    return target


def bad_inputs(tmp: Path) -> dict[str, tuple[list[str], str]]:
    """Name of a case -> (arguments of ``vllm serve``, or of another command with its name, and a pattern that the
    sentence must match)."""
    good = make_tiny(tmp / "tiny")
    merged = make_tiny(tmp / "tiny", merged=True).base
    assert good.ahn is not None
    base, ahn = good.base, good.ahn

    def other(name: str, **size: Any) -> str:
        paths = make_tiny(tmp / name, **size)
        return str(paths.ahn)

    def changed(name: str, tensors: Callable[[Tensors], object] | None = None, **config: Any) -> str:
        return str(copy_checkpoint(ahn, tmp / name, tensors=tensors, **config))

    def changed_base(name: str, **config: Any) -> str:
        return str(copy_checkpoint(base, tmp / name, **config))

    empty = tmp / "empty"
    empty.mkdir()
    no_weights = tmp / "no_weights"
    no_weights.mkdir()
    (no_weights / "config.json").write_bytes((ahn / "config.json").read_bytes())
    no_config = tmp / "no_config"
    no_config.mkdir()
    (no_config / "model.safetensors").write_bytes((ahn / "model.safetensors").read_bytes())
    nonsense = damaged(ahn, tmp / "nonsense", lambda data: b"\xff" * len(data))
    (damaged(ahn, tmp / "bad_json", lambda data: data) / "config.json").write_text("{")

    cases: dict[str, tuple[list[str], str]] = {
        # the checkpoint
        "no such path": ([str(base), "--ahn", str(tmp / "nowhere")], "nowhere.*no such folder"),
        "no such repository": ([str(base), "--ahn", "vllm-ahn-tests/nobody"], "vllm-ahn-tests/nobody"),
        "no such revision": ([str(base), "--ahn", "vllm-ahn-tests/nobody@v1"], "vllm-ahn-tests/nobody@v1"),
        "empty folder": ([str(base), "--ahn", str(empty)], "empty.*config.json"),
        "no config": ([str(base), "--ahn", str(no_config)], "no_config.*config.json"),
        "no weights": ([str(base), "--ahn", str(no_weights)], "no_weights.*safetensors"),
        "config is not JSON": ([str(base), "--ahn", str(tmp / "bad_json")], "bad_json.*config.json"),
        "truncated": (
            [str(base), "--ahn", str(damaged(ahn, tmp / "cut", lambda data: data[:-100]))],
            "cut.*model.safetensors",
        ),
        "corrupt header": ([str(base), "--ahn", str(nonsense)], "nonsense.*model.safetensors"),
        "unknown memory": (
            [str(base), "--ahn", changed("unknown", _ahn_implementation="Hyena")],
            "_ahn_implementation.*Hyena.*GatedDeltaNet",
        ),
        "no memory": (
            [str(base), "--ahn", changed("no_memory", _ahn_implementation=None)],
            "_ahn_implementation",
        ),
        # made for another base
        "other hidden size": (
            [str(base), "--ahn", other("hidden", hidden=256, heads=8, kv_heads=4)],
            "hidden_size",
        ),
        "other heads": (
            [str(base), "--ahn", other("heads", hidden=128, heads=8, kv_heads=2)],
            "num_attention_heads",
        ),
        "other head size": (
            [make_tiny(tmp / "q3", model_type="qwen3").base.as_posix(), "--ahn",
             other("head", model_type="qwen3", head_dim=32)],
            "head_dim",
        ),
        "other layers": ([str(base), "--ahn", other("layers", layers=2)], "num_hidden_layers"),
        "other model type": (
            [str(base), "--ahn", other("type", model_type="qwen3", head_dim=32)],
            "model_type",
        ),
        # its tensors
        "missing tensor": (
            [str(base), "--ahn", changed("missing", lambda w: w.pop(f"{LAYER}.a_proj.weight"))],
            f"{LAYER}.a_proj.weight is missing",
        ),
        "surplus tensor": (
            [str(base), "--ahn", changed("surplus", lambda w: w.update({f"{LAYER}.extra": torch.zeros(1)}))],
            f"{LAYER}.extra",
        ),
        "wrong shape": (
            [str(base), "--ahn", changed("shape", lambda w: w.update({f"{LAYER}.A_log": torch.zeros(5)}))],
            rf"{LAYER}.A_log.*5.*4",
        ),
        "NaN": ([str(base), "--ahn", changed("nan", put("dt_bias", float("nan")))], f"{LAYER}.dt_bias.*NaN"),
        "inf": (
            [str(base), "--ahn", changed("inf", put("o_proj.weight", float("inf")))],
            f"{LAYER}.o_proj.weight.*inf",
        ),
        # the lengths
        "negative window": ([str(base), "--ahn", str(ahn), "--ahn-window", "-5"], "--ahn-window.*-5"),
        "zero window": ([str(base), "--ahn", str(ahn), "--ahn-window=0"], "--ahn-window.* 0"),
        "window is no number": ([str(base), "--ahn", str(ahn), "--ahn-window", "wide"], "--ahn-window.*wide"),
        "negative sinks": ([str(base), "--ahn", str(ahn), "--ahn-sinks=-1"], "--ahn-sinks.*-1"),
        "sinks are no number": ([str(base), "--ahn", str(ahn), "--ahn-sinks", "1.5"], "--ahn-sinks.*1.5"),
        "window without AHN": ([str(base), "--ahn-window", "24"], "--ahn-window without --ahn"),
        "sinks without AHN": ([str(base), "--ahn-sinks", "8"], "--ahn-sinks without --ahn"),
        "given twice": (
            [str(base), "--ahn", str(ahn), "--additional-config", json.dumps({"ahn": str(ahn)})],
            "give only one",
        ),
        "misspelt key": ([str(base), "--additional-config", json.dumps({"AHN": str(ahn)})], "'AHN'.*\"ahn\""),
        "unknown key": (
            [str(base), "--additional-config", json.dumps({"ahn": {"checkpoint": str(ahn), "windows": 3}})],
            "windows",
        ),
        # the base
        "no such base": ([str(tmp / "nobase"), "--ahn", str(ahn)], "nobase"),
        "base architecture": (
            [changed_base("llama", architectures=["LlamaForCausalLM"], model_type="llama"),
             "--ahn", str(ahn)],
            "LlamaForCausalLM.*Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        "base with a sliding window": (
            [changed_base("sliding", use_sliding_window=True, sliding_window=64, max_window_layers=0),
             "--ahn", str(ahn)],
            "use_sliding_window",
        ),
        "merged and a checkpoint": ([str(merged), "--ahn", str(ahn)], "merged.*--ahn"),
        "merged, NaN": (
            [str(copy_checkpoint(merged, tmp / "merged_nan", tensors=put("A_log", float("nan"))))],
            f"{LAYER}.A_log.*NaN",
        ),
        "merged, zero window": ([str(merged), "--ahn-window", "0"], "--ahn-window.* 0"),
    }  # fmt: skip
    # The other commands that make an engine, which hand on the arguments in ways of their own.
    nowhere = ["--model", str(base), "--ahn", str(tmp / "nowhere")]
    batch = ["-i", str(tmp / "in"), "-o", str(tmp / "out")]
    cases |= {
        "bench latency": (["bench", "latency", *nowhere], "nowhere.*no such folder"),
        "run-batch": (["run-batch", *batch, *nowhere], "nowhere.*no such folder"),
    }
    served = [str(base), "--ahn", str(ahn), "--ahn-window", "24", "--ahn-sinks", "8"]
    features = {
        "load format": (["--load-format", "sharded_state"], "load format.*sharded_state"),
        "speculation": (
            ["--speculative-config", json.dumps({"method": "eagle", "model": str(base), "num_speculative_tokens": 2})],
            "drafts of method 'eagle'",
        ),
        "decode context parallelism": (["--decode-context-parallel-size", "2"], "decode context parallelism"),
        "prefill context parallelism": (
            ["--prefill-context-parallel-size", "2"],
            "prefill context parallelism",
        ),
        "KV connector": (
            ["--kv-transfer-config", json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})],
            "KV connectors.*ExampleConnector",
        ),
        "KV offloading": (["--kv-offloading-size", "1"], "KV offloading"),
        "quantised cache": (["--kv-cache-dtype", "fp8"], "quantised KV cache.*fp8"),
        "cache of another dtype": (
            ["--dtype", "float32", "--kv-cache-dtype", "bfloat16"],
            "KV cache of another dtype",
        ),
        "block size": (["--block-size", "8"], "blocks of 8 tokens"),
        "no hybrid manager": (["--disable-hybrid-kv-cache-manager"], "hybrid KV cache manager"),
        "microbatches": (["--enable-dbo"], "microbatching"),
        "shared KV": (["--kv-sharing-fast-prefill"], "KV sharing"),
        "Transformers' model": (["--model-impl", "transformers"], "--model-impl.*transformers"),
        "pooling": (["--runner", "pooling"], "text generation only"),
    }
    for name, (flags, pattern) in features.items():
        cases[name] = ([*served, *flags], pattern)
    return cases


NAMES = [
    "no such path", "no such repository", "no such revision", "empty folder", "no config", "no weights",
    "config is not JSON", "truncated", "corrupt header", "unknown memory", "no memory", "other hidden size",
    "other heads", "other head size", "other layers", "other model type", "missing tensor", "surplus tensor",
    "wrong shape", "NaN", "inf", "negative window", "zero window", "window is no number", "negative sinks",
    "sinks are no number", "window without AHN", "sinks without AHN", "given twice", "misspelt key",
    "unknown key", "no such base", "base architecture", "base with a sliding window",
    "merged and a checkpoint", "merged, NaN",
    "merged, zero window", "load format", "speculation", "decode context parallelism",
    "prefill context parallelism",
    "KV connector", "KV offloading", "quantised cache", "cache of another dtype", "block size",
    "no hybrid manager",
    "microbatches", "shared KV", "Transformers' model", "pooling", "bench latency", "run-batch",
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """What the real command line did with every case, and the pattern to find in it."""
    tmp = tmp_path_factory.mktemp("bad_input")
    cases = bad_inputs(tmp)
    argv = [
        arguments if arguments[0] in OTHER_COMMANDS else ["serve", *arguments, "--port", "0"]
        for arguments, _ in cases.values()
    ]
    (tmp / "cases.json").write_text(json.dumps(argv))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("VLLM_PLUGINS", None)
    subprocess.run(
        [sys.executable, "-m", "support.serve_driver", tmp / "cases.json", tmp / "results.json"],
        env=environment, check=True, capture_output=True, timeout=TIMEOUT * len(cases),
    )  # fmt: skip
    results = json.loads((tmp / "results.json").read_text())
    return {name: (result, pattern) for (name, (_, pattern)), result in zip(cases.items(), results, strict=True)}


def test_every_case_is_tested(answers: dict[str, Any]) -> None:
    assert sorted(answers) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_sentence_and_nothing_started(name: str, answers: dict[str, tuple[dict[str, Any], str]]) -> None:
    result, pattern = answers[name]
    assert result["code"] not in (0, None), result
    assert "Traceback" not in result["err"] + result["out"], result["err"]
    lines = [line for line in result["err"].splitlines() if line.strip()]
    assert len(lines) == 1, result["err"]
    assert re.match("error: .*" + pattern, lines[0]), f"{pattern!r} is not in {lines[0]!r}"
    assert result["started"] == []


def test_a_real_start_of_the_command() -> None:
    """Once without the driver: the installed ``vllm``, the interpreter's own exit code and messages."""
    script = Path(sys.executable).with_name("vllm")
    done = subprocess.run(
        [script, "serve", "/nowhere/base", "--ahn", "/nowhere/ahn"],
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: /nowhere/base: ")
