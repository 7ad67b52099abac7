"""The command `python -m jaxbn.diagnose`."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Sequence

from jaxbn.diagnose._api import diagnose_statistics
from jaxbn.diagnose._checkpoints import load


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1 if there are errors, 2 if the checkpoint cannot be read.

    Example:
      >>> import numpy as np, pathlib, tempfile
      >>> from jaxbn.diagnose import main
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "net.npz"
      >>> np.savez(file, **{"norm.running_mean": np.ones(2), "norm.running_var": np.ones(2)})
      >>> main([str(file), "--plain"])
      layer  channels  running std  seen
      norm          2         1..1     ?
      <BLANKLINE>
      1 norm layer: no findings
      <BLANKLINE>
      not checked
        initial_weight: needs decay and steps
        short_memory: needs decay
        zero_scale: needs the scale beside the statistics, if the layer has one
        huge_bias: needs the bias beside the statistics, if the layer has one
        replicas: needs the statistics of all devices, and replica_axis
        drift, parting, few_values, not_finite_input, train_mode, depends_on_batch: needs the model and batches:
            diagnose_linen or diagnose_nnx
      0
    """
    parser = argparse.ArgumentParser(prog="python -m jaxbn.diagnose", description=str(__doc__).splitlines()[0])
    parser.add_argument("checkpoint", type=pathlib.Path, help=".npz, .safetensors, .msgpack, or a folder of Orbax")
    parser.add_argument("--eps", type=float, default=1e-5, help="that the network adds to variances (default: 1e-5)")
    parser.add_argument("--decay", type=float, help="of the running statistics: Flax's momentum, 1 - PyTorch's")
    parser.add_argument("--cumulative", action="store_true", help="they are averages instead: momentum=None")
    parser.add_argument("--steps", type=int, help="batches seen, where the checkpoint does not say")
    parser.add_argument("--replica-axis", type=int, help="axis of devices in the statistics: 0 for what pmap gives")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plain", action="store_true", help="print plain text, also where rich is installed")
    parser.add_argument("--draw", type=pathlib.Path, metavar="FILE", help="save a picture, too")
    given = parser.parse_args(arguments)
    try:
        report = diagnose_statistics(
            load(given.checkpoint),
            eps=given.eps,
            decay=given.decay,
            cumulative=given.cumulative,
            steps=given.steps,
            replica_axis=given.replica_axis,
        )
    except (OSError, ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(report.to_json())
    elif given.plain or importlib.util.find_spec("rich") is None:
        print(report)
    else:
        report.print()
    if given.draw is not None:
        report.draw(given.draw)
    return 0 if report.ok else 1
