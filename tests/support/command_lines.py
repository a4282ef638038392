"""Command lines of the documents, held against the parsers of the programs that they call. Nothing is run."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import vllm

from support.documents import Block, Command
from support.paths import ROOT, TESTS
from vllm_ahn.tools import cli

PLACEHOLDERS = {"BASE", "CKPT", "ADAPTER", "my-ahn", "none"}
"""Models that stand for the reader's own."""

HUB = re.compile(r"(Qwen|ByteDance-Seed)/[\w.-]+")

SHELL = ("bash", "console")


class Parsed(Exception):
    """The ``vllm-ahn`` command has taken its arguments, which it holds."""


def parse_vllm_ahn(words: list[str]) -> argparse.Namespace:
    """Parse with the command's own parser, whatever builds it."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        raise Parsed(original(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        try:
            cli.main(words[1:])
        except Parsed as parsed:
            namespace: argparse.Namespace = parsed.args[0]
            return namespace
    raise AssertionError("the command did not parse its arguments")


def parse_vllm(words: list[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    serve = ServeSubcommand()
    serve.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args(words[1:])
    args.model = args.model_tag
    serve.validate(args)
    for name in (args.model, getattr(args, "ahn", None)):
        if name is None or name in PLACEHOLDERS or HUB.fullmatch(name):
            continue
        assert Path(name).exists(), f"there is no model {name}"


def parse_lm_eval(words: list[str]) -> None:
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    if words[1].startswith("-"):
        words = [words[0], "run", *words[1:]]
    args = HarnessCLI()._parser.parse_args(words[1:])
    assert args.model == "vllm"
    known = {*inspect.signature(VLLM.__init__).parameters, *inspect.signature(vllm.EngineArgs).parameters}
    assert args.model_args.keys() <= known, f"lm-eval passes {args.model_args.keys() - known} to nobody"
    assert args.include_path is not None, "lm-eval's own tasks are not known here"
    tasks = TaskManager(include_path=args.include_path, include_defaults=False).all_tasks
    assert set(args.tasks) <= set(tasks), f"there is no task {set(args.tasks) - set(tasks)}"


def parse_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def parse_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[1] == "install" and len(words) == 3
    match = re.fullmatch(r"\.(?:\[(\w+)\])?", words[2])
    assert match is not None, f"{words[2]} is not this checkout"
    assert match[1] is None or match[1] in extras, f"there is no extra {match[1]}"


def parse_python(words: list[str]) -> None:
    """``python -m pytest``: its paths exist. Programs are parsed together, see `test_programs`."""
    if words[1:3] == ["-m", "pytest"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("paths", nargs="+")
        parser.add_argument("-k")
        for path in parser.parse_args(words[3:]).paths:
            assert (ROOT / path).exists(), f"there is no {path}"
    else:
        assert (ROOT / words[1]).is_file(), f"there is no program {words[1]}"


def parse_script(words: list[str]) -> None:
    assert os.access(ROOT / words[0], os.X_OK), f"there is no program {words[0]}"


PARSERS = {
    "vllm-ahn": parse_vllm_ahn,
    "vllm": parse_vllm,
    "lm_eval": parse_lm_eval,
    "make": parse_make,
    "pip": parse_pip,
    "python": parse_python,
    ".venv/bin/python": parse_python,
    "requirements/make-venv.sh": parse_script,
}


def words_of(command: Command) -> list[str]:
    """The command's words, with the one substitution that pages use."""
    words = command.words
    if "$(vllm-ahn tasks)" in words:
        folder = io.StringIO()
        with contextlib.redirect_stdout(folder):
            assert cli.main(["tasks"]) == 0
        words = [folder.getvalue().strip() if word == "$(vllm-ahn tasks)" else word for word in words]
    return words


def check_command(command: Command, excused: bool = False) -> None:
    """Hold a command against its parser. Raises ``AssertionError`` or ``SystemExit``."""
    words = words_of(command)
    if words[0] not in PARSERS:
        assert excused, f"nothing here can parse {command.line!r}: say why it is not run"
        return
    PARSERS[words[0]](words)


def programs(blocks: list[Block]) -> list[list[str]]:
    commands = [command.words for block in blocks if block.language in SHELL for command in block.commands]
    return [words[1:] for words in commands if words[0].endswith("python") and words[1] != "-m"]


def parse_programs(lines: list[list[str]]) -> list[str | None]:
    done = subprocess.run(
        [sys.executable, TESTS / "support" / "parse_scripts.py"],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems: list[str | None] = json.loads(done.stdout)
    return problems
