"""The compiled kernel of steps: against the naive recurrence, against plain torch, and how it is built."""

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.settled_case import SettledCase
from vllm_ahn.kernels import steps_cpu
from vllm_ahn.kernels.recurrence.settled import absorb_and_read_steps as in_torch
from vllm_ahn.kernels.settled import Settling
from vllm_ahn.kernels.steps import Steps
from vllm_ahn.kernels.steps_cpu import ReadOut, absorb_and_read_steps, load

MEMORIES = ("GatedDeltaNet", "DeltaNet", "Mamba2")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def seed() -> int:
    """A new one in every run, in the captured output of a test that fails."""
    seed = torch.seed()
    print("torch seed", seed)
    return seed


@pytest.fixture(params=[1, 3], ids="threads {}".format)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


class Stepper:
    """Steps a case by the kernel."""

    def __init__(self, cache: Path) -> None:
        library = load(cache)
        assert library is not None
        self.library = library

    def __call__(self, case: SettledCase, query: torch.Tensor, steps: Steps) -> torch.Tensor:
        o = absorb_and_read_steps(
            self.library,
            query,
            case.window,
            case.window_table,
            case.state,
            case.state_table,
            steps,
            memory=case.spec,
            settling=case.rule,
            scale=case.scale,
            A_log=case.A_log,
        )
        assert o is not None
        return o


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "memory, drafts, caches", itertools.product(MEMORIES, (0, 1, 3, 8, 15), (False, True)), ids=str
)
def test_steps_equal_the_naive_recurrence(memory: str, drafts: int, caches: bool, cache: Path, seed: int) -> None:
    for window, sinks, block_size in ((24, 8, 16), (33, 0, 32), (20, 5, 48)):
        rule = Settling.of(window, sinks, block_size=block_size, caches_prefixes=caches, speculates=drafts > 0)
        assert SettledCase(rule, memory, block_size=block_size).run(Stepper(cache), drafts, seed) < 1e-5


SIZES = [(5, 1, 80), (4, 4, 64), (8, 1, 128), (6, 2, 32), (2, 1, 256), (3, 3, 48)]


@pytest.mark.parametrize("memory, sizes", itertools.product(MEMORIES, SIZES), ids=str)
def test_head_sizes_and_dtypes(memory: str, sizes: tuple[int, int, int], cache: Path, seed: int) -> None:
    heads, kv_heads, size = sizes
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=True, speculates=True)
    dtypes = itertools.product((torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16))
    for dtype, state_dtype in dtypes:
        case = SettledCase(
            rule,
            memory,
            heads,
            kv_heads,
            size,
            dtype=dtype,
            state_dtype=state_dtype,
            num_requests=2,
            num_tokens=90,
        )
        assert case.run(Stepper(cache), 3, seed) < (1e-5 if state_dtype == torch.float32 else 0.2)


def test_a_large_decay_spoils_nothing_after_it(cache: Path, seed: int) -> None:
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=True)
    assert SettledCase(rule, decay=1000.0).run(Stepper(cache), 3, seed) < 1e-5


@pytest.mark.parametrize("memory", MEMORIES)
def test_one_slot_is_not_enough_for_drafts(memory: str, cache: Path, seed: int) -> None:
    """The negative control."""
    assert SettledCase(Settling(24, 8), memory, num_requests=8).run(Stepper(cache), 8, seed) > 1e-3


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routed", [False, True], ids=["", "router"])
def test_what_is_read_is_normalised_projected_and_added(
    dtype: torch.dtype, routed: bool, cache: Path, seed: int
) -> None:
    """As `Memory.read_out` and the core do it in torch, up to a value that lies between two of the dtype's."""
    rule = Settling.of(24, 8, block_size=16, caches_prefixes=False, speculates=True)
    case = SettledCase(rule, head_size=64, dtype=dtype)
    stepper = Stepper(cache)
    norm = (torch.rand(64) + 0.5).to(dtype)
    projection = (torch.randn(case.heads, 64, 64) / 8).to(dtype)

    def step(case: SettledCase, query: torch.Tensor, steps: Steps) -> torch.Tensor:
        attended = torch.randn(query.shape).to(dtype)
        z = torch.randn(len(query), case.heads)
        router = torch.rand(len(steps.tokens), case.heads) if routed else None
        before = case.state.columns.clone()
        o = stepper(case, query, steps)
        case.state.columns.copy_(before)
        output = attended.clone()
        absorb_and_read_steps(
            stepper.library,
            query,
            case.window,
            case.window_table,
            case.state,
            case.state_table,
            steps,
            memory=case.spec,
            settling=case.rule,
            scale=case.scale,
            read_out=ReadOut(output, z, norm, projection, router),
        )
        gate = torch.nn.functional.silu(z[steps.tokens]).unsqueeze(-1)
        y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * norm.float() * gate
        m = torch.bmm(y.to(dtype).transpose(0, 1), projection).transpose(0, 1)
        if router is not None:
            m = m * router.unsqueeze(-1).to(dtype)
        wanted = attended.clone()
        wanted[steps.tokens] += m
        others = torch.ones(len(query), dtype=torch.bool)
        others[steps.tokens] = False
        assert torch.equal(output[others], attended[others])
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.005}[dtype]
        torch.testing.assert_close(output, wanted, rtol=tolerance, atol=tolerance)
        assert (output == wanted).float().mean() > (0.95 if dtype != torch.float32 else 0.0)
        return o

    assert case.run(step, 3, seed) < 1e-5


def test_pages_are_those_of_plain_torch(cache: Path, seed: int) -> None:
    """Not only what is read is the same, but what stays behind, too."""
    for memory, caches in itertools.product(MEMORIES, (False, True)):
        rule = Settling.of(24, 8, block_size=32, caches_prefixes=caches, speculates=True)
        pages = []
        for compiled in (False, True):
            torch.manual_seed(seed % 2**32)
            case = SettledCase(rule, memory, block_size=32)
            stepper = Stepper(cache) if compiled else _in_torch
            case.run(stepper, 5, seed)
            pages.append(case.state.columns)
        torch.testing.assert_close(*pages, rtol=1e-4, atol=1e-5, equal_nan=True)


def _in_torch(case: SettledCase, query: torch.Tensor, steps: Steps) -> torch.Tensor:
    return in_torch(
        query,
        case.window,
        case.window_table,
        case.state,
        case.state_table,
        steps,
        memory=case.spec,
        settling=case.rule,
        scale=case.scale,
        A_log=case.A_log,
    )


def test_wrong_arguments_are_refused(cache: Path) -> None:
    case = SettledCase(Settling(24, 8))
    steps = Steps(*map(torch.tensor, ([0], [0], [1], [32])))
    with pytest.raises(ValueError, match=r"queries must be torch\.float32 as the pages are, got torch\.float64"):
        Stepper(cache)(case, case.query[0].double(), steps)
    many = Steps(*map(torch.tensor, ([0], [0], [17], [32])))
    with pytest.raises(ValueError, match="at most 16 queries"):
        Stepper(cache)(case, case.query[0], many)
    with pytest.raises(ValueError, match="int64"):
        Stepper(cache)(case, case.query[0], Steps(*(x.int() for x in vars(steps).values())))
    case.state_table = case.state_table[:, :1]
    with pytest.raises(ValueError, match="too narrow"):
        Stepper(cache)(case, case.query[0], steps)


def test_a_library_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps_cpu, "_compile", lambda compiler, file: file.write_bytes(b"no library"))
    load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path) is None
        assert "cannot compile steps_cpu.cpp" in caplog.text
    finally:
        load.cache_clear()


def test_a_second_process_compiles_nothing(cache: Path) -> None:
    load(cache)
    (library,) = cache.iterdir()
    written = library.stat().st_mtime_ns
    code = (
        "import sys; from pathlib import Path; from vllm_ahn.kernels import steps_cpu\n"
        "def compiled(*_): raise AssertionError('it compiles')\n"
        "steps_cpu._compile = compiled\n"
        "assert steps_cpu.load(Path(sys.argv[1])) is not None\n"
        "import torch; assert (torch.tensor([1e-30]) * torch.tensor([1e-10])).item() > 0, 'denormals are flushed'\n"
    )
    subprocess.run([sys.executable, "-c", code, str(cache)], check=True, env=os.environ | {"PATH": os.environ["PATH"]})
    assert [file.stat().st_mtime_ns for file in cache.iterdir()] == [written]


def test_without_a_compiler_there_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(steps_cpu, "COMPILERS", ("no-such-compiler",))
    load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path) is None
        assert "no C++ compiler (no-such-compiler) is found" in caplog.text
        caplog.clear()
        monkeypatch.setattr(steps_cpu, "COMPILERS", ("false",))
        load.cache_clear()
        with caplog.at_level(logging.WARNING):
            assert load(tmp_path) is None
        assert "false cannot compile steps_cpu.cpp" in caplog.text
        assert not list(tmp_path.iterdir())
    finally:
        load.cache_clear()
