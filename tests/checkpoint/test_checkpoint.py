"""`checkpoint.resolve`: what it answers, and the sentence it has for each bad setting and base."""

import dataclasses
import pathlib
import shutil
from types import SimpleNamespace

import pytest

from support.checkpoint_case import SMALL, Case, read_base
from support.paths import GOLDEN
from vllm_ahn.checkpoint import looks_merged, resolve
from vllm_ahn.config import AHNConfig
from vllm_ahn.errors import AHNError
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


# What is served


@pytest.mark.parametrize(
    ("ahn", "base", "memory"),
    [
        ("gdn_qwen2", "base_qwen2", "GatedDeltaNet"),
        ("gdn_qwen2_s0", "base_qwen2", "GatedDeltaNet"),
        ("mamba2_qwen2", "base_qwen2", "Mamba2"),
        ("dn_qwen3", "base_qwen3", "DeltaNet"),
    ],
)
def test_golden_checkpoints(ahn: str, base: str, memory: str) -> None:
    folder = GOLDEN / "ahn" / ahn
    config = Case(GOLDEN / base, folder).resolve()
    # Their config.json says sliding_window 24 and num_attn_sinks 8, which is not what serving uses.
    assert config == AHNConfig(memory, 32640, 128, str(folder))


def test_ways_to_ask(case: Case) -> None:
    expected = AHNConfig("GatedDeltaNet", 64, 4, str(case.ahn))
    name = str(case.ahn)
    assert case.resolve({"checkpoint": name, "window": 64, "sinks": 4}) == expected
    assert case.resolve({"checkpoint": case.ahn, "window": "64", "sinks": "4"}) == expected
    assert case.resolve({"checkpoint": name, "window": None}) == AHNConfig("GatedDeltaNet", checkpoint=name)
    assert case.resolve({"checkpoint": name, "sinks": 0}) == AHNConfig("GatedDeltaNet", sinks=0, checkpoint=name)
    assert case.resolve(case.ahn) == case.resolve(name)


def test_no_ahn_is_none_whatever_the_base(made: TinyPaths) -> None:
    assert resolve(None, base="x", base_revision=None, base_config=SimpleNamespace()) is None
    assert not looks_merged(read_base(made.base))


def test_a_folder_with_an_at_sign(case: Case) -> None:
    folder = case.ahn.rename(case.ahn.parent / "ahn@2")
    config = case.resolve(str(folder))
    assert config is not None and config.checkpoint == str(folder) and config.revision is None


@pytest.mark.parametrize("memory", ["GatedDeltaNet", "DeltaNet", "Mamba2"])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_every_memory_and_base(memory: str, model_type: str, tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, memory=memory, model_type=model_type, dtype="bfloat16", **SMALL)
    assert made.ahn is not None
    assert Case(made.base, made.ahn).resolve() == AHNConfig(memory, checkpoint=str(made.ahn))


@pytest.mark.parametrize("layers", ["1", " 1 ,", ["1"], [1], 1])
def test_options(layers: object, tmp_path: pathlib.Path) -> None:
    made = make_tiny(tmp_path, use_q_proj=True, use_router=True, fa_layer_ids="1", shards=2, **SMALL)
    assert made.ahn is not None
    case = Case(made.base, made.ahn)
    case.change_config(fa_layer_ids=layers)
    config = case.resolve()
    assert config is not None
    assert (config.use_q_proj, config.use_router, config.full_attention_layers) == (True, True, (1,))


def test_keys_that_mean_nothing_or_are_absent(case: Case) -> None:
    expected = case.resolve()
    case.change_config(sliding_window="?", num_attn_sinks=-3, dy_sliding_window=None, fa_layer_ids=None)
    case.change_config(use_q_proj=..., use_ahn_router=None, _layer_implementation=...)
    case.change_tensors(**{"0__ahn__fn__D": None, "1__ahn__fn__D": None})
    assert case.resolve() == expected


def test_merged(made_merged: pathlib.Path) -> None:
    merged, base_config = str(made_merged), read_base(made_merged)
    assert looks_merged(base_config)

    def ask(setting: object) -> AHNConfig | None:
        return resolve(setting, base=merged, base_revision=None, base_config=base_config)

    assert ask(None) == ask({}) == AHNConfig("GatedDeltaNet")
    assert ask({"window": 5, "sinks": 0}) == AHNConfig("GatedDeltaNet", 5, 0)
    assert ask({"sinks": "7"}) == AHNConfig("GatedDeltaNet", sinks=7)


def test_resolved_settings_come_back_unchanged(case: Case, made_merged: pathlib.Path) -> None:
    config = case.resolve({"checkpoint": str(case.ahn), "window": 9})
    assert config is not None
    assert case.resolve(config.to_dict()) == config
    shutil.rmtree(case.ahn)  # it is checked like any other, however often
    case.refused("no such folder", setting=config.to_dict())
    base_config = read_base(made_merged)
    own = resolve({"window": 9}, base=str(made_merged), base_revision=None, base_config=base_config)
    assert own is not None
    again = resolve(own.to_dict(), base=str(made_merged), base_revision=None, base_config=base_config)
    assert again == own == AHNConfig("GatedDeltaNet", 9)


def test_a_resolved_setting_from_elsewhere_is_checked(case: Case) -> None:
    good = AHNConfig("GatedDeltaNet", 77, 3, str(case.ahn))
    assert case.resolve(good.to_dict()) == good
    wrong = dataclasses.replace(good, memory="Mamba2")
    case.refused("'memory': 'Mamba2'", "'memory': 'GatedDeltaNet'", setting=wrong.to_dict())
    case.refused("no such folder", setting=dataclasses.replace(good, checkpoint="/no/such").to_dict())


# Settings


@pytest.mark.parametrize("value", [0, -1, 1.5, "abc", "", True, [4], 10**12])
def test_bad_window(case: Case, value: object) -> None:
    setting = {"checkpoint": str(case.ahn), "window": value}
    case.refused("--ahn-window", repr(value), "expected a whole number of tokens from 1", setting=setting)


@pytest.mark.parametrize("value", [-1, "-1", 0.0, "many", False])
def test_bad_sinks(case: Case, value: object) -> None:
    setting = {"checkpoint": str(case.ahn), "sinks": value}
    case.refused("--ahn-sinks", "expected a whole number of tokens from 0", setting=setting)


def test_bad_settings(case: Case) -> None:
    name = str(case.ahn)
    case.refused("unknown key 'windows', 'x'", "'checkpoint'", setting={"checkpoint": name, "windows": 1, "x": 2})
    case.refused("unknown key 'memory'", setting={"checkpoint": name, "memory": "Mamba2"})
    case.refused("ahn: is 3, expected a checkpoint or a dict", setting=3)
    case.refused("ahn: is [", "expected a checkpoint or a dict", setting=[name])
    case.refused("checkpoint is '', expected a folder or a hub repository", setting="")
    case.refused("checkpoint is 7", setting={"checkpoint": 7})


def test_lengths_without_a_checkpoint(case: Case) -> None:
    base = str(case.base)
    case.refused("--ahn-window without --ahn,", "expected a checkpoint", base, setting={"window": 4})
    case.refused("--ahn-sinks without --ahn,", setting={"checkpoint": None, "sinks": 4})
    case.refused("--ahn-window and --ahn-sinks without --ahn", setting={"window": 4, "sinks": 4})
    case.refused(f"{base} has no AHN merged in; pass a checkpoint with --ahn (ahn= in Python)", setting={})


def test_merged_base_with_another_checkpoint(case: Case, made_merged: pathlib.Path) -> None:
    merged = Case(made_merged, case.ahn)
    merged.refused(str(made_merged), "has an AHN of its own", f"expected no --ahn {case.ahn}")


def test_merged_checkpoint_beside_a_base(case: Case, made_merged: pathlib.Path) -> None:
    case.refused(str(made_merged), "holds a whole base model", "without --ahn", setting=str(made_merged))


def test_ahn_checkpoint_as_the_base(case: Case) -> None:
    with pytest.raises(AHNError, match=r"holds an AHN but no base model .*expected the base as the model"):
        resolve(None, base=str(case.ahn), base_revision=None, base_config=read_base(case.ahn))


@pytest.mark.parametrize("named", [["Qwen2MoeForCausalLM"], ["LlamaForCausalLM"], [], None])
def test_base_without_ahn_support(case: Case, named: list[str] | None, made_merged: pathlib.Path) -> None:
    for folder, setting in ((case.base, str(case.ahn)), (made_merged, None)):
        base_config = read_base(folder)
        base_config.architectures = named
        sentence = Case(folder, case.ahn).refused(
            str(folder), "architectures in config.json is", setting=setting, base_config=base_config
        )
        assert sentence.endswith("but AHN is implemented only for Qwen2ForCausalLM, Qwen3ForCausalLM")
        assert f"is {named or []}, " in sentence


def test_without_weights_a_config_is_enough(case: Case) -> None:
    case.weights.unlink()
    assert case.resolve(weights=False) == AHNConfig("GatedDeltaNet", checkpoint=str(case.ahn))
    case.change_config(hidden_size=64)
    case.refused("hidden_size is 64, expected 32", weights=False)
