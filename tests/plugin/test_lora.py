"""LoRA on the base of an AHN: requests with adapters are answered as by a base that has them in its weights."""

import pathlib
from typing import Any

import pytest
import torch
from openai import APIStatusError
from vllm import LLM
from vllm.lora.request import LoRARequest

from support.engines import engine, greedy
from support.lora_adapter import PREFIX, fold, save_adapter, write_adapter
from support.servers import environment, serve
from vllm_ahn import AHNError
from vllm_ahn.models.ahn import AHNForCausalLM
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

MAX_TOKENS = 8
TOLERANCE = 1e-3
WINDOW, SINKS = 40, 8
LENGTHS = (30, 48, 49, 150)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

MODELS: dict[str, tuple[dict[str, Any], list[tuple[str, ...]]]] = {
    "qwen2": ({"memory": "GatedDeltaNet", "use_q_proj": True}, [ATTENTION + MLP, ("q_proj", "down_proj"), ("o_proj",)]),
    "qwen3": (
        {"memory": "Mamba2", "model_type": "qwen3", "tie_word_embeddings": False},
        [ATTENTION, ("embed_tokens", "lm_head", "v_proj")],
    ),
}


def lora_engine(paths: TinyPaths, **arguments: Any) -> Any:
    ahn = {"checkpoint": str(paths.ahn), "window": WINDOW, "sinks": SINKS}
    # One slot more than there are adapters: on CPUs, vLLM 0.32 gives requests without one what is in the last slot.
    return engine(paths.base, ahn, enable_lora=True, max_loras=4, max_lora_rank=8, **arguments)


def worker_model(llm: LLM) -> AHNForCausalLM:
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    assert isinstance(model, AHNForCausalLM)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_adapters_in_one_batch(name: str, tmp_path: pathlib.Path) -> None:
    """Each of the lengths with each adapter and with none, all at once; the prompts are the same for all of them."""
    options, targets = MODELS[name]
    paths = make_tiny(tmp_path, seed=5, **options)
    adapters = [write_adapter(tmp_path / f"lora{i}", paths.base, modules, i) for i, modules in enumerate(targets)]
    requests = [None, *(LoRARequest(f"lora{i}", i + 1, str(folder)) for i, folder in enumerate(adapters))]
    bases = [paths.base, *(fold(paths.base, folder, tmp_path / f"folded{i}") for i, folder in enumerate(adapters))]
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(500, (length,), generator=generator) for length in LENGTHS]
    with lora_engine(
        paths, max_num_batched_tokens=200, max_num_seqs=16, enable_prefix_caching=True, logprobs_mode="raw_logits"
    ) as llm:
        wrapped = set(worker_model(llm).lora_manager.modules)
        results = greedy(
            llm,
            [prompt for prompt in prompts for _ in requests],
            MAX_TOKENS,
            logprobs=-1,
            lora_request=requests * len(prompts),
        )
    assert not [module for module in wrapped if ".ahn" in module]
    assert {module.rpartition(".")[2] for module in wrapped} >= {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    references = [from_folders(base, paths.ahn, WINDOW, SINKS) for base in bases]
    plain = {}
    for i, (tokens, logits) in enumerate(results):
        prompt, which = prompts[i // len(requests)], i % len(requests)
        sequence = torch.cat((prompt, torch.tensor(tokens[:-1])))[None]
        with torch.no_grad():
            expected = references[which](sequence, last=MAX_TOKENS)[0]
        assert logits is not None
        assert (logits - expected).abs().max() <= TOLERANCE, (len(prompt), which)
        plain.setdefault(len(prompt), expected[0])
        if which:  # the comparison can fail: the adapters make other logits
            assert (expected[0] - plain[len(prompt)]).abs().max() > 100 * TOLERANCE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), use_q_proj=True)


@pytest.fixture(scope="module")
def ahn_adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An adapter with one tensor pair for the base, and one for the memory's own ``o_proj``."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    tensors = {}
    for layer in ("self_attn", "ahn.fn"):
        for kind, shape in (("lora_A", (8, 128)), ("lora_B", (128, 8))):
            tensors[f"{PREFIX}model.layers.1.{layer}.o_proj.{kind}.weight"] = torch.zeros(shape)
    save_adapter(folder, tensors)
    return folder


def test_an_adapter_of_the_ahn_is_refused(tiny: TinyPaths, ahn_adapter: pathlib.Path) -> None:
    """With a request, which does not harm the engine, and when it is loaded on its own, as servers do."""
    request = LoRARequest("bad", 1, str(ahn_adapter))
    sentence = (
        rf"^{ahn_adapter}: this LoRA adapter changes the AHN \({PREFIX}model.layers.1.ahn.fn.o_proj.lora_A.weight\)"
    )
    prompt = torch.arange(60)
    with lora_engine(tiny) as llm:
        ((before, _),) = greedy(llm, [prompt], 4)
        with pytest.raises(AHNError, match=sentence):
            greedy(llm, [prompt], 4, lora_request=request)
        with pytest.raises(AHNError, match=sentence):
            llm.llm_engine.add_lora(request)
        assert greedy(llm, [prompt], 4)[0][0] == before


def test_pickled_adapters_are_looked_at_too(ahn_adapter: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from safetensors.torch import load_file

    from vllm_ahn.plugin.lora import check_adapter

    tensors = load_file(ahn_adapter / "adapter_model.safetensors")
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(AHNError, match="changes the AHN"):
        check_adapter(str(tmp_path))
    torch.save(
        {name: tensor for name, tensor in tensors.items() if ".ahn." not in name}, tmp_path / "adapter_model.bin"
    )
    check_adapter(str(tmp_path))


@pytest.mark.parametrize("targets", [["o_proj", "q_proj"], ["qkv_proj"]])
def test_target_modules_are_the_bases(tiny: TinyPaths, targets: list[str]) -> None:
    """vLLM matches these by the last part of a module's name, and fails on a match that cannot take LoRA."""
    with lora_engine(tiny, lora_target_modules=targets) as llm:
        wrapped = set(worker_model(llm).lora_manager.modules)
    expected = {"qkv_proj", "o_proj"} if "o_proj" in targets else {"qkv_proj"}
    assert wrapped == {f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in expected}


@pytest.mark.slow
@pytest.mark.server
def test_server(tiny: TinyPaths, ahn_adapter: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """``vllm serve --enable-lora --lora-modules``: adapters are models of their own; a bad one that is loaded later is
    answered with the sentence, and the server goes on."""
    adapter = write_adapter(tmp_path / "good", tiny.base, ATTENTION, 7)
    flags = ["--ahn", str(tiny.ahn), "--ahn-window", str(WINDOW), "--ahn-sinks", str(SINKS)]
    flags += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", f"good={adapter}"]
    flags += ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--max-model-len", "1024"]
    env = environment(tmp_path / "cache", VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    prompt = torch.randint(500, (120,), generator=torch.Generator().manual_seed(0))
    expected = {
        str(tiny.base): from_folders(tiny.base, tiny.ahn, WINDOW, SINKS),
        "good": from_folders(fold(tiny.base, adapter, tmp_path / "folded"), tiny.ahn, WINDOW, SINKS),
    }
    expected = {name: model.generate(prompt[None], MAX_TOKENS).tokens[0].tolist() for name, model in expected.items()}
    assert expected["good"] != expected[str(tiny.base)]
    with serve(tiny.base, *flags, log=tmp_path / "log", env=env) as server:
        client = server.client
        assert {model.id for model in client.models.list().data} == set(expected)
        with pytest.raises(APIStatusError, match="this LoRA adapter changes the AHN"):
            client.post("/load_lora_adapter", body={"lora_name": "bad", "lora_path": str(ahn_adapter)}, cast_to=str)
        for name, tokens in expected.items():
            completion = client.completions.create(
                model=name,
                prompt=prompt.tolist(),
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert completion.choices[0].model_dump()["token_ids"] == tokens
