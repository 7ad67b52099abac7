"""Measure the norms beside Flax's and PyTorch's: time, memory, compiled programs
and accuracy. Absolute times do not carry over between machines; ratios within
one run do.

    python -m benchmarks SUBCOMMAND --help
"""

from __future__ import annotations

import argparse
import importlib
import sys

# How long the default options take on two CPU cores with nothing compiled before.
SUBCOMMANDS = {
    "time": "time of a norm beside the limit of memory; TIME",
    "tables": "Markdown tables of what `time` saved; at once",
    "steps": "training steps, dispatch, residuals, growth; TIME",
    "traffic": "reads and writes of programs compiled for CPU; TIME",
    "programs": "programs compiled for an H100 and a TPU v5e; 7 minutes",
    "collectives": "collectives of one layer on eight devices; TIME",
    "accuracy": "output error beside float64 NumPy; TIME",
    "folding": "evaluation with batch norms folded away; TIME",
    "formulations": "one computation written in several ways; TIME",
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
