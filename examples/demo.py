"""A small Qwen2 with an AHN, served by ``vllm serve`` and asked to go on with a program much longer than its window.

    python examples/demo.py        (or: make demo)

The model is the one in ``examples/small_model``: 2.4 million parameters that have read Python's standard library, byte
by byte. While the answer streams in, the demo reads the server's own metrics and shows what the request holds. Then it
shows what the memory is worth: bits per byte of the same program with full attention, with the window alone, and with
the memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

MODEL = Path(os.path.relpath(Path(__file__).parent / "small_model"))
BASE, AHN = MODEL / "base", MODEL / "gdn"
WINDOW, SINKS, BLOCK = 64, 0, 16  # tokens
ANSWER_TOKENS = 128
PREFILL_SHOWS = 8
"""Tokens of the answer until the server's gauge, which is of its last step, certainly shows a decode."""
CACHE_BYTES = 64 << 20
START_S = 180

PROGRAM = '''class Notebook:
    """Keeps the last pages open, and a summary of the others."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.pages = []
        self.summary = None

    def append(self, page):
        """Add a page. The oldest one goes into the summary."""
        self.pages.append(page)
        if len(self.pages) > self.capacity:
            oldest = self.pages.pop(0)
            self.summary = self.merge(self.summary, oldest)

    def merge(self, summary, page):
        """Return a summary that knows of the page, too."""
        if summary is None:
            return page
        return summary + page

    def __len__(self):
        """Return the number of pages that are open."""
        return len(self.pages)

    def __iter__(self):
        """Go through the pages, the oldest first."""
        return iter(self.'''
"""What the model is asked to go on with."""
PROMPT_TOKENS = len(PROGRAM.encode())  # the small model reads bytes


def main() -> None:
    # A terminated demo must leave by the same door as a finished one, which ends the server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="vllm-ahn-demo-") as folder:
        with serve(BASE, AHN, Path(folder, "server.log")) as url:
            show(url, BASE)
        heading("server stopped")
        compare(Path(folder))


def show(url: str, base: Path) -> None:
    """Asks the server at ``url`` and prints the answer and what it cost."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    windows = f"{PROMPT_TOKENS / WINDOW:.1f} windows of {WINDOW}"
    heading(f"prompt: {PROMPT_TOKENS} bytes = {windows}; its end, and the answer as it comes:")
    print("..." + PROGRAM[-2 * WINDOW :], end="")

    with Watch(url) as watch:
        started = time.perf_counter()
        stream = client.completions.create(
            model=model,
            prompt=PROGRAM,
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        first = usage = None
        for chunk in stream:
            if chunk.choices:
                first = first or time.perf_counter()
                print(chunk.choices[0].text.translate(CONTROL), end="", flush=True)
            usage = chunk.usage or usage
        finished = time.perf_counter()
    assert usage is not None and first is not None, "the server sent no answer"
    length = usage.prompt_tokens + usage.completion_tokens
    print(
        f"\n\n{usage.completion_tokens} tokens after {usage.prompt_tokens}; the first after "
        f"{first - started:.2f} s, then {usage.completion_tokens / (finished - first):.0f} a second"
    )
    report(watch.held(), watch.cache, base, length)


def report(held: list[int], cache: dict[str, str], base: Path, length: int) -> None:
    """Prints what was held against what full attention would have held for ``length`` tokens."""
    import json

    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_ahn.kernels.pages import WindowPageLayout
    from vllm_ahn.memory.spec import MEMORIES

    config = json.loads((base / "config.json").read_text())
    layers, kv_heads = config["num_hidden_layers"], config["num_key_value_heads"]
    head_size = config["hidden_size"] // config["num_attention_heads"]
    gates = MEMORIES["GatedDeltaNet"].num_gates * config["num_attention_heads"] // kv_heads
    block, blocks = int(cache["block_size"]), int(cache["num_gpu_blocks"])
    ahn_bytes = layers * WindowPageLayout(kv_heads, head_size, gates, block, torch.float32).page_bytes
    full_bytes = (
        layers
        * FullAttentionSpec(
            block_size=block, num_kv_heads=kv_heads, head_size=head_size, dtype=torch.float32
        ).page_size_bytes
    )
    pool_bytes = int(cache["kv_cache_memory_bytes"])
    if pool_bytes // ahn_bytes != blocks:
        sys.exit(f"the server made {blocks} blocks of {pool_bytes} bytes, expected {pool_bytes // ahn_bytes}")
    if not held:
        sys.exit("the answer came faster than the metrics: nothing was seen while decoding")

    most, full_blocks = max(held), -(-length // block)
    heading("cache that this request held while it was decoding")
    print(
        f"the server's own vllm:kv_cache_usage_perc, read {len(held)} times: {min(held)} to {most} of its {blocks} "
        f"blocks of {block} tokens"
    )
    print(f"{'':28}{'blocks':>8}{'bytes/block':>14}{'bytes':>12}")
    print(f"{'AHN, measured':28}{most:>8}{ahn_bytes:>14,}{most * ahn_bytes:>12,}")
    print(f"{'full attention, computed':28}{full_blocks:>8}{full_bytes:>14,}{full_blocks * full_bytes:>12,}")
    ratio = full_blocks * full_bytes / (most * ahn_bytes)
    print(f"Full attention holds {ratio:.1f} times the bytes for {length} tokens, and more with every further one.")
    print("(Computed from the base's shape: keys and values of every token in float32. A block spans all layers.)")


class Watch:
    """Reads the server's metrics over and over, in a thread, until the block ends."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/metrics"
        self.seen: list[tuple[float, float]] = []
        labels = re.search(r"^vllm:cache_config_info{(.*)} ", self.read(), re.MULTILINE)
        assert labels is not None, "the server does not say how large its cache is"
        self.cache: dict[str, str] = dict(re.findall(r'(\w+)="([^"]*)"', labels[1]))
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def read(self) -> str:
        with urllib.request.urlopen(self.url, timeout=10) as response:
            return response.read().decode()

    def run(self) -> None:
        while not self.stop.wait(0.02):
            metrics = self.read()
            usage, generated = (
                re.search(rf"^vllm:{name}{{.*}} (\S+)$", metrics, re.MULTILINE)
                for name in ("kv_cache_usage_perc", "generation_tokens_total")
            )
            if usage is not None and generated is not None:
                self.seen.append((float(generated[1]), float(usage[1])))

    def held(self) -> list[int]:
        """Blocks in use, each time they were read while the answer was generated and any were."""
        usable = int(self.cache["num_gpu_blocks"]) - 1  # vLLM sets one aside, and counts without it
        return [round(usage * usable) for generated, usage in self.seen if generated >= PREFILL_SHOWS and usage > 0]


@contextlib.contextmanager
def serve(base: Path, ahn: Path | None, log: Path) -> Iterator[str]:
    """Runs ``vllm serve`` until the block ends; gives its URL once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["vllm", "serve", str(base), "--ahn", str(ahn)]
    command += ["--ahn-window", str(WINDOW), "--ahn-sinks", str(SINKS), "--host", "127.0.0.1", "--port", str(port)]
    # Small things for a small model: on a CPU vLLM would take most of the memory for its cache, and compiling takes
    # longer than all the rest of the demo.
    command += ["--dtype", "float32", "--block-size", str(BLOCK), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
    command += ["--max-num-batched-tokens", "256", "--enforce-eager"]
    heading("$ " + shlex.join(command))
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
    try:
        started = time.monotonic()
        while not healthy(f"http://127.0.0.1:{port}/health"):
            waited = time.monotonic() - started
            if sys.stdout.isatty():
                print(f"\rstarting: {waited:.0f} s", end="", flush=True)
            if process.poll() is not None or waited > START_S:
                fate = "is not ready" if process.returncode is None else f"ended with code {process.returncode}"
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                sys.exit(f"{CLEAR}vllm serve {fate} after {waited:.0f} s. The end of its log:\n{tail}")
            time.sleep(0.5)
        print(f"{CLEAR}ready after {time.monotonic() - started:.0f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        # It ends its own processes. This is for those of a server that could not.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def program(name: str) -> str:
    """The command `name` of this environment, whether it is activated or not."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    return found or sys.exit(f"there is no command `{name}` in this environment")


def environment() -> dict[str, str]:
    """One thread, which is best for a small model."""
    values = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    values.pop("VLLM_CPU_KVCACHE_SPACE", None)
    return values


def healthy(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
        return bool(response.status == 200)
    return False


def compare(folder: Path) -> None:
    """Prints what full attention, the window alone and the memory make of the program."""
    text = folder / "program.txt"
    text.write_text(PROGRAM)
    command = ["vllm-ahn", "perplexity", str(BASE), "--ahn", str(AHN), "--text", str(text), "--window", str(WINDOW)]
    command += ["--sinks", str(SINKS), "--context", str(PROMPT_TOKENS), "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", str(CACHE_BYTES), "--engine-args", '{"enforce_eager": true}']
    heading("$ " + shlex.join(command))
    subprocess.run([program(command[0]), *command[1:]], check=True, env=environment())


CONTROL = dict.fromkeys({*range(32), 127, 0xFFFD} - {9, 10}, ".")
"""What a terminal should not be sent, should a model of bytes say it."""


CLEAR = "\r" if sys.stdout.isatty() else ""


def heading(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


if __name__ == "__main__":
    main()
