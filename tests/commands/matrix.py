"""Every command of vLLM's that makes an engine, with a plain model and with an AHN: ``make commands``.

    python tests/commands/matrix.py docs/commands.md [--only WORD]

Each cell runs the real command with a tiny model on a CPU. A cell holds if the command ends with exit code 0, says what
it says when it has worked, and says that it serves an AHN where one is asked for and only there; a server must also
answer a prompt longer than the window with the very tokens of the plain PyTorch reference. Bad input must end every
command with one line and exit code 1. The table is written anew after each row; the exit code is 1 if any cell fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import vllm
from tabulate import tabulate

from support import servers
from support.servers import Server, environment, program, run, start
from vllm_ahn.reference import ReferenceModel, from_folders
from vllm_ahn.tools.tiny import make_tiny

WINDOW, SINKS, PROMPT, ANSWER = 40, 8, 120, 8
"""Tokens: the prompt leaves the window."""

QUESTION = "What leaves the window is absorbed into the state. " * 4
LIMIT_S = 900.0
SMALL = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager", "--kv-cache-memory-bytes", str(64 << 20))
RANDOM = ("--dataset-name", "random", "--random-input-len", str(PROMPT), "--random-output-len", str(ANSWER))


@dataclasses.dataclass
class Column:
    """A model, with an AHN or without."""

    name: str
    model: Path
    flags: tuple[str, ...]
    reference: ReferenceModel
    prompt: list[int]
    work: Path

    @cached_property
    def expected(self) -> list[int]:
        """What the reference answers to `prompt`."""
        return self.answer(self.prompt)

    def answer(self, prompt: list[int]) -> list[int]:
        """Return what the reference answers."""
        return self.reference.generate(torch.tensor([prompt]), ANSWER).tokens[0].tolist()

    @property
    def config_file(self) -> Path:
        """`flags` and the model as ``--config`` takes them."""
        file = self.work / f"{self.name}.yaml"
        pairs = zip(self.flags[::2], self.flags[1::2], strict=True)
        lines = [f"model: {self.model}", *(f"{flag.removeprefix('--')}: {value}" for flag, value in pairs)]
        file.write_text("\n".join(lines) + "\n")
        return file

    @property
    def batch_file(self) -> Path:
        """One request of ``vllm run-batch``."""
        file = self.work / f"{self.name}.jsonl"
        body = {"model": str(self.model), "messages": [{"role": "user", "content": QUESTION}], "max_tokens": ANSWER}
        body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
        line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
        file.write_text(json.dumps(line) + "\n")
        return file


class Failed(Exception):
    """A cell does not hold; the text says why."""


def make_columns(work: Path) -> list[Column]:
    # vllm bench latency draws tokens below 10,000.
    paths = make_tiny(work / "tiny", max_position_embeddings=512, vocab=10240)
    prompt = torch.randint(500, (PROMPT,), generator=torch.Generator().manual_seed(0))
    columns = []
    for name, ahn in (("plain", None), ("AHN", paths.ahn)):
        flags = () if ahn is None else ("--ahn", str(ahn), "--ahn-window", str(WINDOW), "--ahn-sinks", str(SINKS))
        reference = from_folders(paths.base, ahn, WINDOW, SINKS)
        columns.append(Column(name, paths.base, flags, reference, prompt.tolist(), work))
    assert columns[0].expected != columns[1].expected, "the table could not tell the models apart"
    return columns


def says_which_model(column: Column, log: str) -> None:
    if ("AHN: GatedDeltaNet from" in log) != (column.name == "AHN"):
        raise Failed("it does not say that an AHN is served" if column.name == "AHN" else "it serves an AHN")


def ends_well(column: Column, command: list[str], marker: str, env: dict[str, str], *, engine: bool = True) -> str:
    """Run a command to its end; ``marker`` is a pattern of what it says when it has worked."""
    done = run(command, env=env, timeout=LIMIT_S)
    log = done.stdout + done.stderr
    if done.returncode != 0:
        raise Failed(f"exit code {done.returncode}: {last_line(log)}")
    if not re.search(marker, log):
        raise Failed(f"{marker!r} is not in what it says: {last_line(log)}")
    if engine:
        says_which_model(column, log)
    return log


def last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if re.search(r"error", line, re.IGNORECASE)] or log.splitlines()
    return lines[-1][-200:].replace("|", "/") if lines else "nothing"


def answers(column: Column, server: Server) -> None:
    client = server.client
    for _ in range(4):  # so that each of several servers or engines has its turn
        completion = client.completions.create(
            model=client.models.list().data[0].id,
            prompt=column.prompt,
            max_tokens=ANSWER,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        tokens = completion.choices[0].model_dump()["token_ids"]
        if tokens != column.expected:
            raise Failed(f"it answers {tokens}, and the reference {column.expected}")
    says_which_model(column, server.log)


Check = Callable[[Column, dict[str, str]], None]


def serving(*before: str, more: tuple[str, ...] = (), config: bool = False) -> Check:
    """A server, by the command ``before``, that answers as the reference does."""

    def check(column: Column, env: dict[str, str]) -> None:
        model = ["--config", str(column.config_file)] if config else ["--model", str(column.model), *column.flags]
        if before[-1] == "serve" and not config:
            model = [str(column.model), *column.flags]
        log = column.work / f"{column.name}.log"
        try:
            with start([*before, *model, *SMALL, *more], log=log, env=env) as server:
                answers(column, server)
        except AssertionError as error:
            raise Failed(last_line(str(error))) from error

    return check


def clients(column: Column, env: dict[str, str]) -> None:
    """``vllm bench serve``, ``chat`` and ``complete`` against one server."""
    vllm_command = program("vllm")
    command = [vllm_command, "serve", str(column.model), *column.flags, *SMALL]
    with start(command, log=column.work / f"{column.name}.log", env=env) as server:
        bench = [vllm_command, "bench", "serve", "--base-url", server.url, "--model", str(column.model), *RANDOM]
        ends_well(column, [*bench, "--num-prompts", "2"], r"Successful requests: +2\b", env, engine=False)
        url = ["--url", f"{server.url}/v1"]
        for tool, marker in (("complete", r"[ -~]"), ("chat", r"[ -~]")):
            more = ["--max-tokens", "8"] if tool == "complete" else []
            ends_well(column, [vllm_command, tool, *url, "-q", QUESTION, *more], marker, env, engine=False)
        says_which_model(column, server.log)


def ending(*command: str, marker: str, env_more: dict[str, str] | None = None) -> Check:
    """A command that makes an engine, uses it and ends."""

    def check(column: Column, env: dict[str, str]) -> None:
        model = ["--model", str(column.model), *column.flags, *SMALL]
        ends_well(column, [program("vllm"), *command, *model], marker, env | (env_more or {}))

    return check


def run_batch(column: Column, env: dict[str, str]) -> None:
    out = column.work / f"{column.name}.out.jsonl"
    command = [program("vllm"), "run-batch", "-i", str(column.batch_file), "-o", str(out)]
    ends_well(column, [*command, "--model", str(column.model), *column.flags, *SMALL], "", env)
    answered = json.loads(out.read_text())["response"]["body"]
    prompt, tokens = answered["prompt_token_ids"], answered["choices"][0]["token_ids"]
    if len(prompt) <= WINDOW + SINKS:
        raise Failed(f"a prompt of {len(prompt)} tokens does not leave the window")
    if tokens != column.answer(prompt):
        raise Failed(f"it answers {tokens}, and the reference {column.answer(prompt)}")


def bad_input(*command: str) -> Check:
    """A checkpoint that is not there, in the AHN column; an unknown flag, in the plain one, is vLLM's to refuse."""

    def check(column: Column, env: dict[str, str]) -> None:
        ahn = column.name == "AHN"
        words = [program("vllm"), *command, "--model", str(column.model), *SMALL]
        if command[0] == "serve":
            words = [program("vllm"), *command, str(column.model), *SMALL]
        if command[0] == "run-batch":
            words += ["-i", str(column.batch_file), "-o", str(column.work / "out")]
        done = run([*words, *(["--ahn", "/nowhere/ahn"] if ahn else ["--no-such-flag"])], env=env, timeout=LIMIT_S)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        expected = "error: /nowhere/ahn: no such folder" if ahn else ""
        if done.returncode != (1 if ahn else 2) or "Traceback" in done.stderr + done.stdout:
            raise Failed(f"exit code {done.returncode}, {last_line(done.stderr)}")
        if not lines[-1].startswith(expected):
            raise Failed(last_line(done.stderr))

    return check


SERVE = (program("vllm"), "serve")
ROWS: dict[str, Check] = {
    "vllm bench latency": ending(
        "bench", "latency", "--input-len", str(PROMPT), "--output-len", str(ANSWER), "--batch-size", "1",
        "--num-iters", "1", "--num-iters-warmup", "1", marker=r"Avg latency: [\d.]+ seconds",
    ),
    "vllm bench throughput": ending(
        "bench", "throughput", *RANDOM, "--num-prompts", "2", marker=r"Throughput: [\d.]+ requests/s",
    ),
    "vllm serve": serving(*SERVE),
    "vllm serve, bad input": bad_input("serve"),
    "vllm bench latency, bad input": bad_input("bench", "latency"),
    "vllm run-batch": run_batch,
    "vllm bench serve, complete, chat": clients,
    "vllm serve --config FILE": serving(*SERVE, config=True),
    "vllm serve --api-server-count 2": serving(*SERVE, more=("--api-server-count", "2")),
    "vllm serve --data-parallel-size 2": serving(*SERVE, more=("--data-parallel-size", "2")),
    "python -m vllm.entrypoints.openai.api_server": serving(
        sys.executable, "-m", "vllm.entrypoints.openai.api_server"
    ),
    "vllm bench startup": ending(
        "bench", "startup", "--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1",
        marker="STARTUP TIME BENCHMARK RESULTS",
    ),
    "vllm bench throughput --async-engine": ending(
        "bench", "throughput", "--async-engine", *RANDOM, "--num-prompts", "2",
        marker=r"Throughput: [\d.]+ requests/s",
    ),
}  # fmt: skip
"""What a row is called -> what is checked, the most telling rows first."""


def cell(check: Check, column: Column, env: dict[str, str]) -> str:
    try:
        check(column, env)
    except (Failed, subprocess.TimeoutExpired) as error:
        return f"fails: {error}"
    return "works"


def write(file: Path, columns: list[Column], rows: list[list[str]]) -> None:
    missing = "" if len(rows) == len(ROWS) else f"So far {len(rows)} of its {len(ROWS)} rows were run.\n\n"
    table = tabulate(rows, ["command", *(column.name for column in columns)], tablefmt="github")
    file.write_text(
        "# vLLM's commands, with and without an AHN\n\n"
        f"Each command was run with vLLM {vllm.__version__} on a CPU, with this plugin installed, for a tiny Qwen2 "
        "without an AHN and with one\n(GatedDeltaNet). *Works*: exit code 0, the result that the command prints when "
        "it has worked, and, of servers and batches,\nthe tokens of the plain PyTorch reference for a prompt three "
        "times as long as the window. Bad input (of the AHN: a checkpoint\nthat is not there) *works* if the command "
        "ends at once with one sentence and no traceback.\nMade by `make commands` "
        "(`tests/commands/matrix.py`).\n\n"
        f"{missing}{table}\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the table, Markdown")
    parser.add_argument("--only", default="", metavar="WORD", help="only the rows with this in their name")
    args = parser.parse_args()
    servers.START_S = LIMIT_S
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        columns = make_columns(work)
        env = environment(work / "cache", OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", HF_HUB_OFFLINE="1")
        rows: list[list[str]] = []
        for name, check in ROWS.items():
            if args.only not in name:
                continue
            row = [f"`{name}`" if "," not in name else name]
            for column in columns:
                begin = time.monotonic()
                row.append(cell(check, column, env))
                print(f"{name}, {column.name}: {row[-1]} ({time.monotonic() - begin:.0f} s)", flush=True)
            rows.append(row)
            write(args.file, columns, rows)
    return int(any(text.startswith("fails") for row in rows for text in row))


if __name__ == "__main__":
    sys.exit(main())
