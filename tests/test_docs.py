"""What README, CONTRIBUTING and the pages in docs/ show works as shown.

Every fenced block is run, or parsed by the real argument parsers, or says in a comment before it why it is not run;
its commands are parsed all the same. Links and paths lead to something.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import io
import itertools
import re
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import vllm
import yaml

from support import documents
from support.command_lines import SHELL, check_command, parse_make, parse_programs, programs, words_of
from support.documents import PAGES, Block, Command
from support.engines import DEFAULTS
from support.paths import ROOT
from support.servers import environment, program
from support.servers import run as run_process
from vllm_ahn.plugin import compat
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

NOT_IN_THE_REPOSITORY = {
    "Infinigence/LVEval/cmrc_mixup.zip",
    "xinrongzhang2022/InfiniteBench/longbook_qa_eng.jsonl",
    "THUDM/LongBench/data.zip",
    ".contract/",
}
"""Paths that pages name and that are made, or on the hub."""

BLOCKS = [block for page in PAGES for block in documents.blocks(page)]


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
        done = run_process(command, env=environment(folder / "cache", VLLM_LOGGING_LEVEL="ERROR"), timeout=300)
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


def test_programs(session: Path) -> None:
    """Programs of the repository take the arguments that pages give them."""
    lines = programs(BLOCKS)
    assert len(lines) >= 6
    problems = parse_programs([*lines, ["examples/offline.py", "BASE", "CKPT", "--no-such-flag"]])
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


def test_workflow_templates_and_hooks() -> None:
    files = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]
    values = {file.name: yaml.safe_load(file.read_text()) for file in files}
    assert len(values) == 5
    jobs = values["ci.yml"]["jobs"]["tests"]["strategy"]["matrix"]["include"]
    for job in jobs:
        parse_make(["make", job["target"]])
        compat.check_vllm_version(job["vllm"])
    contract = re.search(r"^CONTRACT := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert contract is not None
    assert {job["target"]: job["vllm"] for job in jobs} == {
        "test": version("vllm").partition("+")[0],
        "contract": contract[1],
    }


def test_versions_are_those_that_are_supported() -> None:
    assert f"`{compat.SUPPORTED}`" in (ROOT / "docs" / "vllm-versions.md").read_text()


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
            "make-tiny tiny prints",
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
