"""A process that asks for no AHN is as without the plugin, and arguments may be handed on in every way vLLM does it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_ahn import AHNConfig
from vllm_ahn.plugin.arguments import FLAG_OF_KEY
from vllm_ahn.reference import from_folders
from vllm_ahn.tools.tiny import TinyPaths, make_tiny

load_general_plugins()

WINDOW, SINKS = 24, 8

PROBE = """
import dataclasses, json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

def flat(value):
    # Fields by name, to any depth; an object without a representation of its own by its class.
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: flat(getattr(value, field.name)) for field in dataclasses.fields(value)}
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text

parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
flags = [action.option_strings[0] for action in parser._actions if action.option_strings]
for group in [group for group in parser._action_groups if group.title == "AHN"]:
    parser._action_groups.remove(group)
    for action in group._group_actions:
        parser._actions.remove(action)
        for flag in action.option_strings:
            del parser._option_string_actions[flag]
parser._search_keyword = "all"
help = parser.format_help()
command_line = ["--model", sys.argv[1], "--max-model-len", "256", "--additional-config", '{"of_someone_else": 1}']
args = AsyncEngineArgs.from_cli_args(parser.parse_args(command_line))
before = {name: repr(value) for name, value in vars(args).items()}
config = args.create_engine_config()
print(json.dumps({
    "flags": flags,
    "help": help,
    "vars": before,
    "vars afterwards": {name: repr(value) for name, value in vars(args).items()},
    "config": flat(config),
    "hash": config.compute_hash(),
    "excepthook": sys.excepthook is sys.__excepthook__,
    "modules": sorted(sys.modules),
}))
"""

LIGHT = {
    "vllm_ahn", "vllm_ahn.bases", "vllm_ahn.config", "vllm_ahn.device", "vllm_ahn.errors", "vllm_ahn.checkpoint",
    "vllm_ahn.memory", "vllm_ahn.memory.spec", "vllm_ahn.plugin", "vllm_ahn.published",
}  # fmt: skip
"""What a plain process has of this package, beside the modules of its plugin and of its checkpoint room."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyPaths:
    return make_tiny(tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def probe(base: Path, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(base)],
        # Transformers imports whatever is called "kernels", and the checkout has such a folder.
        cwd=base,
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    # A name drawn by chance for each configuration.
    found["config"].pop("instance_id")
    return found


@pytest.mark.slow
def test_a_process_without_an_ahn(tiny: TinyPaths) -> None:
    """Its arguments, its configuration, its help and its modules, with the plugin and without."""
    plain, ours = probe(tiny.base, VLLM_PLUGINS=""), probe(tiny.base)
    assert set(ours.pop("flags")) - set(plain.pop("flags")) == set(FLAG_OF_KEY.values())
    more = set(ours.pop("modules")) - set(plain.pop("modules"))
    package = {name for name in more if name.split(".")[0] == "vllm_ahn"}
    rest = {name for name in package if not name.startswith(("vllm_ahn.plugin.", "vllm_ahn.checkpoint."))}
    assert rest == LIGHT
    assert not [name for name in more if name.split(".")[0] in ("fla", "triton", "safetensors")]
    for name in plain:
        assert ours[name] == plain[name], name


def from_fields(args: EngineArgs) -> EngineArgs:
    return type(args)(**{field.name: getattr(args, field.name) for field in dataclasses.fields(args)})


WAYS: dict[str, Callable[[EngineArgs], EngineArgs]] = {
    "vars": lambda args: type(args)(**vars(args)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda args: pickle.loads(pickle.dumps(args)),
    "replace": lambda args: dataclasses.replace(args, seed=0),
    "fields": from_fields,
}


def from_command_line(*arguments: object) -> EngineArgs:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args([str(a) for a in arguments]))


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_hand_on_arguments(tiny: TinyPaths, way: str) -> None:
    """Before a configuration is made of them and afterwards, without an AHN and with one."""
    plain = from_command_line("--model", tiny.base)
    assert WAYS[way](plain) == plain
    assert WAYS[way](plain).create_engine_config().model_config.architecture == "Qwen2ForCausalLM"
    ours = from_command_line("--model", tiny.base, "--ahn", tiny.ahn, "--ahn-window", WINDOW, "--ahn-sinks", SINKS)
    expected = AHNConfig("GatedDeltaNet", WINDOW, SINKS, str(tiny.ahn))
    for _ in range(2):
        handed = WAYS[way](ours)
        assert handed == ours and vars(handed).keys() == vars(ours).keys()
        assert AHNConfig.from_vllm_config(handed.create_engine_config()) == expected
        ours.create_engine_config()


def test_the_arguments_keep_the_request(tiny: TinyPaths) -> None:
    """What is resolved is a copy, but what vLLM writes down on arguments is written down on the user's."""
    request = {"ahn": {"checkpoint": str(tiny.ahn), "window": WINDOW}}
    args = EngineArgs(model=str(tiny.base), additional_config=copy.deepcopy(request), max_model_len=300)
    assert args.max_num_seqs is None
    config = args.create_engine_config()
    assert args.additional_config == request and args.hf_overrides == {}
    assert args.max_num_seqs == config.scheduler_config.max_num_seqs
    assert args.tokenizer == config.model_config.tokenizer


def test_a_request_is_resolved_once(tiny: TinyPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_ahn import checkpoint
    from vllm_ahn.plugin import arguments

    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(arguments, "resolve", counted("request", arguments.resolve))
    monkeypatch.setattr(checkpoint, "resolve", counted("checkpoint", checkpoint.resolve))
    monkeypatch.setattr(arguments, "_base_config", counted("base", arguments._base_config))
    args = from_command_line("--model", tiny.base, "--ahn", tiny.ahn)
    assert calls == []
    args.create_engine_config()
    assert calls == ["request", "base", "checkpoint"]
    calls.clear()
    from_command_line("--model", tiny.base).create_engine_config()
    assert calls == ["request"]


def test_config_file(tiny: TinyPaths, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {tiny.base}\nahn: {tiny.ahn}\nahn-window: {WINDOW}\nahn-sinks: {SINKS}\n")
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = AsyncEngineArgs.from_cli_args(parser.parse_args(["--config", str(file)]))
    expected = AHNConfig("GatedDeltaNet", WINDOW, SINKS, str(tiny.ahn))
    assert AHNConfig.from_vllm_config(args.create_engine_config()) == expected


def test_one_namespace_serves_twice(tiny: TinyPaths) -> None:
    """vLLM starts several servers from one command line."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    namespace = parser.parse_args(["--model", str(tiny.base), "--ahn", str(tiny.ahn)])
    before = Namespace(**copy.deepcopy(vars(namespace)))
    first, second = (AsyncEngineArgs.from_cli_args(namespace) for _ in range(2))
    assert namespace == before
    assert first == second


@pytest.mark.parametrize("with_ahn", [False, True])
def test_llm_from_engine_args(tiny: TinyPaths, with_ahn: bool) -> None:
    """As ``vllm bench latency`` and ``throughput`` make their engine."""
    flags = ["--model", tiny.base, "--dtype", "float32", "--max-model-len", 256, "--enforce-eager"]
    flags += ["--kv-cache-memory-bytes", 64 << 20, "--distributed-executor-backend", "uni"]
    if with_ahn:
        flags += ["--ahn", tiny.ahn, "--ahn-window", WINDOW, "--ahn-sinks", SINKS]
    llm = LLM.from_engine_args(from_command_line(*flags))
    prompt = torch.randint(500, (60,), generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    try:
        (output,) = llm.generate({"prompt_token_ids": prompt.tolist()}, params, use_tqdm=False)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    reference = from_folders(tiny.base, tiny.ahn if with_ahn else None, WINDOW, SINKS)
    assert list(output.outputs[0].token_ids) == reference.generate(prompt[None], 6).tokens[0].tolist()
