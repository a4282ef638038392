"""AHN on quantised bases: as the base itself inside the window, as the weights' worth past it, and never quantised."""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm import EngineArgs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from support.engines import engine, greedy
from support.quantised_base import FORMATS, FP8_MAX, quantise
from vllm_ahn import AHNError
from vllm_ahn.reference import ReferenceModel, from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

WINDOW, SINKS = 40, 9
INSIDE, BEYOND = (5, 41), (49, 60, 150)
MAX_TOKENS = 8
PROMPTS = [torch.randint(500, (n,), generator=torch.Generator().manual_seed(n)) for n in (*INSIDE, *BEYOND)]


def int8_rows(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    scale = args[0].abs().amax(-1, keepdim=True) / 127
    return ((args[0] / scale).round() * scale,)


def fp8_rows(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    scale = args[0].abs().amax(-1, keepdim=True) / FP8_MAX
    return ((args[0] / scale).to(torch.float8_e4m3fn).float() * scale,)


# Logits are of size 1.7. Four-bit weights leave no more than the dtype's own rounding. Where activations are quantised
# too the reference quantises them likewise; it is exact to 1e-5 until a value lies so near the middle between two steps
# that the last bit decides, which moves the logits by up to 0.3.
RUN: dict[str, tuple[str, float, Callable[..., Any] | None]] = {
    "w4a16": ("float16", 0.03, None),
    "gptq": ("float16", 0.03, None),
    "awq": ("bfloat16", 0.3, None),
    "w8a8-int8": ("float32", 0.4, int8_rows),
    "w8a8-fp8": ("float32", 0.4, fp8_rows),
}
"""What vLLM runs on a CPU without AMX: format -> model dtype, tolerance, what activations go through."""

# Plain bases fail there likewise: four-bit and block-wise kernels are not built for AVX2, and its eight-bit products
# saturate, which puts logits off by more than the tolerance.
needs_avx512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM computes this format right on CPUs with AVX-512 only"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    # Block-wise float8 wants every layer's sides to be multiples of 128.
    return make_tiny(tmp_path_factory.mktemp("tiny"), hidden=256, seed=3)


def ahn_setting(paths: TinyPaths) -> dict[str, Any]:
    return {"checkpoint": str(paths.ahn), "window": WINDOW, "sinks": SINKS}


def worker_model(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


def check_unquantised_ahn(model: nn.Module, dtype: torch.dtype) -> None:
    """Dtypes of all AHN parameters, and that the base's linear layers alone are quantised."""
    parameters = {name: p.dtype for name, p in model.named_parameters() if ".ahn." in name}
    assert len(parameters) == 15
    for name, found in parameters.items():
        assert found == (torch.float32 if name.endswith(("A_log", "dt_bias")) else dtype), name
    quantised = set()
    for name, module in model.named_modules():
        if ".ahn" in name:
            assert not isinstance(module, LinearBase), name
            assert isinstance(getattr(module, "quant_method", UnquantizedLinearMethod()), UnquantizedLinearMethod), name
        elif isinstance(module, LinearBase) and not isinstance(module.quant_method, UnquantizedLinearMethod):
            quantised.add(name)
    assert len(quantised) == 12


def check_past_the_window(
    results: list[tuple[list[int], torch.Tensor | None]],
    reference: ReferenceModel,
    tolerance: float,
    activations: Callable[..., Any] | None,
) -> None:
    for name, module in reference.named_modules():
        if activations is not None and isinstance(module, nn.Linear) and (".self_attn." in name or ".mlp." in name):
            module.register_forward_pre_hook(activations)
    errors = []
    for prompt, (tokens, logits) in zip(PROMPTS, results, strict=True):
        sequence = torch.cat((prompt, torch.tensor(tokens[:-1])))[None]
        with torch.no_grad():
            expected = reference(sequence, last=MAX_TOKENS)[0]
        assert logits is not None
        errors.append((logits - expected).abs().max().item())
    assert max(errors) <= tolerance, errors
    if activations is not None:
        assert min(errors) <= 1e-4, errors


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "w8a8-fp8" else needs_avx512) for name in RUN])
def test_engine(name: str, tiny: TinyPaths, tmp_path: pathlib.Path) -> None:
    dtype, tolerance, activations = RUN[name]
    worth = quantise(tiny.base, tmp_path / "quantised", name)
    arguments = {"dtype": dtype, "logprobs_mode": "raw_logits", "max_num_batched_tokens": 100, "max_num_seqs": 8}
    with engine(tmp_path / "quantised", **arguments) as llm:
        base_results = greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1)
    with engine(tmp_path / "quantised", ahn_setting(tiny), **arguments) as llm:
        model = worker_model(llm)
        check_unquantised_ahn(model, getattr(torch, dtype))
        seen = set()
        for layer in model.model.layers:
            layer.ahn.fn.in_proj.register_forward_pre_hook(lambda _, args: seen.add(args[0].dtype))
        results = greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1)
    assert seen == {getattr(torch, dtype)}
    for (tokens, logits), (base_tokens, base_logits) in zip(results[: len(INSIDE)], base_results, strict=False):
        assert tokens == base_tokens
        assert logits is not None and base_logits is not None
        assert torch.equal(logits, base_logits)
    check_past_the_window(results, from_folders(worth, tiny.ahn, WINDOW, SINKS), tolerance, activations)
    # The comparison can fail: neither full attention nor the base as it was before comes near.
    for other in (from_folders(worth), from_folders(tiny.base, tiny.ahn, WINDOW, SINKS)):
        with pytest.raises(AssertionError):
            check_past_the_window(results, other, tolerance, activations)


@needs_avx512
def test_quantised_while_loading(tiny: TinyPaths, tmp_path: pathlib.Path) -> None:
    """vLLM's own quantisation of a plain base, ``--quantization fp8_per_channel``."""
    worth = quantise(tiny.base, tmp_path / "quantised", "w8a8-fp8")
    arguments = {"quantization": "fp8_per_channel", "logprobs_mode": "raw_logits", "max_num_seqs": 8}
    with engine(tiny.base, ahn_setting(tiny), dtype="bfloat16", **arguments) as llm:
        check_unquantised_ahn(worker_model(llm), torch.bfloat16)
        results = greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1)
    check_past_the_window(results, from_folders(worth, tiny.ahn, WINDOW, SINKS), 0.5, None)


@needs_avx512
@pytest.mark.parametrize(
    ("name", "config"),
    [("awq", {}), ("w4a16", {"ignore": ["lm_head", "re:.*ahn.*", "model.layers.1.ahn.fn.o_proj"]})],
)
def test_merged(name: str, config: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """The AHN's tensors lie unquantised among the base's, whether the configuration says so or leaves it open."""
    merged = make_tiny(tmp_path, hidden=256, seed=3, merged=True).base
    worth = quantise(merged, tmp_path / "quantised", name, **config)
    ahn = {"window": WINDOW, "sinks": SINKS}
    with engine(tmp_path / "quantised", ahn, dtype="float16", logprobs_mode="raw_logits", max_num_seqs=8) as llm:
        check_unquantised_ahn(worker_model(llm), torch.float16)
        results = greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1)
    check_past_the_window(results, from_folders(worth, None, WINDOW, SINKS), 0.03, None)


@pytest.fixture
def quantised_cache(tiny: TinyPaths, tmp_path: pathlib.Path) -> pathlib.Path:
    """A base that asks for a quantised KV cache, and has the scales for it."""
    folder = tmp_path / "quantised"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    quantise(tiny.base, folder, "w4a16", kv_cache_scheme=scheme)
    scales = {f"model.layers.{i}.self_attn.{kind}_scale": torch.tensor(0.1) for i in range(3) for kind in "kv"}
    save_file(load_file(folder / "model.safetensors") | scales, folder / "model.safetensors")
    return folder


@needs_avx512
def test_a_quantised_cache_is_refused_unless_the_models_dtype_is_asked_for(
    tiny: TinyPaths, quantised_cache: pathlib.Path
) -> None:
    with (
        pytest.raises(AHNError, match=r"^AHN does not work with a quantised KV cache.*'auto', expected 'float16'$"),
        engine(quantised_cache, ahn_setting(tiny), dtype="float16"),
    ):
        pass
    results = []
    arguments = {"dtype": "float16", "kv_cache_dtype": "float16"}
    with engine(quantised_cache, ahn_setting(tiny), **arguments) as llm:
        results.append(greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1))
    config = json.loads((quantised_cache / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (quantised_cache / "config.json").write_text(json.dumps(config))
    with engine(quantised_cache, ahn_setting(tiny), dtype="float16") as llm:
        results.append(greedy(llm, PROMPTS, MAX_TOKENS, logprobs=-1))
    for (tokens, logits), (other_tokens, other_logits) in zip(*results, strict=True):
        assert tokens == other_tokens
        assert logits is not None and other_logits is not None
        assert torch.equal(logits, other_logits)


# What needs a GPU, or a CPU with AMX, to be computed: built and loaded only.


@pytest.fixture
def one_process(tmp_path: pathlib.Path) -> Iterator[Callable[[pathlib.Path, TinyPaths], Any]]:
    def load(folder: pathlib.Path, tiny: TinyPaths) -> Any:
        extra = {"ahn": ahn_setting(tiny)}
        config: VllmConfig = EngineArgs(str(folder), dtype="bfloat16", additional_config=extra).create_engine_config()
        with set_current_vllm_config(config):
            init_distributed_environment(1, 0, f"file://{tmp_path}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
            with set_default_torch_dtype(torch.bfloat16):
                model = initialize_model(config)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        return model

    yield load
    cleanup_dist_env_and_memory()


SKIPPED = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")


@pytest.mark.parametrize("name", ["fp8", pytest.param("fp8-blocks", marks=needs_avx512)])
def test_built_and_loaded(
    name: str,
    one_process: Callable[[pathlib.Path, TinyPaths], Any],
    tiny: TinyPaths,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every tensor of the checkpoint is in the parameter that its format gives it, and a layer left out is plain."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    folder = tmp_path / "quantised"
    quantise(tiny.base, folder, name, skip=SKIPPED, ignored_layers=list(SKIPPED))
    model = one_process(folder, tiny)
    with pytest.raises(AssertionError, match="11 == 12"):
        check_unquantised_ahn(model, torch.bfloat16)
    plain, quantised = (model.model.layers[i].self_attn.qkv_proj for i in (1, 0))
    assert isinstance(plain.quant_method, UnquantizedLinearMethod)
    assert {name for name, _ in plain.named_parameters()} == {"weight", "bias"}
    assert quantised.weight.dtype == torch.float8_e4m3fn
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.0.self_attn"
    for kind in [kind for kind in FORMATS[name][0](torch.ones(128, 128))[0] if kind != "weight"] + ["weight"]:
        parts = [tensors[f"{prefix}.{letter}_proj.{kind}"].float().reshape(-1) for letter in "qkv"]
        assert torch.equal(getattr(quantised, kind).float().reshape(-1), torch.cat(parts)), kind
    loaded = model.model.layers[2].ahn.fn
    expected = load_file(tiny.ahn / "model.safetensors") if tiny.ahn else {}
    prefix = "model.layers.2.ahn.fn"
    assert torch.equal(loaded.A_log, expected[f"{prefix}.A_log"])
    assert torch.equal(loaded.out_proj.weight, expected[f"{prefix}.o_proj.weight"].bfloat16())
    rows = torch.cat([expected[f"{prefix}.{letter}_proj.weight"] for letter in "abg"])
    assert torch.equal(loaded.in_proj.weight, rows.bfloat16())
