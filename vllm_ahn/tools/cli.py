"""The ``vllm-ahn`` command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from vllm_ahn import __version__
from vllm_ahn.errors import AHNError
from vllm_ahn.tools import doctor, inspect
from vllm_ahn.tools.cost import command as cost
from vllm_ahn.tools.distill import command as distill
from vllm_ahn.tools.evaluate import command as evaluate
from vllm_ahn.tools.evaluate import perplexity_command as perplexity
from vllm_ahn.tools.evaluate import tasks
from vllm_ahn.tools.tiny import command as make_tiny

_COMMANDS = (
    ("doctor", doctor, "report what is installed here, whether vLLM loads the AHN plugin, and what works"),
    ("inspect", inspect, "describe an AHN checkpoint: memory, shapes, parameters, base, and what serving would use"),
    ("distill", distill, "train an AHN for a base model by self-distillation, to serve it with"),
    ("eval", evaluate, "run evaluation suites with full attention, sinks + window and AHN, beside the paper's figures"),
    ("perplexity", perplexity, "measure perplexity and cache by position over a text, for the same methods"),
    ("cost", cost, "compute what long sequences cost, with AHN and without: FLOPs and cache"),
    ("tasks", tasks, "print the folder of the evaluation tasks, for lm-eval's --include_path"),
    ("make-tiny", make_tiny, "write a small random base model with tokenizer, and an AHN checkpoint for it"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit code: 1 for bad input, after one line on stderr, and for what doctor finds broken.
    """
    parser = argparse.ArgumentParser(
        prog="vllm-ahn",
        description="Artificial Hippocampus Networks in vLLM. To serve: vllm serve BASE --ahn CKPT.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module, summary in _COMMANDS:
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    args.command_line = shlex.join(["vllm-ahn", *(sys.argv[1:] if argv is None else argv)])
    try:
        return int(args.run(args))
    except AHNError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
