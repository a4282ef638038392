"""``vllm-ahn eval SUITE...``: evaluation suites on a base with full attention, sinks + window, and AHN."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import flags, markdown, packages, plot
from vllm_ahn.tools.evaluate.base import Base
from vllm_ahn.tools.evaluate.methods import find_methods
from vllm_ahn.tools.evaluate.plan import make_plan, make_setting
from vllm_ahn.tools.evaluate.progress import Progress
from vllm_ahn.tools.evaluate.report import build_report, failed
from vllm_ahn.tools.evaluate.runner import run_plan
from vllm_ahn.tools.evaluate.suites import SUITES, find_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run` reads to `parser`."""
    parser.add_argument("suite", nargs="+", metavar="SUITE", help=f"one or more of {', '.join(SUITES)}")
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="base model: a folder or a repository[@REVISION]"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where answers, results and the report go")
    parser.add_argument("--limit", metavar="N", help="only the first N samples of each set")
    parser.add_argument(
        "--data", metavar="FOLDER", help="local folder with the data sets, OWNER/NAME each; nothing is asked of the hub"
    )
    parser.add_argument(
        "--max-model-len",
        metavar="N",
        help="the longest sequence, tokens; prompts are cut to fit (default: the suite's own)",
    )
    flags.add_lengths(parser, "the suite's own", "the suite's own")
    flags.add_arguments(parser, "full,yarn,window")


def run(args: argparse.Namespace) -> int:
    """Runs what is missing and writes DIR/report.md and DIR/report.json; 1 if a row has failed, 130 if interrupted."""
    suites = [find_suite(name) for name in dict.fromkeys(args.suite)]
    given = flags.engine_arguments(args)
    limit = flags.number(args.limit, "--limit")
    data = _data_folder(args.data)
    if any(suite.kind == "lm_eval" for suite in suites):
        packages.require("lm_eval", "eval")
    if any(suite.kind == "perplexity" for suite in suites):
        plot.check_plot()
    settings = [
        make_setting(
            suite,
            max_model_len=flags.number(args.max_model_len, "--max-model-len"),
            limit=limit,
            data=data,
            **flags.lengths(args),
        )
        for suite in suites
    ]
    base = Base.find(args.model)
    methods = find_methods(flags.baselines(args), args.ahn, base)
    rows = make_plan(settings, methods, base, given)
    output = Path(args.output)
    progress = Progress(sum(row.job is not None for row in rows))
    try:
        outcomes = run_plan(rows, output, progress)
    except KeyboardInterrupt:
        progress.close()
        print("interrupted: what was answered is kept, and the same command goes on from there", file=sys.stderr)
        return 130
    report = build_report(outcomes, base, args.command_line)
    plots = {}
    for suite in report["suites"]:
        measured = [row for row in suite["rows"] if "perplexity" in row]
        if measured:
            plots[suite["name"]] = f"{suite['name']}.png"
            capacity = suite["setting"]["window"] + suite["setting"]["sinks"]
            plot.plot_positions(measured, capacity, suite["title"], output / plots[suite["name"]])
    text = markdown.render(report, plots)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {output / 'report.md'}, {output / 'report.json'}", file=sys.stderr)
    return 1 if failed(report) else 0


def _data_folder(name: str | None) -> str | None:
    if name is None:
        return None
    if not Path(name).is_dir():
        raise AHNError(f"--data: {name} is no folder, expected one with the data sets, OWNER/NAME each")
    return str(Path(name).resolve())
