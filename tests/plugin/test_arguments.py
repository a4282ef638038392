"""Every way to ask for an AHN leads to the same configuration, and the lengths follow from it."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm import EngineArgs
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_ahn
from vllm_ahn import AHNConfig, AHNError
from vllm_ahn.plugin import arguments, overrides
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

load_general_plugins()

WINDOW, SINKS = 24, 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("merged"), merged=True, max_position_embeddings=512).base


def from_command_line(*arguments: object) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args([str(a) for a in arguments]))


def request_for(tiny: TinyPaths, **lengths: int) -> dict[str, Any]:
    return {"ahn": {"checkpoint": str(tiny.ahn), **lengths}}


def served(args: EngineArgs) -> tuple[AHNConfig, Any]:
    config = args.create_engine_config()
    return AHNConfig.from_vllm_config(config), config.model_config


def test_every_way_in_gives_the_same(tiny: TinyPaths) -> None:
    base, ahn = str(tiny.base), str(tiny.ahn)
    ways = [
        from_command_line("--model", base, "--ahn", ahn, "--ahn-window", WINDOW, "--ahn-sinks", SINKS),
        from_command_line(
            "--model", base, "--additional-config", json.dumps(request_for(tiny, window=WINDOW, sinks=SINKS))
        ),
        from_command_line(
            "--model", base, "--ahn-window", WINDOW,
            "--additional-config", json.dumps(request_for(tiny, sinks=SINKS)),
        ),
        EngineArgs(model=base, additional_config=request_for(tiny, window=WINDOW, sinks=SINKS)),
        EngineArgs(
            model=base,
            additional_config=arguments.with_flags({}, checkpoint=ahn, window=WINDOW, sinks=SINKS),
        ),
    ]  # fmt: skip
    expected = AHNConfig(memory="GatedDeltaNet", window=WINDOW, sinks=SINKS, checkpoint=ahn)
    for args in ways:
        config, model_config = served(args)
        assert config == expected
        assert model_config.architectures == ["AHNQwen2ForCausalLM"]
        assert model_config.max_model_len == 512


def test_checkpoint_interval(tiny: TinyPaths) -> None:
    base, flags = str(tiny.base), ("--ahn", tiny.ahn, "--ahn-window", WINDOW)
    ways = [
        from_command_line("--model", base, *flags, "--ahn-checkpoint-interval", 4096),
        EngineArgs(model=base, additional_config=request_for(tiny, window=WINDOW, checkpoint_interval=4096)),
    ]
    for args in ways:
        assert served(args)[0].checkpoint_interval == 4096
    assert served(from_command_line("--model", base, *flags))[0].checkpoint_interval is None
    assert (
        served(from_command_line("--model", base, *flags, "--ahn-checkpoint-interval", 0))[0].checkpoint_interval == 0
    )
    with pytest.raises(AHNError, match=r"checkpoint_interval \(--ahn-checkpoint-interval\) is -1, expected .* from 0"):
        served(from_command_line("--model", base, *flags, "--ahn-checkpoint-interval", -1))
    with pytest.raises(AHNError, match="--ahn-checkpoint-interval without --ahn, expected a checkpoint"):
        served(from_command_line("--model", base, "--ahn-checkpoint-interval", 4096))


def test_defaults(tiny: TinyPaths) -> None:
    for args in (
        EngineArgs(model=str(tiny.base), additional_config={"ahn": str(tiny.ahn)}),
        from_command_line("--model", tiny.base, "--ahn", tiny.ahn),
    ):
        config, model_config = served(args)
        assert (config.window, config.sinks) == (32640, 128)
        assert model_config.max_model_len == 131072
        assert model_config.hf_config.max_position_embeddings == 131072


@pytest.mark.parametrize(
    ("window", "sinks", "requested", "length", "positions"),
    [
        (24, 8, None, 512, 512),  # the base's own length, already more than 4 (W + S)
        (24, 8, 100, 100, 512),  # tables are never made smaller
        (24, 8, 512, 512, 512),
        (24, 8, 4096, 4096, 4096),  # beyond the base's own length without a further flag
        (1000, 24, None, 4096, 4096),  # 4 (W + S)
        (1000, 24, 2000, 2000, 2000),
        (1000, 24, -1, 4096, 4096),  # "auto": the memory of the machine may lower it later
        (1000, 24, "2048", 2048, 2048),
    ],
)
def test_lengths(tiny: TinyPaths, window: int, sinks: int, requested: Any, length: int, positions: int) -> None:
    extra = request_for(tiny, window=window, sinks=sinks)
    args = EngineArgs(model=str(tiny.base), additional_config=extra, max_model_len=requested)
    _, model_config = served(args)
    assert model_config.max_model_len == length
    assert model_config.hf_config.max_position_embeddings == positions
    assert model_config.hf_text_config.max_position_embeddings == positions


@pytest.mark.parametrize(("text", "length"), [("8k", 8000), ("8K", 8192), ("131072", 131072), ("auto", 512)])
def test_max_model_len_on_the_command_line(tiny: TinyPaths, text: str, length: int) -> None:
    args = from_command_line(
        "--model", tiny.base, "--ahn", tiny.ahn, "--ahn-window", 24, "--ahn-sinks", 8, "--max-model-len", text
    )
    assert served(args)[1].max_model_len == length


def test_scaled_positions_are_left_alone(tiny: TinyPaths) -> None:
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    config = AHNConfig(memory="DeltaNet", window=1000, sinks=24)

    class Base:
        max_position_embeddings = 512
        rope_parameters = scaled

    assert overrides.rope_positions(config, Base(), None) is None
    Base.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    assert overrides.rope_positions(config, Base(), None) == 4096


def test_a_length_that_never_uses_the_memory_is_warned_of(
    tiny: TinyPaths, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AHNConfig(memory="DeltaNet", window=24, sinks=8)
    assert overrides.unused_memory(config, 33) is None
    assert "24 + 8 = 32" in str(overrides.unused_memory(config, 32))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="vllm"):
        served(
            EngineArgs(model=str(tiny.base), max_model_len=31, additional_config=request_for(tiny, window=24, sinks=8))
        )
    assert [r.message for r in caplog.records if "memory would never be used" in r.message]


def double_theta(config: Any) -> Any:
    config.update({"rope_theta": 20000.0, "initializer_range": 0.5})
    return config


@pytest.mark.parametrize("theirs", [{"initializer_range": 0.5}, double_theta])
def test_the_users_own_overrides_are_kept(tiny: TinyPaths, theirs: Any) -> None:
    args = EngineArgs(
        model=str(tiny.base),
        hf_overrides=theirs,
        max_model_len=1000,
        additional_config=request_for(tiny, window=24, sinks=8),
    )
    for _ in range(2):
        _, model_config = served(args)
        assert model_config.hf_config.initializer_range == 0.5
        assert model_config.architectures == ["AHNQwen2ForCausalLM"]
        assert model_config.max_model_len == 1000
    assert args.hf_overrides is theirs
    copied = pickle.loads(pickle.dumps(model_config))
    assert copied.hf_config.max_position_embeddings == 1000


def test_asking_again_changes_nothing(tiny: TinyPaths) -> None:
    extra = request_for(tiny, window=24, sinks=8)
    args = EngineArgs(model=str(tiny.base), additional_config=extra, max_model_len=1000)
    first = served(args)
    second = served(args)
    assert first[0] == second[0]
    assert first[1].compute_hash() == second[1].compute_hash()
    assert extra == request_for(tiny, window=24, sinks=8), "the user's own dict was changed"


def test_what_stays_the_bases(tiny: TinyPaths) -> None:
    plain = EngineArgs(model=str(tiny.base)).create_model_config()
    _, ours = served(EngineArgs(model=str(tiny.base), additional_config=request_for(tiny, window=24)))
    for name in ("model", "tokenizer", "served_model_name", "dtype", "generation_config"):
        assert getattr(ours, name) == getattr(plain, name)
    assert ours.try_get_generation_config() == plain.try_get_generation_config()
    assert ours.get_diff_sampling_param() == plain.get_diff_sampling_param()


def test_a_model_without_ahn_is_left_alone(tiny: TinyPaths) -> None:
    args = EngineArgs(model=str(tiny.base), additional_config={"of_someone_else": 1})
    model_config = args.create_model_config()
    assert args.additional_config == {"of_someone_else": 1}
    assert model_config.architectures == ["Qwen2ForCausalLM"]
    assert model_config.max_model_len == 512


def test_merged(merged: Path) -> None:
    config, model_config = served(EngineArgs(model=str(merged)))
    assert config == AHNConfig(memory="GatedDeltaNet")
    assert model_config.architectures == ["AHNQwen2ForCausalLM"]
    assert model_config.max_model_len == 131072
    config, _ = served(EngineArgs(model=str(merged), additional_config={"ahn": {"window": 24, "sinks": 8}}))
    assert config == AHNConfig(memory="GatedDeltaNet", window=24, sinks=8)
    config, _ = served(from_command_line("--model", merged, "--ahn-window", 24))
    assert config == AHNConfig(memory="GatedDeltaNet", window=24)


def test_none_is_sinks_and_window_without_a_memory(tiny: TinyPaths, merged: Path) -> None:
    for args in (
        from_command_line("--model", tiny.base, "--ahn", "none", "--ahn-window", WINDOW),
        EngineArgs(model=str(tiny.base), additional_config={"ahn": {"checkpoint": "none", "window": WINDOW}}),
        from_command_line("--model", merged, "--ahn", "none", "--ahn-window", WINDOW),
        # No second checkpoint is read, so any load format will do.
        EngineArgs(model=str(tiny.base), load_format="pt", additional_config=arguments.with_flags(
            {}, checkpoint="none", window=WINDOW)),
    ):  # fmt: skip
        for _ in range(2):  # what was resolved resolves to itself
            config, model_config = served(args)
            assert config == AHNConfig(None, window=WINDOW)
            assert model_config.architectures == ["AHNQwen2ForCausalLM"]


def test_the_training_window_in_a_merged_checkpoint_is_ignored(merged: Path, tmp_path: Path) -> None:
    for file in merged.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((merged / "config.json").read_text())
    values |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(values))
    _, model_config = served(EngineArgs(model=str(tmp_path)))
    assert model_config.get_sliding_window() is None
    assert set(model_config.hf_config.layer_types) == {"full_attention"}


def test_the_whole_configuration(tiny: TinyPaths) -> None:
    args = EngineArgs(model=str(tiny.base), max_model_len=2048, additional_config=request_for(tiny, window=24, sinks=8))
    config = args.create_engine_config()
    assert config.model_config.max_model_len == 2048
    assert config.cache_config.sliding_window is None
    json.dumps(config.additional_config)
    assert config.compute_hash() == args.create_engine_config().compute_hash()
    other = EngineArgs(
        model=str(tiny.base), max_model_len=2048, additional_config=request_for(tiny, window=25, sinks=8)
    ).create_engine_config()
    assert config.compute_hash() != other.compute_hash(), "compiled code would be shared"


def test_flags_are_documented() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    parser._search_keyword = "ahn"
    text = parser.format_help()
    for part in (
        "AHN:",
        "--ahn CKPT[@revision]",
        "--ahn-window N",
        "--ahn-sinks N",
        "--ahn-checkpoint-interval N",
        "32640",
    ):
        assert part in text
    parser._search_keyword = None
    assert "--ahn CKPT" in parser.format_help()


def test_with_flags() -> None:
    assert arguments.with_flags(None) is None
    assert arguments.with_flags({"a": 1}, checkpoint="c") == {"a": 1, "ahn": {"checkpoint": "c"}}
    assert arguments.with_flags({"ahn": "c"}, sinks=0) == {"ahn": {"checkpoint": "c", "sinks": 0}}
    with pytest.raises(AHNError, match=r"--ahn-window is 3 and .* gives window as well"):
        arguments.with_flags({"ahn": {"window": 3}}, window=3)
    with pytest.raises(AHNError, match="expected a checkpoint or a dict"):
        arguments.with_flags({"ahn": 3}, window=3)
    with pytest.raises(AHNError, match="expected a dict where --ahn is given"):
        arguments.with_flags("text", checkpoint="c")


def test_llm_refuses_what_would_be_the_plain_model(tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AHNError, match="has no AHN merged in; pass a checkpoint with --ahn"):
        vllm_ahn.LLM(str(tiny.base))
    with pytest.raises(AHNError, match="no such folder"):
        vllm_ahn.LLM(str(tiny.base), ahn="/nowhere/ahn")
    with pytest.raises(AHNError, match="--ahn-window"):
        vllm_ahn.LLM(str(tiny.base), ahn=str(tiny.ahn), ahn_window=0)
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    with pytest.raises(AHNError, match="leaves the AHN plugin out"):
        vllm_ahn.LLM(str(tiny.base), ahn=str(tiny.ahn))


def test_merged_model_is_not_served_plain_without_the_plugin(merged: Path) -> None:
    """vLLM's own model has no place for the AHN's tensors: where no plugin runs, loading fails."""
    code = f"from vllm import LLM; LLM({str(merged)!r}, enforce_eager=True, max_model_len=64)"
    environment = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "no module or parameter named 'layers.0.ahn'" in done.stderr, done.stderr[-2000:]


def test_flags_are_unknown_without_the_plugin(tiny: TinyPaths) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("vllm"), "serve", tiny.base, "--ahn", str(tiny.ahn)],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "unrecognized arguments: --ahn" in done.stderr
