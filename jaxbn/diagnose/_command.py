"""The command `python -m jaxbn.diagnose`."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from jaxbn.diagnose._api import diagnose_statistics
from jaxbn.diagnose._checkpoints import READERS, load
from jaxbn.diagnose._view.picture import check


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if there are errors, 2 if it failed itself.

    Args:
      arguments: of the command line; by default those of the process.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> from jaxbn.diagnose import main
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "net.npz"
      >>> np.savez(file, **{"norm.running_mean": np.ones(2), "norm.running_var": np.ones(2)})
      >>> main([str(file), "--plain"])
      layer  channels  running std  finding
      norm          2         1..1  none
      <BLANKLINE>
      not checked
        initial_weight: needs decay and steps
        short_memory: needs decay
        zero_scale: needs the scale of the layer in the same tree, if it has one
        huge_bias: needs the bias of the layer in the same tree, if it has one
        replicas: needs the statistics of all devices, and replica_axis
        drift, parting, few_values, not_finite_input, train_mode, depends_on_batch:
            needs the model and batches, in diagnose_linen or diagnose_nnx
      <BLANKLINE>
      1 norm layer: no findings
      0
    """
    parser = argparse.ArgumentParser(
        prog="python -m jaxbn.diagnose",
        description="Reports what is wrong with the batch norm statistics in a checkpoint, and what to do.",
        epilog="exit status: 0 no errors, 1 errors found, 2 the command itself failed",
    )
    parser.add_argument("checkpoint", type=pathlib.Path, help=f"{', '.join(READERS)}, or an Orbax folder")
    parser.add_argument("--eps", type=float, default=1e-5, help="eps of the norm layers (default: 1e-5)")
    parser.add_argument("--decay", type=float, help="weight of the old statistics: Flax's momentum, 1 - PyTorch's")
    parser.add_argument("--cumulative", action="store_true", help="statistics are averages of all batches")
    parser.add_argument("--steps", type=int, help="batches seen in training, if the checkpoint has no count")
    parser.add_argument("--replica-axis", type=int, metavar="AXIS", help="axis of devices; 0 for what pmap gives")
    parser.add_argument("--wide", action="store_true", help="show all figures and all layer names")
    parser.add_argument("--plain", action="store_true", help="print without colours")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--draw", type=pathlib.Path, metavar="FILE", help="also save a picture, such as report.png")
    given = parser.parse_args(arguments)
    try:
        if given.draw is not None:
            check(given.draw)
        options = {name: getattr(given, name) for name in ("eps", "decay", "cumulative", "steps", "replica_axis")}
        report = diagnose_statistics(load(given.checkpoint), **options)
        if given.json:
            print(report.to_json())
        elif given.plain or importlib.util.find_spec("rich") is None:
            print(report.to_text(verbose=given.wide))
        else:
            report.print(verbose=given.wide)
        if given.draw is not None:
            report.draw(given.draw)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if report.ok else 1
