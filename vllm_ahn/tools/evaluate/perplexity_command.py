"""``vllm-ahn perplexity MODEL --text FILE...``: perplexity, bits per byte and cache by position."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import flags, markdown, plot
from vllm_ahn.tools.evaluate.base import Base
from vllm_ahn.tools.evaluate.methods import find_methods
from vllm_ahn.tools.evaluate.perplexity import AFTER_PROMPT
from vllm_ahn.tools.evaluate.plan import make_plan, make_setting
from vllm_ahn.tools.evaluate.progress import Progress
from vllm_ahn.tools.evaluate.report import build_report, failed
from vllm_ahn.tools.evaluate.runner import run_plan
from vllm_ahn.tools.evaluate.suites import Suite

CONTEXT_FACTOR = 4
"""Tokens of a stretch, in windows and sinks, if nothing is said: most of it is then beyond them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("model", metavar="MODEL", help="base model: a folder or a repository[@REVISION]")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files, UTF-8")
    parser.add_argument(
        "--context",
        metavar="N",
        help="tokens of a stretch: every file is cut into stretches that are read from their start "
        f"(default: {CONTEXT_FACTOR} times window and sinks)",
    )
    parser.add_argument("--limit", metavar="N", help="only the first N stretches")
    flags.add_lengths(parser, f"{DEFAULT_WINDOW}", f"{DEFAULT_SINKS}")
    parser.add_argument("--plot", metavar="FILE", help=f"write a plot: {', '.join(plot.FORMATS)}")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--output", metavar="DIR", help="keep answers and logs here, to go on after an interruption")
    flags.add_arguments(parser, "full,window")


def run(args: argparse.Namespace) -> int:
    """Prints the table and writes what was asked for; 1 if a row has failed, 130 if interrupted."""
    given = flags.engine_arguments(args)
    plotted, written = _writable(args.plot, "--plot"), _writable(args.json, "--json")
    if plotted is not None:
        plot.check_plot(plotted)
    lengths = flags.lengths(args)
    window, sinks = (
        default if length is None else length
        for length, default in ((lengths["window"], DEFAULT_WINDOW), (lengths["sinks"], DEFAULT_SINKS))
    )
    context = flags.number(args.context, "--context", 2) or CONTEXT_FACTOR * (window + sinks)
    suite = Suite(
        name="perplexity",
        title="Perplexity by position",
        kind="perplexity",
        tasks=(),
        group=None,
        metric="perplexity",
        max_model_len=context + AFTER_PROMPT,
        max_prompt_tokens=context,
        max_answer_tokens=0,
        window=window,
        sinks=sinks,
    )
    texts = tuple(str(Path(name).resolve()) for name in args.text)
    setting = make_setting(suite, texts=texts, limit=flags.number(args.limit, "--limit"))
    base = Base.find(args.model)
    rows = make_plan([setting], find_methods(flags.baselines(args), args.ahn, base), base, given)
    progress = Progress(sum(row.job is not None for row in rows))
    folder = Path(args.output or tempfile.mkdtemp(prefix="vllm-ahn-"))
    try:
        outcomes = run_plan(rows, folder, progress)
    except KeyboardInterrupt:
        progress.close()
        print(f"interrupted; to go on: --output {folder}", file=sys.stderr)
        return 130
    report = build_report(outcomes, base, args.command_line)
    (measured,) = report["suites"]
    print("\n".join(markdown.table(markdown.perplexity_table(measured))))
    for row in measured["rows"]:
        if row["status"] != "measured":
            print(f"{row['label']}: {row['status']}: {row['why']}")
    if written is not None:
        written.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    done = [row for row in measured["rows"] if row["status"] == "measured"]
    if plotted is not None and done:
        title = f"{Path(base.name).name}, {', '.join(Path(name).name for name in args.text)}"
        plot.plot_positions(done, setting.capacity, title, plotted)
    if failed(report):
        return 1  # the logs stay
    if args.output is None:
        shutil.rmtree(folder)
    return 0


def _writable(name: str | None, flag: str) -> Path | None:
    """The path of a file to write; raises `AHNError` if its folder is not there."""
    if name is None:
        return None
    path = Path(name)
    if not path.parent.is_dir():
        raise AHNError(f"{flag}: {path.parent} is no folder, expected a file in one that exists")
    return path
