"""The sentence for each thing wrong with the weights of a checkpoint."""

import json
import pathlib
import shutil

import pytest
import torch

from support.checkpoint_case import SMALL, Case
from vllm_ahn.checkpoint import read_checkpoint
from vllm_ahn.config import AHNConfig
from vllm_ahn.tools.tiny import TinyPaths, make_tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), **SMALL)


@pytest.fixture(scope="module")
def made_merged(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), merged=True, **SMALL).base


@pytest.fixture
def case(made: TinyPaths, tmp_path: pathlib.Path) -> Case:
    assert made.ahn is not None
    return Case(made.base, shutil.copytree(made.ahn, tmp_path / "ahn"))


def test_folder_without_weights(case: Case) -> None:
    case.weights.rename(case.ahn / "model.bin")
    case.refused(f"{case.ahn}: no weights in it, expected *.safetensors files")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_weights(case: Case, keep: int) -> None:
    case.weights.write_bytes(case.weights.read_bytes()[:keep])
    case.refused(f"{case.weights}: truncated")


def damage(case: Case, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    case.weights.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xff\xff{}", "invalid UTF-8 in header"),
        (b"{]", "invalid JSON in header"),
        ([], "invalid JSON in header"),
        ({"t": 3}, "invalid JSON in header"),
        ({"t": {"dtype": "F32", "shape": [1]}}, "missing field `data_offsets`"),
        (
            {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
            "invalid shape, data type, or offset for tensor",
        ),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "invalid value: integer `-4`"),
        ({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "file not fully covered"),
        ({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "file not fully covered"),
    ],
)
def test_corrupt_weights(case: Case, header: object, reason: str) -> None:
    damage(case, header, bytes(8))
    case.refused(f"{case.weights}: truncated, corrupt or no safetensors file (", reason)


def test_weights_that_are_something_else(case: Case) -> None:
    case.weights.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 4)
    case.refused(f"{case.weights}: truncated, corrupt or no safetensors file")
    case.weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    case.refused(f"{case.weights}: a git-lfs pointer and not the file itself")


def test_missing_tensors(case: Case) -> None:
    case.change_tensors(**{"1__ahn__fn__b_proj__weight": None})
    case.refused(
        f"{case.ahn}: expected the 14 tensors of a GatedDeltaNet AHN of 2 layers, but "
        "model.layers.1.ahn.fn.b_proj.weight is missing"
    )
    case.change_tensors(**{"0__ahn__fn__A_log": None, "0__ahn__fn__o_proj__weight": None})
    case.refused("model.layers.0.ahn.fn.A_log is missing (and 2 more)")


def test_surplus_tensors(case: Case) -> None:
    case.change_tensors(**{"2__ahn__fn__A_log": torch.ones(4)})
    case.refused(f"{case.ahn}: ", "but model.layers.2.ahn.fn.A_log is not among them")
    case.change_tensors(**{"0__self_attn__q_proj__weight": torch.ones(4), "2__ahn__fn__A_log": None})
    case.refused("model.layers.0.self_attn.q_proj.weight is not among them")


def test_tensors_of_another_memory_or_option(case: Case) -> None:
    case.change_config(_ahn_implementation="DeltaNet")
    case.refused("expected the 8 tensors of a DeltaNet AHN", "A_log is not among them (and 7 more)")
    case.change_config(_ahn_implementation="Mamba2")
    case.refused("dt_proj.weight is missing (and 7 more)", "is not among them (and 7 more)")
    case.change_config(_ahn_implementation="GatedDeltaNet", use_ahn_router=True)
    case.refused("model.layers.0.ahn_router.alpha is missing (and 3 more)")
    case.change_config(use_ahn_router=False, use_q_proj=True)
    case.refused("model.layers.0.ahn.fn.q_proj.weight is missing (and 1 more)")


def test_tensors_of_layers_with_full_attention(case: Case) -> None:
    """The published trainer saves them; nothing reads them, whether all are there or not."""
    case.change_config(fa_layer_ids="0")
    expected = AHNConfig("GatedDeltaNet", checkpoint=str(case.ahn), full_attention_layers=(0,))
    assert case.resolve() == expected
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": None})
    assert case.resolve() == expected
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": torch.ones(3)})
    case.refused("model.layers.0.ahn.fn.o_proj.weight has shape [3], expected [4, 8, 8]")
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": None, "0__ahn__fn__dt_proj__weight": torch.ones(4, 32)})
    case.refused("model.layers.0.ahn.fn.dt_proj.weight is not among them")


def test_wrong_shapes_and_types(case: Case) -> None:
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": torch.ones(32, 8)})
    case.refused(f"{case.weights}: model.layers.0.ahn.fn.o_proj.weight has shape [32, 8], expected [4, 8, 8]")
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": torch.ones(4, 8, 8, dtype=torch.int8)})
    case.refused("model.layers.0.ahn.fn.o_proj.weight has type I8, expected one of F64, F32, F16, BF16")
    case.change_tensors(**{"0__ahn__fn__o_proj__weight": torch.ones(4, 8, 8), "1__ahn__fn__D": torch.ones(3)})
    case.refused("model.layers.1.ahn.fn.D has shape [3], expected [4]")


def test_quantised_weights(case: Case) -> None:
    case.change_tensors(**{"1__ahn__fn__g_proj__weight_scale": torch.ones(4, 1)})
    case.refused(
        f"{case.ahn}: model.layers.1.ahn.fn.g_proj.weight_scale is of a quantised AHN, expected one that is not"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("value", "what"), [("nan", "NaN"), ("inf", "an infinite value"), ("-inf", "an infinite")])
def test_weights_that_are_no_numbers(case: Case, value: str, what: str, dtype: torch.dtype) -> None:
    weight = torch.ones(4, 32, dtype=dtype)
    weight[3, 31] = float(value)
    case.change_tensors(**{"1__ahn__fn__g_proj__weight": weight})
    case.refused(f"{case.weights}: model.layers.1.ahn.fn.g_proj.weight holds {what}", "expected finite numbers")


def test_merged_checkpoints_are_checked_alike(made_merged: pathlib.Path, tmp_path: pathlib.Path) -> None:
    merged = Case(tmp_path / "merged", shutil.copytree(made_merged, tmp_path / "merged"))
    merged.change_tensors(**{"0__ahn__fn__dt_bias": None})
    merged.refused(f"{merged.ahn}: ", "model.layers.0.ahn.fn.dt_bias is missing", setting=None)
    merged.change_tensors(**{"0__ahn__fn__dt_bias": torch.full((4,), float("nan"))})
    merged.refused("model.layers.0.ahn.fn.dt_bias holds NaN", setting=None)
    merged.change_tensors(**{"0__ahn__fn__dt_bias": torch.ones(5)})
    merged.refused("model.layers.0.ahn.fn.dt_bias has shape [5], expected [4]", setting=None)
    merged.change_config(_ahn_implementation="Mamba3")
    merged.refused("config.json: _ahn_implementation is 'Mamba3'", setting=None)


# Several files


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> Case:
    made = make_tiny(tmp_path, shards=3, **SMALL)
    assert made.ahn is not None
    return Case(made.base, made.ahn)


def test_shards(sharded: Case) -> None:
    assert len(list(sharded.ahn.glob("*.safetensors"))) == 3
    assert sharded.resolve() == AHNConfig("GatedDeltaNet", checkpoint=str(sharded.ahn))
    # A file that the index does not name is not read; without an index every file is.
    (sharded.ahn / "other.safetensors").write_bytes(b"?")
    assert sharded.resolve() == AHNConfig("GatedDeltaNet", checkpoint=str(sharded.ahn))
    (sharded.ahn / "model.safetensors.index.json").unlink()
    sharded.refused(f"{sharded.ahn}/other.safetensors: truncated, corrupt or no safetensors file")
    (sharded.ahn / "other.safetensors").unlink()
    assert sharded.resolve() == AHNConfig("GatedDeltaNet", checkpoint=str(sharded.ahn))
    shard = sharded.ahn / "model-00001-of-00003.safetensors"
    shutil.copy(shard, sharded.ahn / "copy.safetensors")
    sharded.refused("is in copy.safetensors and in model-00001-of-00003.safetensors, expected it once")


def test_shards_that_are_missing_or_bad(sharded: Case) -> None:
    index = sharded.ahn / "model.safetensors.index.json"
    (sharded.ahn / "model-00002-of-00003.safetensors").unlink()
    sharded.refused(f"{index}: weight_map names model-00002-of-00003.safetensors, expected such a file")
    for text in ("", "{}", "[]", '{"weight_map": []}', '{"weight_map": 3}'):
        index.write_text(text)
        sharded.refused(f"{index}: not readable, expected JSON with a weight_map")


def test_read_checkpoint_knows_no_base(made_merged: pathlib.Path) -> None:
    found = read_checkpoint(made_merged, "label")
    assert (found.memory, found.merged, found.shape.hidden_size, len(found.headers)) == (
        "GatedDeltaNet",
        True,
        32,
        16,
    )
