"""``python -m fuzz``: random engines x random requests against the reference; exits with 1 if one was wrong."""

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
}
"""What has to be set before vLLM is imported: the engine runs in this process, on a thread of its own."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="begin no engine after so many (default 5)")
    parser.add_argument("--engines", type=int, metavar="N", help="begin no more engines than this")
    parser.add_argument("--seed", type=int, metavar="N", help="of the first engine (default: from the clock)")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one case, and show it")
    parser.add_argument("--core", choices=["cpu", "gpu"], default="cpu", help="gpu: in Triton's interpreter, smaller")
    parser.add_argument("--drafts", action="store_true", help="speculative decoding")
    parser.add_argument("--inexact", action="store_true", help="bfloat16 models and states, against plain schedules")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary there")
    return parser


def main() -> int:
    args = parser().parse_args()
    os.environ.update(ENVIRONMENT)
    if args.core == "gpu":
        from support import interpreted_engine, interpreter

        os.environ.update(interpreted_engine.ENVIRONMENT | {"VLLM_LOGGING_LEVEL": ENVIRONMENT["VLLM_LOGGING_LEVEL"]})
        interpreter.install_for_fla()
    from fuzz.case import CPU, INTERPRETED
    from fuzz.report import Switches, fuzz

    switches = Switches(INTERPRETED if args.core == "gpu" else CPU, args.drafts, args.inexact)
    if args.replay is not None:
        print(switches.draw(args.replay).describe(), flush=True)
        summary = fuzz(iter([args.replay]), switches)
    else:
        first = int(time.time()) if args.seed is None else args.seed
        print(f"first seed {first}", flush=True)
        summary = fuzz(itertools.count(first), switches, seconds=60 * args.minutes, engines=args.engines)
    print(summary.describe())
    same = "".join(f" --{name}" for name in ("drafts", "inexact") if getattr(args, name))
    same += " --core gpu" if args.core == "gpu" else ""
    for seed in summary.failures:
        print(f"replay it: PYTHONPATH=tests python -m fuzz --replay {seed}{same}")
    if args.json is not None:
        args.json.write_text(json.dumps(summary.to_dict(), indent=2) + "\n", encoding="utf-8")
    if summary.too_many_ties:
        print("more ties than 1 % of the positions: the tokens say too little")
    return int(bool(summary.failures) or summary.too_many_ties)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Triton's bindings would report their leaks below the summary
