"""What README, CONTRIBUTING and the pages in docs/ show works as shown.

Every fenced block is run, or parsed by the real argument parsers, or says in a comment before it why it is not run;
its commands are parsed all the same. Links and paths lead to something.
"""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import inspect
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm

from support import documents
from support.documents import PAGES, Block, Command
from support.engines import DEFAULTS
from support.paths import ROOT, TESTS
from support.servers import environment, program
from support.servers import run as run_process
from vllm_ahn.tools import cli
from vllm_ahn.tools.tiny import make_tiny

NOT_RUN = {
    "CONTRIBUTING.md": 1,
    "README.md": 1,
    "architecture.md": 1,
    "cost.md": 1,
    "evaluation.md": 1,
    "usage.md": 4,
}
"""Blocks with a comment that says why they are not run. To add one is a decision, so it changes this table too."""

PLACEHOLDERS = {"BASE", "CKPT", "ADAPTER", "my-ahn", "none"}
"""Models that stand for the reader's own."""

HUB = re.compile(r"(Qwen|ByteDance-Seed)/[\w.-]+")

NOT_IN_THE_REPOSITORY = {
    "Infinigence/LVEval/cmrc_mixup.zip",
    "xinrongzhang2022/InfiniteBench/longbook_qa_eng.jsonl",
    "THUDM/LongBench/data.zip",
    ".contract/",
}
"""Paths that pages name and that are made, or on the hub."""

SHELL = ("bash", "console")

BLOCKS = [block for page in PAGES for block in documents.blocks(page)]


# What a command line may be.


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


# Sessions: the commands of a page, in its order, in a folder like a checkout.


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for entry in ("LICENSE", "benchmarks", "examples", "requirements"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def printed_by(words: list[str], folder: Path) -> str:
    """What a command prints when it is run. Engines and servers are not started here."""
    if words[0] == "vllm":  # all that may be run of it is what ends in an error
        command = [program("vllm"), *words[1:]]
        done = run_process(command, env=environment(folder / "cache", VLLM_LOGGING_LEVEL="ERROR"), timeout=240)
        assert done.returncode == 1, done.stdout + done.stderr
        return done.stderr[done.stderr.rindex("error: ") :]
    assert words[0] == "vllm-ahn", f"{words[0]} is not run: say why"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = cli.main(words[1:])
    assert code == 0, printed.getvalue()
    return printed.getvalue()


def matches(expected: str, printed: str) -> bool:
    """Whether `printed` is `expected`, in which "..." stands for anything."""

    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.strip().splitlines())

    pattern = ".*".join(re.escape(part) for part in tidy(expected).split("..."))
    return re.fullmatch(pattern, tidy(printed), re.DOTALL) is not None


def check_session(blocks: list[Block], folder: Path) -> None:
    for block in blocks:
        for command in block.commands if block.language in SHELL else ():
            check_command(command, excused=block.reason is not None)
            if block.language == "console" and block.reason is None:
                printed = printed_by(words_of(command), folder)
                assert matches(command.output, printed), f"{block.where}: {command.line} prints\n{printed}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands(page: Path, session: Path) -> None:
    """Commands are taken by their parsers, and print what the page shows."""
    check_session([block for block in BLOCKS if block.page == page], session)


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


def test_programs(session: Path) -> None:
    """Programs of the repository take the arguments that pages give them."""
    lines = programs(BLOCKS)
    assert len(lines) >= 6
    problems = parse_programs([*lines, ["examples/offline.py", "--no-such-flag"]])
    assert problems[:-1] == [None] * len(lines)
    assert problems[-1] is not None and "--no-such-flag" in problems[-1]


def test_programs_in_the_repository_are_there() -> None:
    for block in BLOCKS:
        for word in itertools.chain.from_iterable(
            command.words for command in block.commands if block.language == "bash"
        ):
            if word.startswith(("examples/", "benchmarks/", "tests/", "requirements/")):
                assert (ROOT / word).exists(), f"{block.where}: there is no {word}"


# Python.


def check_python(text: str) -> None:
    """Compile a block and resolve what it imports. Raises ``SyntaxError``, ``ImportError`` or ``AttributeError``."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            exec(compile(ast.Module([node], []), "imports", "exec"), {})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.where)
def test_python(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run, with a random model in place of the published one and with the engine's settings of these tests."""
    check_python(block.text)
    tiny = make_tiny(tmp_path, memory="DeltaNet")
    text, bases = re.subn(r'"Qwen/[\w.-]+"', repr(str(tiny.base)), block.text)
    text, checkpoints = re.subn(r'"ByteDance-Seed/[\w.-]+"', repr(str(tiny.ahn)), text)
    assert bases and checkpoints
    original, engines = vllm.LLM.__init__, []
    defaults = {name: value for name, value in DEFAULTS.items() if name not in ("skip_tokenizer_init", "max_model_len")}

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **defaults | kwargs)
        engines.append(self.llm_engine)

    monkeypatch.setattr(vllm.LLM, "__init__", init)
    try:
        exec(compile(text, block.where, "exec"), {})
        assert len(engines) == block.text.count("LLM(")
        for engine in engines:
            assert engine.vllm_config.additional_config["ahn"]["memory"] == "DeltaNet"
    finally:
        for engine in engines:
            engine.engine_core.shutdown()


# Links, paths, names.


LINKING = [*PAGES, *ROOT.glob("*/README.md"), *ROOT.glob("examples/*/README.md")]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    assert [error for link in documents.links(page) if (error := documents.broken_link(page, link))] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths(page: Path) -> None:
    names = set(documents.named_paths(page)) - NOT_IN_THE_REPOSITORY
    assert [name for name in sorted(names) if not documents.path_exists(page, name)] == []


def test_pages_are_reachable() -> None:
    linked = {(ROOT / link).resolve() for link in documents.links(ROOT / "README.md") if "://" not in link}
    linked |= {(ROOT / "docs" / link).resolve() for link in documents.links(ROOT / "docs" / "architecture.md")}
    assert [page for page in PAGES if page.resolve() not in linked and page.name != "README.md"] == []


def test_tasks_of_the_evaluation_page() -> None:
    from lm_eval.tasks import TaskManager

    (folder,) = words_of(Command('"$(vllm-ahn tasks)"'))
    known = TaskManager(include_path=folder, include_defaults=False).all_tasks
    named = [span for span in documents.code_spans(ROOT / "docs" / "evaluation.md") if span.startswith("ahn_")]
    expanded = []
    for span in named:
        before, _, rest = span.partition("{")
        choices, _, after = rest.partition("}")
        expanded += [f"{before}{choice}{after}" for choice in choices.split(",")]
    assert len(expanded) >= 8
    assert [name for name in expanded if name not in known] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


# That nothing is passed over, and that all of this can fail.


def test_every_block_is_accounted_for() -> None:
    for block in BLOCKS:
        if block.language in SHELL:
            assert block.commands, f"{block.where}: no command in it"
        else:
            assert block.language == "python" or block.reason, f"{block.where}: {block.language or 'no language'}"
    assert collections.Counter(block.page.name for block in BLOCKS if block.reason) == NOT_RUN


LM_EVAL = 'lm_eval run --model vllm --include_path "$(vllm-ahn tasks)" --tasks {} --model_args \'{{"{}": "BASE"}}\''


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("```bash\nvllm serve BASE --ahn-windows 64\n```", SystemExit, "2"),
        ("```bash\nvllm serve tiny/nothing --ahn CKPT\n```", AssertionError, "no model tiny/nothing"),
        ("```bash\nvllm-ahn inspect\n```", SystemExit, "2"),
        ("```bash\nmake nothing\n```", AssertionError, "No rule to make target 'nothing'"),
        ("```bash\npip install '.[nothing]'\n```", AssertionError, "no extra nothing"),
        ("```bash\npython examples/nothing.py\n```", AssertionError, "no program examples/nothing.py"),
        ("```bash\npython -m pytest tests/nothing\n```", AssertionError, "no tests/nothing"),
        ("```bash\ncurl localhost\n```", AssertionError, "say why it is not run"),
        (f"```bash\n{LM_EVAL.format('ahn_nothing', 'pretrained')}\n```", AssertionError, "no task {'ahn_nothing'}"),
        (f"```bash\n{LM_EVAL.format('ahn_longbench', 'pretrain')}\n```", AssertionError, "passes {'pretrain'}"),
        (
            "```console\n$ vllm-ahn make-tiny tiny\nbase  tiny/base\n```",
            AssertionError,
            "prints\nbase  tiny/base\nahn ",
        ),
        ("```console\n$ make demo\n...\n```", AssertionError, "make is not run: say why"),
        ("```console\nno command\n```", ValueError, "the output of no command"),
    ],
)
def test_wrong_commands_are_found(text: str, error: type[BaseException], said: str, session: Path) -> None:
    with pytest.raises(error) as found:
        check_session(documents.blocks(ROOT / "README.md", text), session)
    assert said in str(found.value)


def test_what_is_excused_is_parsed_all_the_same(session: Path) -> None:
    excuse = "<!-- not run: needs the hub -->\n"
    check_session(documents.blocks(ROOT / "README.md", f"{excuse}```bash\ncurl localhost\n```"), session)
    with pytest.raises(SystemExit):
        check_session(documents.blocks(ROOT / "README.md", f"{excuse}```bash\nvllm serve BASE --no-flag\n```"), session)


def test_wrong_python_is_found() -> None:
    with pytest.raises(ImportError):
        check_python("from vllm_ahn import Nothing")
    with pytest.raises(SyntaxError):
        check_python("LLM(")


def test_wrong_links_and_paths_are_found() -> None:
    page = ROOT / "README.md"
    for link in ("docs/nothing.md", "docs/usage.md#nothing", "../elsewhere"):
        assert documents.broken_link(page, link), link
    assert documents.broken_link(page, "docs/usage.md#cpu-memory") is None
    assert list(documents.named_paths(page, "`vllm_ahn/nothing.py` `plugin/` `a/NAME.py` `word`")) == [
        "vllm_ahn/nothing.py",
        "plugin/",
    ]
    assert documents.path_exists(page, "plugin/") and not documents.path_exists(page, "vllm_ahn/nothing.py")
    assert shutil.which("make"), "commands are held against the real make"
