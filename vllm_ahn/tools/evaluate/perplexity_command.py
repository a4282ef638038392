"""``vllm-ahn perplexity MODEL --text FILE...``: perplexity, bits per byte and cache by position."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from vllm_ahn.config import DEFAULT_SINKS, DEFAULT_WINDOW
from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import flags, markdown, packages, plot
from vllm_ahn.tools.evaluate.plan import AFTER_PROMPT, make_setting
from vllm_ahn.tools.evaluate.report import failed
from vllm_ahn.tools.evaluate.suites import Suite

CONTEXT_FACTOR = 4
"""Default tokens of a stretch, as a multiple of window and sinks: most of it is then beyond them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument("model", metavar="MODEL", help="base model: a folder or a repository[@REVISION]")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text files, UTF-8")
    parser.add_argument(
        "--context",
        metavar="N",
        help="tokens of a stretch: every file is cut into stretches that are read from their start "
        f"(default: {CONTEXT_FACTOR} times window and sinks)",
    )
    parser.add_argument("--limit", metavar="N", help="only the first N stretches")
    parser.add_argument("--plot", metavar="FILE", help=f"write a plot: {', '.join(plot.FORMATS)}")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--output", metavar="DIR", help="keep answers and logs here, to continue after an interruption")
    flags.add_arguments(parser, baselines="full,window", window=f"{DEFAULT_WINDOW}", sinks=f"{DEFAULT_SINKS}")


def run(args: argparse.Namespace) -> int:
    """Print the table and write what was asked for. Returns 1 if a row has failed, else 0."""
    given = flags.engine_arguments(args)
    packages.require("tabulate", "perplexity")
    for flag in ("plot", "json"):
        folder = Path(getattr(args, flag) or "").parent
        if not folder.is_dir():
            raise AHNError(f"--{flag}: {folder} is no folder, expected a file in one that exists")
    if args.plot is not None:
        plot.check_plot(Path(args.plot))
    lengths = flags.lengths(args)
    window = DEFAULT_WINDOW if lengths["window"] is None else lengths["window"]
    sinks = DEFAULT_SINKS if lengths["sinks"] is None else lengths["sinks"]
    context = flags.number(args, "context", 2) or CONTEXT_FACTOR * (window + sinks)
    suite = Suite(
        name="perplexity",
        title="Perplexity by position",
        kind="perplexity",
        max_model_len=context + AFTER_PROMPT,
        max_prompt_tokens=context,
        window=window,
        sinks=sinks,
    )
    setting = make_setting(suite, texts=tuple(str(Path(name).resolve()) for name in args.text), **lengths)
    folder = Path(args.output or tempfile.mkdtemp(prefix="vllm-ahn-"))
    report = flags.run(args, [setting], args.model, given, folder)
    [found] = report["suites"]
    print(markdown.perplexity_table(found))
    for row in found["rows"]:
        if why := markdown.why_missing(row):
            print(f"{row['label']}: {why}")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.plot is not None:
        title = f"{Path(report['base']['name']).name}, {', '.join(Path(name).name for name in args.text)}"
        plot.plot_positions(found, title, Path(args.plot))
    if failed(report):
        return 1  # the logs stay
    if args.output is None:
        shutil.rmtree(folder)
    return 0
