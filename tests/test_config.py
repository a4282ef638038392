"""`AHNConfig`: what it accepts, what it refuses, and its way through JSON."""

import json

import pytest

from vllm_ahn.config import AHNConfig, check_sinks, check_window, parse_length
from vllm_ahn.errors import AHNError


def test_defaults_are_the_papers() -> None:
    config = AHNConfig("GatedDeltaNet")
    assert (config.window, config.sinks, config.capacity) == (32640, 128, 32768)
    assert config.checkpoint is None
    assert not config.use_q_proj and not config.use_router and config.full_attention_layers == ()


@pytest.mark.parametrize(
    "config",
    [
        AHNConfig("Mamba2"),
        AHNConfig("GatedDeltaNet", 24, 0, "org/repo", "main", True, True, (0, 3)),
        AHNConfig("DeltaNet", window=1, checkpoint="/some/folder", state_dtype="bfloat16"),
    ],
)
def test_round_trip_through_json(config: AHNConfig) -> None:
    assert AHNConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


NUMBER = "expected a whole number of tokens"


@pytest.mark.parametrize("value", [0, -1, 1.0, 24.5, True, None, "abc", "24", [24], float("nan"), 2**31])
def test_window_refused(value: object) -> None:
    with pytest.raises(AHNError, match=rf"window \(--ahn-window\) is .*{NUMBER} from 1") as error:
        AHNConfig.from_dict({"memory": "Mamba2", "window": value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [-1, 0.0, False, None, "", "8x", {}, 2**31])
def test_sinks_refused(value: object) -> None:
    with pytest.raises(AHNError, match=rf"sinks \(--ahn-sinks\) is .*{NUMBER} from 0"):
        AHNConfig.from_dict({"memory": "Mamba2", "sinks": value})


def test_least_lengths() -> None:
    assert check_window(1) == 1
    assert check_sinks(0) == 0


def test_parse_length_reads_numbers_and_leaves_the_rest() -> None:
    assert parse_length(" 32640 ") == 32640
    assert parse_length("-5") == -5
    for value in ("", "1.5", "1e3", "0x10", "abc", "٣", "9" * 30, 1.5, True, None):
        assert parse_length(value) is value


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"memory": "LSTM"}, "memory is 'LSTM', expected one of GatedDeltaNet, DeltaNet, Mamba2"),
        ({"memory": ["Mamba2"]}, "expected one of GatedDeltaNet"),
        ({}, "memory is missing"),
        ({"memory": "Mamba2", "windows": 3}, "unknown key 'windows', expected only memory, window"),
        ({"memory": "Mamba2", "checkpoint": 3}, "checkpoint is 3, expected a non-empty string"),
        ({"memory": "Mamba2", "checkpoint": ""}, "checkpoint is '', expected a non-empty string"),
        ({"memory": "Mamba2", "revision": "main"}, "revision is 'main', but there is no checkpoint"),
        ({"memory": None, "use_router": True}, "memory is None, expected neither a checkpoint nor options"),
        ({"memory": "Mamba2", "use_router": 1}, "use_router is 1, expected true or false"),
        (
            {"memory": "Mamba2", "use_q_proj": True},
            "use_q_proj is true, expected false for Mamba2: only GatedDeltaNet",
        ),
        ({"memory": "Mamba2", "full_attention_layers": "3,7"}, "full_attention_layers is '3,7'"),
        ({"memory": "Mamba2", "full_attention_layers": [-1]}, "expected a tuple of layer numbers"),
        ({"memory": "Mamba2", "full_attention_layers": [True]}, "expected a tuple of layer numbers"),
        ({"memory": "Mamba2", "full_attention_layers": [3, 1]}, "expected ascending numbers, each once"),
        ({"memory": "Mamba2", "full_attention_layers": [3, 3]}, "expected ascending numbers, each once"),
        ("Mamba2", "expected to be a dict, but is 'Mamba2'"),
    ],
)
def test_from_dict_refuses(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(AHNError) as error:
        AHNConfig.from_dict(values)
    assert sentence in str(error.value)
