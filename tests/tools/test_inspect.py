"""``vllm-ahn inspect``: its two forms of output, and one sentence for what is no AHN checkpoint."""

import json
import math
import pathlib

import pytest

from support.cost_case import QWEN2_5, write, write_ahn
from support.paths import GOLDEN
from vllm_ahn import published
from vllm_ahn.checkpoint import Checkpoint
from vllm_ahn.checkpoint.read import TensorHeader
from vllm_ahn.checkpoint.tensors import AHNOptions, BaseShape, expected_tensors
from vllm_ahn.tools.cli import inspect, main
from vllm_ahn.tools.tiny import make_tiny


def run(*arguments: str) -> int:
    return main(["inspect", *arguments])


def test_json_of_a_golden_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(GOLDEN / "ahn" / "gdn_qwen2")
    assert run(folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint"] == folder
    assert (report["files_read"], report["files_problem"]) == (True, None)
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


def test_a_state_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(GOLDEN / "ahn" / "gdn_qwen2"), "--json", "--mamba-ssm-cache-dtype", "bfloat16") == 0
    serving = json.loads(capsys.readouterr().out)["serving"]
    assert (serving["state_dtype"], serving["state_bytes_per_sequence"]) == ("bfloat16", 3 * 4 * 32 * 32 * 2)
    assert run(str(GOLDEN / "ahn" / "gdn_qwen2"), "--mamba-ssm-cache-dtype", "auto") == 0
    assert "[4, 32, 32] in float32 in each layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "size", "millions", "mebibytes"),
    [
        ("GDN", "3B", 13.0, 36), ("GDN", "7B", 21.3, 49), ("GDN", "14B", 61.0, 120),
        ("DN", "3B", 11.8, 36), ("DN", "7B", 18.5, 49), ("DN", "14B", 51.1, 120),
        ("Mamba2", "3B", 11.9, 36), ("Mamba2", "7B", 18.6, 49), ("Mamba2", "14B", 51.4, 120),
    ],
)  # fmt: skip
def test_published_checkpoints_are_known_offline(
    memory: str, size: str, millions: float, mebibytes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The paper's parameter counts, by name alone; the report says that no file was read."""
    name = f"ByteDance-Seed/AHN-{memory}-for-Qwen-2.5-Instruct-{size}"
    assert run(name, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["files_read"], report["tensor_types"], report["unused_parameters"]) == (False, {}, 0)
    assert "the hub cannot be reached" in report["files_problem"]
    assert report["base"]["name"] == f"Qwen2.5-{size}"
    assert report["parameters_millions"] == millions
    assert report["serving"]["state_bytes_per_sequence"] == mebibytes * 2**20
    assert run(name) == 0
    text = capsys.readouterr().out
    assert "files       not read, so none of this was checked against them: no such folder" in text
    assert "tensors     expected, by the table of published models\n" in text


def test_the_published_sizes_are_those_of_their_configs() -> None:
    for size, config in QWEN2_5.items():
        base = published.BASES[f"Qwen2.5-{size}"]
        assert base.config.items() >= config.items()
        assert BaseShape.from_config(base.config).head_dim == 128
        for name in (base.name, base.instruct, f"Qwen/{base.name}", f"{base.name}-Instruct"):
            assert published.find_base(name) == base
    assert published.find_base("Qwen/Qwen2.5-32B") is None
    assert published.find_base("Qwen/Qwen2.5-3B@main") is None
    assert len(published.AHNS) == 9


def test_a_folder_wins_over_a_published_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "ByteDance-Seed/AHN-DN-for-Qwen-2.5-Instruct-3B"
    write_ahn(tmp_path / name, "3B", "Mamba2")
    assert run(name) == 1
    assert capsys.readouterr().err == f"error: {name}: no weights in it, expected *.safetensors files\n"
    write(tmp_path / "Qwen2.5-3B", QWEN2_5["3B"])
    assert run("Qwen2.5-3B") == 1
    assert "Qwen2.5-3B/config.json: no _ahn_implementation" in capsys.readouterr().err


def test_tensors_that_only_some_layers_use() -> None:
    shape, options = BaseShape("qwen2", 3, 128, 4, 2, 32), AHNOptions(full_attention_layers=(0,))
    headers = {
        name: TensorHeader("F32", dims, pathlib.Path("x")) for name, dims in expected_tensors("DeltaNet", shape).items()
    }
    report = inspect.describe(Checkpoint(pathlib.Path(), "DeltaNet", options, shape, headers, False), "x")
    of_one = [(entry["layers"], entry["used"]) for entry in report["tensors"] if "g_proj" in entry["name"]]
    assert of_one == [(1, False), (2, True)]
    assert report["unused_parameters"] * 2 == report["parameters"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("{golden}/base_qwen2", "config.json: no _ahn_implementation, so this is no AHN checkpoint; expected one of "),
        ("{golden}/nowhere", "nowhere: no such folder, expected a folder or a hub repository"),
        ("{golden}/modules", "modules: no config.json in it, expected the folder or repository of a checkpoint"),
        (
            "Qwen/Qwen2.5-7B-Instruct",
            "a base model, without an AHN, expected an AHN checkpoint, such as "
            "ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-7B",
        ),
    ],
)
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_bad_input(name: str, sentence: str, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(name.format(golden=GOLDEN), *arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert sentence in output.err
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
