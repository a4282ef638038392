"""Real ``vllm serve`` processes for tests: started on a free port, waited for, and always ended."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from openai import OpenAI

START_S = 240.0
"""Seconds a server may take to be ready, compilation included, on a machine that has other work."""

STOP_S = 20.0
"""Seconds it has to end by itself before it is killed."""

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def program(name: str) -> str:
    """Return the command ``name`` of the environment that runs the tests."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found is not None, f"there is no command {name}"
    return found


def environment(cache: Path, **more: str) -> dict[str, str]:
    """Return what a process with an engine needs beside what ``conftest.py`` has set.

    ``cache`` is where it puts what it compiles, so that nothing compiled from other code is found there.
    """
    values = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CACHE_ROOT": str(cache)}
    values["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    # A tiny model needs next to nothing; vLLM's CPU default is most of the machine's memory.
    values.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return values | more


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is ready."""

    url: str
    log_path: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """Return the value of the metric ``name`` now."""
        match = re.search(rf"^{re.escape(name)}{{[^}}]*}} (\S+)$", self._metrics(), re.MULTILINE)
        assert match is not None, f"no metric {name}"
        return float(match[1])

    def cache_config(self) -> dict[str, str]:
        """Return the labels of ``vllm:cache_config_info``."""
        match = re.search(r"^vllm:cache_config_info{([^}]*)}", self._metrics(), re.MULTILINE)
        assert match is not None
        return dict(re.findall(r'(\w+)="([^"]*)"', match[1]))

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return response.read().decode()


@contextlib.contextmanager
def serve(model: Path, *arguments: str, log: Path, env: dict[str, str]) -> Iterator[Server]:
    """``vllm serve MODEL ARGUMENTS`` on a free loopback port, ready; ended, with all its processes, on exit.

    Raises ``AssertionError`` with the end of the log if it does not come up.
    """
    with start([program("vllm"), "serve", str(model), *arguments], log=log, env=env) as server:
        yield server


@contextlib.contextmanager
def start(command: list[str], *, log: Path, env: dict[str, str]) -> Iterator[Server]:
    """`serve` for any command that starts a server and takes ``--host`` and ``--port``."""
    port = free_port()
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=env, preexec_fn=_end_with_parent)
    try:
        _wait_until_ready(process, url, log)
        yield Server(url, log)
    finally:
        end(process)


def run(command: list[str], *, env: dict[str, str] | None = None, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; none of its processes is left, whatever happens."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=_end_with_parent,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen[Any]) -> None:
    """End a process and all that it has started, and wait until they are gone."""
    tree: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    for left in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=STOP_S)


def free_port() -> int:
    """Find a port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[Any], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            if response.status == 200:
                return
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        assert process.poll() is None, f"vllm serve ended with code {process.returncode}:\n{tail}"
        assert time.monotonic() < deadline, f"vllm serve was not ready after {START_S:.0f} s:\n{tail}"
        time.sleep(0.2)


def _end_with_parent() -> None:
    # Tests that are killed cannot clean up: then the kernel ends the server, which ends its own processes.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
