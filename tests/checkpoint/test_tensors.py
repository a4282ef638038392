"""Names, shapes and counts of AHN tensors, against golden checkpoints and the published parameter counts."""

import json
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from support.paths import GOLDEN
from vllm_ahn.checkpoint.tensors import (
    AHNOptions,
    BaseShape,
    count_parameters,
    expected_tensors,
    is_ahn_tensor,
    state_bytes,
    unused_tensors,
)
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError

QWEN2_5 = {
    "3B": BaseShape("qwen2", 36, 2048, 16, 2, 128),
    "7B": BaseShape("qwen2", 28, 3584, 28, 4, 128),
    "14B": BaseShape("qwen2", 48, 5120, 40, 8, 128),
}


@pytest.mark.parametrize(
    ("size", "memory", "millions"),
    [
        ("3B", "Mamba2", 11.9),
        ("3B", "DeltaNet", 11.8),
        ("3B", "GatedDeltaNet", 13.0),
        ("7B", "Mamba2", 18.6),
        ("7B", "DeltaNet", 18.5),
        ("7B", "GatedDeltaNet", 21.3),
        ("14B", "Mamba2", 51.4),
        ("14B", "DeltaNet", 51.1),
        ("14B", "GatedDeltaNet", 61.0),
    ],
)
def test_published_parameter_counts(size: str, memory: str, millions: float) -> None:
    count = count_parameters(memory, QWEN2_5[size])
    assert round(count / 1e6, 1) == millions
    # The docstring's claim that the unused tensors make no difference to these figures.
    unused = sum(dims[0] for dims in unused_tensors(memory, QWEN2_5[size]).values())
    assert unused <= 1920
    assert round((count + unused) / 1e6, 1) == millions


@pytest.mark.parametrize("name", ["gdn_qwen2", "gdn_qwen2_s0", "mamba2_qwen2", "dn_qwen3"])
def test_golden_checkpoints_hold_what_is_expected(name: str) -> None:
    config = json.loads((GOLDEN / "ahn" / name / "config.json").read_text())
    memory, shape = config["_ahn_implementation"], BaseShape.from_config(config)
    with safe_open(GOLDEN / "ahn" / name / "model.safetensors", "pt") as file:
        held = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    assert held == expected_tensors(memory, shape) | unused_tensors(memory, shape)
    assert all(is_ahn_tensor(tensor) for tensor in held)


def test_no_base_tensor_is_taken_for_an_ahn_tensor() -> None:
    for name in ("base_qwen2", "base_qwen3"):
        with safe_open(GOLDEN / name / "model.safetensors", "pt") as file:
            assert not any(is_ahn_tensor(tensor) for tensor in file.keys())  # noqa: SIM118


SHAPE = BaseShape("qwen3", 3, 128, 4, 2, 64)


def test_options_add_and_remove_tensors() -> None:
    plain = expected_tensors("GatedDeltaNet", SHAPE)
    with_q = expected_tensors("GatedDeltaNet", SHAPE, AHNOptions(use_q_proj=True))
    added = {f"model.layers.{n}.ahn.fn.q_proj.weight": (4, 64, 64) for n in range(3)}
    assert with_q == plain | added
    routed = expected_tensors("Mamba2", SHAPE, AHNOptions(use_router=True))
    assert routed["model.layers.2.ahn_router.alpha"] == routed["model.layers.2.ahn_router.beta"] == (4,)
    assert len(routed) == len(expected_tensors("Mamba2", SHAPE)) + 6
    # An AHNConfig serves as the options, too.
    full = AHNConfig("GatedDeltaNet", full_attention_layers=(1,))
    needed, unused = expected_tensors("GatedDeltaNet", SHAPE, full), unused_tensors("GatedDeltaNet", SHAPE, full)
    assert {int(name.split(".")[2]) for name in needed} == {0, 2}
    # The published trainer saves all layers alike.
    assert needed | unused == plain | unused_tensors("GatedDeltaNet", SHAPE)
    assert not needed.keys() & unused.keys()
    assert count_parameters("GatedDeltaNet", SHAPE, full) * 3 == count_parameters("GatedDeltaNet", SHAPE) * 2


def test_state_bytes() -> None:
    assert state_bytes(QWEN2_5["3B"]) == 36 * 16 * 128 * 128 * 4
    assert state_bytes(SHAPE, AHNOptions(full_attention_layers=(0,))) == 2 * 4 * 64 * 64 * 4


def test_unknown_memory() -> None:
    with pytest.raises(AHNError, match="memory is 'RWKV', expected one of GatedDeltaNet"):
        expected_tensors("RWKV", SHAPE)


QWEN2 = {
    "model_type": "qwen2",
    "num_hidden_layers": 36,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
}


def test_head_size() -> None:
    assert BaseShape.from_config(QWEN2) == QWEN2_5["3B"]
    assert BaseShape.from_config(SimpleNamespace(**QWEN2)) == QWEN2_5["3B"]
    assert BaseShape.from_config(QWEN2 | {"head_dim": None}).head_dim == 128
    assert BaseShape.from_config(QWEN2 | {"model_type": "qwen3", "head_dim": 64}).head_dim == 64
    # A Qwen3 whose config does not say has 128, whatever hidden / heads is.
    assert BaseShape.from_config(QWEN2 | {"model_type": "qwen3", "hidden_size": 1024}).head_dim == 128


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": None}, "hidden_size is None, expected a positive whole number"),
        ({"hidden_size": "2048"}, "hidden_size is '2048'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads is 2.0"),
        (
            {"num_key_value_heads": 3},
            "num_attention_heads is 16, expected a multiple of num_key_value_heads, 3",
        ),
        ({"hidden_size": 2050}, "hidden_size is 2050, expected a multiple of num_attention_heads, 16"),
        ({"head_dim": -1}, "head_dim is -1"),
        ({"model_type": 2}, "model_type is 2, expected the name of a model type"),
    ],
)
def test_bad_base_config(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(AHNError) as error:
        BaseShape.from_config(QWEN2 | change, "somewhere/config.json")
    assert str(error.value).startswith("somewhere/config.json: ")
    assert sentence in str(error.value)


@pytest.mark.parametrize("key", list(QWEN2))
def test_missing_field(key: str) -> None:
    with pytest.raises(AHNError, match=f"config.json: {key} is missing, expected"):
        BaseShape.from_config({name: value for name, value in QWEN2.items() if name != key})
