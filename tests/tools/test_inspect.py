"""``vllm-ahn inspect``: its two forms of output, and one sentence for what is no AHN checkpoint."""

import argparse
import json
import math
import pathlib

import pytest

from support.paths import GOLDEN
from vllm_ahn.checkpoint import Checkpoint
from vllm_ahn.checkpoint.tensors import AHNOptions
from vllm_ahn.tools.cli import inspect
from vllm_ahn.tools.tiny import make_tiny


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args(arguments))


def test_json_of_a_golden_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(GOLDEN / "ahn" / "gdn_qwen2")
    assert run(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint"] == folder
    assert (report["memory"], report["merged"]) == ("GatedDeltaNet", False)
    assert report["options"] == {"use_q_proj": False, "use_ahn_router": False, "fa_layer_ids": []}
    assert report["base"] == {
        "model_type": "qwen2",
        "num_hidden_layers": 3,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "name": None,
    }
    used = [entry for entry in report["tensors"] if entry["used"]]
    assert {entry["layers"] for entry in report["tensors"]} == {3}
    assert [entry["name"] for entry in report["tensors"] if not entry["used"]] == ["model.layers.N.ahn.fn.D"]
    assert report["parameters"] == 3 * sum(math.prod(entry["shape"]) for entry in used)
    assert report["unused_parameters"] == 12
    assert report["tensor_types"] == {"F32": 24}
    assert report["serving"] == {
        "window": 32640,
        "sinks": 128,
        "lossless_tokens": 32768,
        "max_model_len": 131072,
        "state_shape_per_layer": [4, 32, 32],
        "state_dtype": "float32",
        "state_bytes_per_sequence": 3 * 4 * 32 * 32 * 4,
    }


def test_text(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> None:
    merged = make_tiny(
        tmp_path,
        model_type="qwen3",
        merged=True,
        use_q_proj=True,
        use_router=True,
        fa_layer_ids="0,2",
        layers=4,
    ).base
    assert run(str(merged)) == 0
    text = capsys.readouterr().out
    for expected in (
        "memory      GatedDeltaNet\n",
        "serve it as the model, without --ahn\n",
        "options     use_q_proj, use_ahn_router, full attention in layers 0, 2\n",
        "model.layers.N.ahn.fn.q_proj.weight  [4, 64, 64]  in 2 layers\n",
        "model.layers.N.ahn.fn.D  [4]  in 2 layers, unused\n",
        "model.layers.N.ahn_router.alpha  [4]  in 2 layers\n",
        "any base with model_type qwen3,\n",
        "4 layers, hidden size 128,\n",
        "4 heads, 2 key/value heads, head size 64\n",
        "window 32,640 tokens (--ahn-window)\n",
        "sinks 128 tokens (--ahn-sinks)\n",
        "lossless up to 32,768 tokens",
        "max_model_len 131,072",
        "state       128.0 KiB for each sequence",
    ):
        assert expected in text, text
    assert "self_attn" not in text


@pytest.mark.parametrize(
    ("name", "memory", "millions", "mebibytes"),
    [
        ("Qwen2.5-3B", "GatedDeltaNet", 13.0, 36),
        ("Qwen2.5-7B", "DeltaNet", 18.5, 49),
        ("Qwen2.5-14B", "Mamba2", 51.4, 120),
    ],
)
def test_the_published_sizes_are_named(name: str, memory: str, millions: float, mebibytes: int) -> None:
    shape = next(shape for shape, size in inspect.PUBLISHED_SIZES.items() if size == name)
    report = inspect.describe(Checkpoint(pathlib.Path(), memory, AHNOptions(), shape, {}, False), "repo")
    assert report["base"]["name"] == name
    assert report["parameters_millions"] == millions
    assert report["serving"]["state_bytes_per_sequence"] == mebibytes * 2**20


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("base_qwen2", "config.json: no _ahn_implementation, so this is no AHN checkpoint; expected one of "),
        ("nowhere", "nowhere: no such folder, expected a folder or a hub repository"),
        ("modules", "modules: no config.json in it, expected the folder or repository of a checkpoint"),
    ],
)
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_bad_input(folder: str, sentence: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(GOLDEN / folder), *arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert output.err.count("\n") == 1
