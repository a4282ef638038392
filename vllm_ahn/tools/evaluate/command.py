"""``vllm-ahn eval SUITE...``: evaluation suites on a base with full attention, sinks + window, and AHN."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from vllm_ahn.errors import AHNError
from vllm_ahn.tools.evaluate import flags, markdown, packages, plot
from vllm_ahn.tools.evaluate.plan import make_setting
from vllm_ahn.tools.evaluate.report import failed
from vllm_ahn.tools.evaluate.suites import SUITES, find_suite


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` reads to `parser`."""
    parser.add_argument("suite", nargs="+", metavar="SUITE", help=f"one or more of {', '.join(SUITES)}")
    parser.add_argument(
        "--model", required=True, metavar="BASE", help="base model: a folder or a repository[@REVISION]"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where answers, results and the report go")
    parser.add_argument("--limit", metavar="N", help="only the first N samples of each set")
    parser.add_argument(
        "--data", metavar="FOLDER", help="local folder with the data sets, OWNER/NAME each; the hub is never asked"
    )
    parser.add_argument(
        "--max-model-len",
        metavar="N",
        help="the longest sequence, tokens; prompts are cut to fit (default: the suite's own)",
    )
    flags.add_arguments(parser, baselines="full,yarn,window", window="the suite's own", sinks="the suite's own")


def run(args: argparse.Namespace) -> int:
    """Run what is missing, and write DIR/report.md and DIR/report.json. Returns 1 if a row has failed, else 0."""
    suites = [find_suite(name) for name in dict.fromkeys(args.suite)]
    given = flags.engine_arguments(args)
    packages.require("tabulate", "eval")
    if any(suite.kind == "lm_eval" for suite in suites):
        packages.require("lm_eval", "eval")
    if any(suite.kind == "perplexity" for suite in suites):
        plot.check_plot()
    if args.data is not None and not Path(args.data).is_dir():
        raise AHNError(f"--data: {args.data} is no folder, expected one with the data sets, OWNER/NAME each")
    data = str(Path(args.data).resolve()) if args.data is not None else None
    longest, lengths = flags.number(args, "max_model_len"), flags.lengths(args)
    settings = [make_setting(suite, max_model_len=longest, data=data, **lengths) for suite in suites]
    output = Path(args.output)
    report = flags.run(args, settings, args.model, given, output)
    plots = {
        suite["name"]: name
        for suite in report["suites"]
        if plot.plot_positions(suite, suite["title"], output / (name := f"{suite['name']}.png"))
    }
    text = markdown.render(report, plots)
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {output / 'report.md'}, {output / 'report.json'}", file=sys.stderr)
    return 1 if failed(report) else 0
