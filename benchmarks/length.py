"""Cache and time per token over the length of the context: full attention, sinks + window, and an AHN.

    python benchmarks/length.py [--contexts 512,1024,...] [--layers 4] [--threads 1] [--output FILE] ...

One request at a time in each of three engines, on a random model of Qwen2.5-0.5B's shape with 4 layers; the AHN is
GatedDeltaNet, W = 992, S = 32, blocks of 32 tokens. At every length each engine computes a prompt; then the engines
take turns of some decode steps each, over and over, so that what else the machine does falls on all of them. Ratios
are between turns of one round, the median over all; a time per token is the median over the turns of the fastest
repetition, since other work only adds to it. Lengths go up in the first repetition, down in the next. What a request
holds is the engine's own count of blocks between steps, times the bytes of a block. A length is that of the context at
the end of the measurement: prompt and answer together.

Before anything is timed, tokens are checked: inside the window against full attention's, past it against the reference
in float32. A mismatch ends the program with a sentence and exit code 1.

Runs on a CPU or a GPU. One OpenMP thread an engine by default: see `serving.py`. Writes a figure, which needs
matplotlib, and its numbers: ``results/length-cpu.svg``, ``.md`` and ``.json`` beside this file. ``--tiny`` is a smaller
model at shorter lengths: what it shows is that the benchmark works.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import models
import report
from agreement import check_rows
from engines import EngineProcess
from inputs import prompt
from models import AHN, FULL, ROWS, WINDOW, Comparison, running
from report import Mismatch
from vllm_ahn.tools.cost import curves
from vllm_ahn.tools.evaluate.plot import check_plot

REQUESTS, ANSWER = 4, 32
"""What is checked: so many requests at once, so many tokens each."""

REAL: dict[str, Any] = (
    {"model": "0.5B", "layers": 4, "dtype": "bfloat16", "rows": (FULL, WINDOW, AHN), "window": 992, "sinks": 32}
    | {"contexts": tuple(512 << n for n in range(7)), "max_batch": REQUESTS, "sequences": 4, "budget": 2048}
    # Weights on disk, which the reference reads as well.
    | {"steps": 16, "rounds": 6, "repetitions": 2, "engine": {"block_size": 32, "load_format": "auto"}}
)
TINY: dict[str, Any] = (
    REAL
    | {"model": "tiny", "layers": 2, "dtype": "float32", "contexts": (64, 128, 256, 512)}
    | {"window": 96, "budget": 64, "steps": 4, "rounds": 3}
)
NO_OPTIONS = {"rows", "max_batch", "sequences", "tolerance", "batches", "seed"}
TOLERANCE = {"bfloat16": 0.25, "float32": 1e-3}
"""How much less than the best a token's logit may be in float32 for the engine to choose it; the best is about 4."""

PARTS = (
    ("Cache the request holds", "MiB", "cache_bytes", "cache_ratio", 2**-20),
    ("Time per token", "ms", "token_s", "token_ratio", 1e3),
    ("Time to the first token", "s", "first_token_s", "first_token_ratio", 1),
)
"""Title, unit, value, ratio of full attention's to it, and factor to the unit; the first two are drawn."""
CURVES = {
    FULL: ("full attention", curves.FULL),
    WINDOW: ("sinks + window", curves.WINDOW),
    AHN: ("AHN, GatedDeltaNet", curves.AHN),
}
"""Name and colour of each row's."""


def main() -> None:
    args = parser().parse_args()
    setting = read_setting(args)
    plot = args.plot or args.output.with_suffix(".svg")
    check_plot(plot)
    began = time.monotonic()
    with running(setting, getattr(args, "threads", 1)) as (engines, folders):
        verified = verify(setting, engines, folders)
        repetitions = [measure(setting, engines, number) for number in range(setting.repetitions)]
        info = {row: engine.info for row, engine in engines.items()}
    result: dict[str, Any] = {
        **report.head(began),
        "setting": dataclasses.asdict(setting),
        "engines": info,
        "verified": verified,
        "loads": [repetition["load"] for repetition in repetitions],
        "contexts": {str(context): figures(setting, info, repetitions, context) for context in setting.contexts[::-1]},
    }
    title = "Cache and time per token over the length of the context"
    report.write(args.output, result, title, paragraphs(setting, result))
    draw(setting, result, plot)


def parser() -> argparse.ArgumentParser:
    """Return the options; those without a default take it from `REAL` or `TINY`."""
    result = models.parser(__doc__, "length-cpu", *(name for name in models.OPTIONS if name not in NO_OPTIONS))
    result.add_argument("--tiny", action="store_true", help="a tiny model, window and contexts")
    result.add_argument("--plot", type=Path, metavar="FILE", help=".svg, .png or .pdf; default: OUTPUT.svg")
    return result


def read_setting(args: argparse.Namespace) -> Comparison:
    """Return what the options say; end the program with a sentence where they cannot be met."""
    values = TINY if args.tiny else REAL
    setting = Comparison.read(values, args, tolerance=TOLERANCE[(values | vars(args))["dtype"]])
    shortest, longest, answer = setting.contexts[-1], setting.contexts[0], answer_tokens(setting)
    if shortest <= answer + 1:
        sys.exit(f"--contexts has {shortest}, expected more than the {answer + 1} tokens of an answer")
    if longest < 2 * setting.capacity:
        sys.exit(f"--contexts ends at {longest}, expected at least twice window and sinks, {2 * setting.capacity}")
    return setting


def answer_tokens(setting: Comparison) -> int:
    """Return what a request may generate: its first token, its turns with one step each that is not timed, and one
    more, since with its last it would end."""
    return 1 + setting.rounds * (setting.steps + 1) + 1


def verify(setting: Comparison, engines: dict[str, EngineProcess], folders: dict[str, Path]) -> dict[str, str]:
    """Check tokens, and warm the engines up. Raises `Mismatch` if they are wrong."""
    vocab = setting.shape["vocab"]
    inside, past = (
        [prompt(length - ANSWER, seed, vocab) for seed in range(REQUESTS)]
        for length in (setting.capacity // 2, 2 * setting.capacity)
    )
    verified = check_rows(setting, engines, folders, inside, past, ANSWER)
    if engines[WINDOW].generate(past, ANSWER).tokens == engines[AHN].generate(past, ANSWER).tokens:
        raise Mismatch("past the window the memory does not change a token, so they show nothing")
    return verified


def measure(setting: Comparison, engines: dict[str, EngineProcess], number: int) -> dict[str, Any]:
    """Run one repetition; return the load of the machine before it, and by context and row what was measured."""
    load, began = os.getloadavg()[0], time.monotonic()
    contexts = setting.contexts if number % 2 else setting.contexts[::-1]
    measured = {context: measure_at(setting, engines, context, number) for context in contexts}
    report.say(f"repetition {number + 1}: {time.monotonic() - began:.0f} s, load {load:.1f} before")
    return {"load": load, "contexts": measured}


def measure_at(setting: Comparison, engines: dict[str, EngineProcess], context: int, number: int) -> dict[str, Any]:
    """Measure one length: prompts first, then decode steps by turns, the first one alternating."""
    answer = answer_tokens(setting)
    tokens = prompt(context - answer - 1, number, setting.shape["vocab"])  # a request ends at its greatest length too
    measured: dict[str, dict[str, Any]] = {}
    for row, engine in engines.items():
        held = engine.hold(tokens, answer)
        if held.refused:
            sys.exit(f"{row} has no room for {context} tokens: {held.refused}")
        measured[row] = {"first_token_s": held.first_token_s, "rounds_s": [], "blocks": 0}
    in_turn = list(engines)
    for _ in range(setting.rounds):
        for row in in_turn:
            decoding = engines[row].decode(setting.steps)
            measured[row]["rounds_s"].append(statistics.median(decoding.steps_s))
            measured[row]["blocks"] = max(measured[row]["blocks"], decoding.blocks)
        in_turn.reverse()
    for engine in engines.values():
        engine.release()
    medians = {row: 1e3 * statistics.median(values["rounds_s"]) for row, values in measured.items()}
    report.say(f"{context} tokens: " + ", ".join(f"{row} {median:.2f} ms" for row, median in medians.items()))
    return measured


def figures(
    setting: Comparison, info: dict[str, dict[str, Any]], repetitions: list[dict[str, Any]], context: int
) -> dict[str, dict[str, Any]]:
    """Return all repetitions of one length together, by row.

    Times are in seconds, ratios full attention's over the row's. ``token_s`` is that of the fastest repetition,
    ``token_ratio`` the median over all.
    """
    by_row: dict[str, dict[str, Any]] = {}
    for row in setting.rows:
        turns = [repetition["contexts"][context][row] for repetition in repetitions]
        rounds = [seconds for turn in turns for seconds in turn["rounds_s"]]
        blocks = max(turn["blocks"] for turn in turns)
        by_row[row] = {
            "token_s": min(statistics.median(turn["rounds_s"]) for turn in turns),
            "least_s": min(rounds),
            "greatest_s": max(rounds),
            "rounds_s": rounds,
            "first_token_s": statistics.median(turn["first_token_s"] for turn in turns),
            "blocks": blocks,
            "cache_bytes": blocks * info[row]["block_bytes"],
        }
        values, full = by_row[row], by_row[FULL]
        pairs = zip(full["rounds_s"], rounds, strict=True)
        values["token_ratio"] = statistics.median(whole / part for whole, part in pairs)
        values["cache_ratio"] = full["cache_bytes"] / values["cache_bytes"]
        values["first_token_ratio"] = full["first_token_s"] / values["first_token_s"]
    return by_row


def device(result: dict[str, Any]) -> str:
    """Return what the engines ran on: the GPU, or the processor with the threads of one."""
    info = result["engines"][FULL]
    if info["device"] != "cpu":
        return str(info["device"])
    threads = "1 thread" if info["threads"] == 1 else f"{info['threads']} threads"
    return f"{result['machine']['cpu']}, {threads} an engine"


def paragraphs(setting: Comparison, result: dict[str, Any]) -> list[str]:
    """Return the result for reading."""
    info = result["engines"][FULL]
    compiled = "vLLM's default compilation" if info["compiled"] else "eager"
    text = [
        f"{setting.describe()}, random weights; W = {setting.window:,}, S = {setting.sinks}, blocks of "
        f"{info['block_size']}; {device(result)}, {compiled}; {result['machine']['versions']}. One request in each of "
        f"three engines, which took turns of {setting.steps} decode steps. Times per token are medians over the turns "
        f"of the fastest of {setting.repetitions} repetition(s), their ratios medians over all, between turns of one "
        "round; times to the first token are medians. The load of the machine before the repetitions was "
        f"{' and '.join(f'{load:.1f}' for load in result['loads'])}. {result['seconds']:.0f} s in all.",
    ]
    headers = ["tokens", *(ROWS[row].text for row in setting.rows), "full / window", "full / AHN"]
    for title, unit, value, ratio, factor in PARTS:
        lines = []
        for context, rows in result["contexts"].items():
            cells = [f"{factor * rows[row][value]:.2f}" for row in setting.rows]
            lines.append([f"{int(context):,}", *cells, *(f"{rows[row][ratio]:.2f}" for row in setting.rows[1:])])
        text += [f"## {title}, {unit}", report.table(headers, lines, left=0)]
    return text + report.checked(result["verified"])


def draw(setting: Comparison, result: dict[str, Any], file: Path) -> None:
    """Draw cache on the left and time per token on the right, over length, a line a row. Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with pyplot.rc_context(curves.STYLE | {"font.size": 11, "lines.linewidth": 2}):
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for axes, (title, unit, value, _, factor) in zip(panels, PARTS, strict=False):
            values = {row: [factor * rows[row][value] for rows in result["contexts"].values()] for row in setting.rows}
            _draw_panel(axes, setting, values, unit)
            axes.set_title(f"{title}, {unit}", loc="left", fontsize=12)
        text = f"{setting.describe()}; window {setting.window:,} + {setting.sinks} sinks; one request; {device(result)}"
        figure.suptitle(text, x=0.01, ha="left", fontsize=10, color="#606060")
        figure.savefig(file, dpi=150)
        pyplot.close(figure)


def _draw_panel(axes: Any, setting: Comparison, values: dict[str, list[float]], unit: str) -> None:
    """Draw lines of ``values`` by row at every length, which end in their name and last value."""
    lengths = setting.contexts[::-1]
    top = 1.05 * max(map(max, values.values()))
    axes.set_xscale("log", base=2)
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_xticks(lengths, [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths])
    axes.minorticks_off()
    axes.set_ylim(0, top)
    axes.set_xlabel("tokens of context")
    axes.axvline(setting.capacity, color="#c8c8c8", linewidth=1, zorder=0)
    at_top = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "va": "top"}
    axes.annotate("window + sinks", (setting.capacity, 1), (4, 0), color="#707070", fontsize=9, **at_top)
    ends = []
    for row, column in values.items():
        name, colour = CURVES[row]
        axes.plot(lengths, column, color=colour, marker="o", markersize=4, clip_on=False)
        ends.append((column[-1] / top, f"{name}\n{column[-1]:.3g} {unit}", colour))
    at_end = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "center", "linespacing": 1.15}
    for height, (_, label, colour) in curves.spread(ends, 0.125):
        axes.annotate(label, (1, height), (10, 0), color=colour, **at_end)


if __name__ == "__main__":
    main()
