"""Runs many ``vllm serve`` command lines, each in a process of its own, for the price of importing vLLM once.

    python tests/support/serve_driver.py CASES.json RESULTS.json

CASES.json is a list of lists of arguments after ``vllm``. The real entry point of the ``vllm`` command runs
each of them in a fork of this process; RESULTS.json gets, for each, its exit code, what it wrote to stdout
and stderr, and which processes it started.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn


def main() -> None:
    import vllm.entrypoints.cli.main
    import vllm.entrypoints.cli.serve
    import vllm.transformers_utils.config
    import vllm.v1.engine.async_llm  # noqa: F401

    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(case) for case in cases]))


def run(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, err, started = (Path(folder, name) for name in ("out", "err", "started"))
        pid = os.fork()
        if pid == 0:
            child(arguments, out, err, started)
        _, status = os.waitpid(pid, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read_text(),
            "err": err.read_text(),
            "started": started.read_text().splitlines(),
        }


def child(arguments: list[str], out: Path, err: Path, started: Path) -> NoReturn:
    for path, fd in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    log = os.open(started, os.O_WRONLY | os.O_CREAT)

    def audit(event: str, _: object) -> None:
        if event in ("os.fork", "os.forkpty", "os.posix_spawn", "subprocess.Popen"):
            os.write(log, f"{event}\n".encode())

    sys.addaudithook(audit)
    sys.argv = ["vllm", *arguments]
    code = 1
    # What the interpreter does around a program, since this one is not at the top of its process.
    try:
        vllm_main = sys.modules["vllm.entrypoints.cli.main"].main
        vllm_main()
        code = 0
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
        else:
            code = leave.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
