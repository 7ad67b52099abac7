"""Measure the norms beside Flax's and PyTorch's: time, memory, compiled programs
and accuracy. Compare the ratios within one run; absolute times do not carry
over to other machines.

    python -m benchmarks SUBCOMMAND --help

The durations below are those of the default options on two cores.
"""

from __future__ import annotations

import argparse
import importlib
import sys

SUBCOMMANDS = {
    "time": "time of one norm beside the limit of memory; 1 minute",
    "tables": "Markdown tables of what `time --out` saved; 2 seconds",
    "steps": "training steps, dispatch, residuals, growth; 13 minutes",
    "traffic": "reads and writes of programs for CPU; 25 seconds",
    "programs": "programs for an NVIDIA H100 and a TPU v5e; 7 minutes",
    "size": "size of programs, time to the first step; 15 minutes",
    "collectives": "collectives, and programs for up to 256 devices; 10 minutes",
    "accuracy": "output error beside float64 NumPy; 3 seconds",
    "folding": "evaluation with batch norms folded away; 2 minutes",
    "formulations": "one computation written in several ways; 20 seconds",
}


def parser_for(arguments: list[str]) -> argparse.ArgumentParser:
    """The parser of all subcommands, with the options of the one that `arguments` begins with.

    Only that subcommand's module is imported, so that the list of subcommands appears without importing JAX.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=layout)
    subcommands = parser.add_subparsers(title="subcommands", metavar="SUBCOMMAND", required=True)
    for name, summary in SUBCOMMANDS.items():
        own = subcommands.add_parser(name, help=summary, formatter_class=layout)
        if arguments[:1] == [name]:
            module = importlib.import_module(f"benchmarks.commands.{name}")
            own.description = module.__doc__
            own.set_defaults(run=module.run)
            if hasattr(module, "add_arguments"):
                module.add_arguments(own)
    return parser


def main() -> str | None:
    """Runs the subcommand that the command line names, and returns its error message, if any."""
    arguments = sys.argv[1:]
    chosen = parser_for(arguments).parse_args(arguments)
    return chosen.run(chosen)


if __name__ == "__main__":
    sys.exit(main())
