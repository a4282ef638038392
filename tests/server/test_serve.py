"""``vllm serve`` as users run it, compilation included, spoken to with the ``openai`` client."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.golden_data import CONFIGURATIONS, GENERATED
from support.servers import Server, environment, serve
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny.tokenizer import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.server]

GOLDEN = CONFIGURATIONS["gdn_qwen2"]
VOCAB = 512
SMALL = ("--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20), "--distributed-executor-backend", "uni")


def with_tokenizer(source: Path, target: Path) -> Path:
    """The golden base with a tokenizer, which a server needs and the golden data has none of."""
    shutil.copytree(source, target)
    write_tokenizer(target, VOCAB)
    return target


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_tokenizer(GOLDEN.base, tmp_path_factory.mktemp("serve") / "base")


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    flags = ("--ahn", str(GOLDEN.ahn), "--ahn-window", str(GOLDEN.window), "--ahn-sinks", str(GOLDEN.sinks))
    env = environment(folder / "cache")
    flags += ("--block-size", "16", "--enable-prompt-tokens-details")
    with serve(base, *flags, *SMALL, log=folder / "log", env=env) as ready:
        yield ready


def complete(server: Server, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens for a prompt of tokens."""
    client = server.client
    completion = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    ids = completion.choices[0].model_dump()["token_ids"]
    assert ids is not None
    return list(ids)


def test_model_name_and_length(server: Server, base: Path) -> None:
    (model,) = server.client.models.list().data
    config = json.loads((base / "config.json").read_text())
    assert model.id == str(base)
    assert model.model_dump()["max_model_len"] == config["max_position_embeddings"]


@pytest.mark.parametrize("length", GOLDEN.lengths)
def test_golden_tokens(server: Server, length: int) -> None:
    case = GOLDEN.case(length)
    assert complete(server, case.prompt.tolist(), GENERATED) == case.tokens.tolist()


def test_cached_tokens_are_reported(server: Server) -> None:
    """The second time, a prompt comes out of the cache up to its last block, far beyond W + S."""
    prompt = [int(token) for token in torch.randint(VOCAB, (300,), generator=torch.Generator().manual_seed(7))]
    seen = []
    for asked in (prompt, prompt, [*prompt, 5, 6, 7]):
        completion = server.client.completions.create(
            model=server.client.models.list().data[0].id, prompt=asked, max_tokens=4, temperature=0
        )
        assert completion.usage is not None
        details = completion.usage.prompt_tokens_details
        seen.append(details.cached_tokens if details is not None else None)
    assert seen == [0, 288, 288]


def test_it_is_compiled(server: Server) -> None:
    """What the other tests here compare came out of vLLM's default compilation."""
    assert "enforce_eager=False" in server.log
    assert re.search("(saved|loaded) AOT compiled function", server.log), "nothing was compiled"


def test_chat_streams(server: Server, base: Path) -> None:
    """A chat longer than the window, streamed, says what the reference says."""
    client = server.client
    messages: list[Any] = [{"role": "user", "content": "What leaves the window is absorbed into the state. " * 5}]
    stream = client.chat.completions.create(
        model=str(base),
        messages=messages,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    chunks = list(stream)
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 24
    assert usage.prompt_tokens > 2 * GOLDEN.capacity
    prompt = next(ids for chunk in chunks if (ids := chunk.model_dump().get("prompt_token_ids")))
    tokens = [t for chunk in chunks for choice in chunk.choices for t in choice.model_dump().get("token_ids") or []]
    assert len(prompt) == usage.prompt_tokens and len(tokens) == 24
    assert sum(bool(choice.delta.content) for chunk in chunks for choice in chunk.choices) > 5, "not streamed"

    model = from_folders(base, GOLDEN.ahn, GOLDEN.window, GOLDEN.sinks)
    with torch.no_grad():
        logits = model.generate(torch.tensor([prompt]), 24).logits[0]
    # A prompt that nobody chose may have two next tokens that are as good as each other.
    for step, token in enumerate(tokens):
        best, second = logits[step].topk(2).values
        if best - second < 1e-3:
            break
        assert token == int(logits[step].argmax()), step
    else:
        step = len(tokens)
    assert step > 8, "no clear choices, nothing was compared"


def test_blocks_are_given_back(server: Server) -> None:
    """The server's metrics: blocks are held while a request is answered, and none afterwards."""
    prompt = GOLDEN.case(300).prompt.tolist()
    usable = int(server.cache_config()["num_gpu_blocks"]) - 1
    client = server.client
    model = client.models.list().data[0].id
    held = []
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=600, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    for index, _ in enumerate(stream):
        if index % 100 == 50:
            held.append(round(server.metric("vllm:kv_cache_usage_perc") * usable))
    # Sinks 1, window 2, one for the tokens behind its last whole block, one that a step may need before one is
    # freed, and a state of 3 pages in each of two slots. All tokens would take 19 for the prompt alone.
    assert held and max(held) <= 11, held
    assert any(held), "no metric was read while the request ran"
    deadline = time.monotonic() + 10
    while server.metric("vllm:num_requests_running") or server.metric("vllm:kv_cache_usage_perc"):
        assert time.monotonic() < deadline, "blocks were not given back"
        time.sleep(0.1)


def test_a_plain_model(base: Path, tmp_path: Path) -> None:
    """Where this plugin is installed and no AHN is asked for, the base is served."""
    case = GOLDEN.case(100)
    with serve(base, "--enforce-eager", *SMALL, log=tmp_path / "log", env=environment(tmp_path / "cache")) as server:
        tokens = complete(server, case.prompt.tolist(), GENERATED)
        log = server.log
    assert "AHN" not in log
    with torch.no_grad():
        expected = from_folders(base).generate(case.prompt[None], GENERATED).tokens[0]
    assert tokens == expected.tolist()
    assert tokens != case.tokens.tolist()


def test_merged_checkpoint_without_any_flag(base: Path, tmp_path: Path) -> None:
    """A BASE with the AHN in it is served with the AHN, at the default lengths."""
    merged = with_tokenizer(GOLDEN.base, tmp_path / "merged")
    config = json.loads((GOLDEN.base / "config.json").read_text())
    ahn_config = json.loads((GOLDEN.ahn / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps({**ahn_config, **config}))
    tensors = load_file(GOLDEN.base / "model.safetensors") | load_file(GOLDEN.ahn / "model.safetensors")
    save_file(tensors, merged / "model.safetensors")
    env = environment(tmp_path / "cache")
    case = GOLDEN.case(100)
    with serve(merged, "--enforce-eager", *SMALL, log=tmp_path / "log", env=env) as server:
        (model,) = server.client.models.list().data
        tokens = complete(server, case.prompt.tolist(), GENERATED)
        log = server.log
    # 4 (W + S) of the defaults, and so far inside the window.
    assert model.model_dump()["max_model_len"] == 131072
    assert f"AHN: GatedDeltaNet from {merged}, window 32640, sinks 128" in log
    with torch.no_grad():
        expected = from_folders(base).generate(case.prompt[None], GENERATED).tokens[0]
    assert tokens == expected.tolist()
    assert tokens != case.tokens.tolist()
