"""Checkpoints with ``fa_layer_ids`` as the published trainer writes them, with a memory saved for every layer."""

import json
import pathlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.engines import engine, greedy
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny import make_tiny

WINDOW, SINKS, TOKENS = 24, 8, 6
PROMPTS = [torch.randint(500, (length,), generator=torch.Generator().manual_seed(length)) for length in (20, 100)]


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "Mamba2"])
def test_the_engine_answers_as_without_the_unused_tensors(memory: str, tmp_path: pathlib.Path) -> None:
    paths = make_tiny(tmp_path, memory=memory, use_router=True)
    assert paths.ahn is not None
    config = json.loads((paths.ahn / "config.json").read_text())
    (paths.ahn / "config.json").write_text(json.dumps(config | {"fa_layer_ids": "1"}))
    tensors = load_file(paths.ahn / "model.safetensors")
    unused = [name for name in tensors if name.startswith("model.layers.1.")]
    assert any("ahn_router" in name for name in unused) and any("ahn.fn" in name for name in unused)
    stripped = shutil.copytree(paths.ahn, tmp_path / "stripped")
    save_file({name: value for name, value in tensors.items() if name not in unused}, stripped / "model.safetensors")
    reference = from_folders(paths.base, stripped, WINDOW, SINKS)
    expected = [reference.generate(prompt[None], TOKENS).tokens[0].tolist() for prompt in PROMPTS]
    whole = from_folders(paths.base, paths.ahn, WINDOW, SINKS)
    assert [whole.generate(prompt[None], TOKENS).tokens[0].tolist() for prompt in PROMPTS] == expected
    with engine(paths.base, {"checkpoint": str(paths.ahn), "window": WINDOW, "sinks": SINKS}) as llm:
        assert [tokens for tokens, _ in greedy(llm, PROMPTS, TOKENS)] == expected
