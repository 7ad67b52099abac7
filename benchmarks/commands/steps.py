"""What jaxbn costs beside Flax, in one norm and in whole training steps.

    python -m benchmarks steps
    python -m benchmarks steps --parts residuals dispatch --out out/
    python -m benchmarks steps --parts models --models ResNet-18 --size 96

residuals   bytes that reverse mode of one norm keeps, over the bytes of x
models      training steps (loss, gradients, SGD, update of batch_stats), with
            and without donation of the state: time, memory, and time to trace,
            lower and compile
dispatch    calls outside of jit on a tiny array, and a single norm's time to
            trace, lower and compile
growth      forward and backward of a norm as its batch and its channels double
devices     the same as 1 to 8 CPU devices share one batch; the devices are
            simulated, in a child process

Each part prints a table of jaxbn over Flax. Implementations take turns within
one run, so that other load on the machine slows all of them alike. Compare
ratios, not times. --out saves steps.json and steps.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib

from rich.console import Console
from tqdm import tqdm

from benchmarks.steps import devices, dispatch, growth, models, residuals
from benchmarks.steps.report import SIZED, draw, report
from benchmarks.timing import machine, versions

PARTS = ("residuals", "models", "dispatch", *SIZED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    choice = {"nargs": "+", "help": "from: %(choices)s (default: all)"}
    parser.add_argument("--parts", choices=PARTS, default=PARTS, metavar="PART", **choice)
    parser.add_argument("--models", choices=list(models.MODELS), default=list(models.MODELS), metavar="MODEL", **choice)
    parser.add_argument(
        "--batch", type=int, default=16, help="batch of the models (%(default)s), 128 times as large for the MLP"
    )
    parser.add_argument("--size", type=int, default=64, help="height and width of the ResNets' images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="how many times each call is timed (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="how many times each program is traced and compiled (%(default)s)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="folder for steps.json and steps.png")


def run(arguments: argparse.Namespace) -> None:
    rounds, repeats = arguments.rounds, arguments.repeats
    measures = {
        "residuals": [residuals.measure],
        "models": [
            functools.partial(models.measure, name, arguments.batch, arguments.size, rounds, repeats)
            for name in arguments.models
        ],
        "dispatch": [lambda: dispatch.measure(rounds, repeats)],
        "growth": [lambda: growth.measure(rounds)],
        "devices": [lambda: devices.measure(rounds)],
    }
    console = Console(width=130)
    rows = []
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
    for part in dict.fromkeys(arguments.parts):
        # disable=None shows the progress bar on terminals only, so that it does not fill log files.
        for measure in tqdm(measures[part], desc=part, disable=None):
            rows += measure()
            if arguments.out:
                results = {"machine": machine(), "results": [dataclasses.asdict(r) for r in rows]}
                (arguments.out / "steps.json").write_text(json.dumps(results, indent=1))
        report([r for r in rows if r.part == part], console)
    console.print(versions())
    if arguments.out:
        draw(rows, arguments.out / "steps.png")
