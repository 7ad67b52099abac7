"""The checks that a diagnosis could not make and what each needs: no findings does not mean no faults."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from jaxbn.diagnose._evidence import Norm

_OF_BATCHES = ("drift", "parting", "few_values", "not_finite_input")
_OF_MODELS = ("train_mode", "depends_on_batch")


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """Checks that were not made, because something that they need was not given.

    Attributes:
      kinds: the kinds of findings that were not looked for.
      layers: paths of the layers in which they were not looked for.
      needs: what to give: an argument of the function or option of the command, or data for another function.

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> report = diagnose_statistics({"norm": {"mean": np.ones(2), "var": np.ones(2)}}, decay=0.9)
      >>> [(n.kinds, n.needs) for n in report.not_checked][0]
      (('initial_weight',), 'steps')
    """

    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    needs: str


def not_checked(norms: Sequence[Norm], reached: Collection[str] | None) -> list[NotChecked]:
    """`reached`: paths of the layers that got values from the batches; None if there were no batches and no model."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}

    def add(kinds: tuple[str, ...], norm: Norm, needs: str) -> None:
        found.setdefault((kinds, needs), []).append(norm.path)

    for norm in norms:
        no_decay = norm.decay is None and not norm.cumulative
        # Statistics that were never updated are a finding already; an average over all batches has no initial weight.
        if norm.initial_weight is None and not norm.untouched and not norm.cumulative:
            missing = [name for name, unknown in (("decay", no_decay), ("steps", norm.seen is None)) if unknown]
            add(("initial_weight",), norm, " and ".join(missing))
        if no_decay:
            add(("short_memory",), norm, "decay")
        if reached is None:
            if norm.scale is None:
                add(("zero_scale",), norm, "the scale of the layer in the same tree, if it has one")
            if norm.bias is None:
                add(("huge_bias",), norm, "the bias of the layer in the same tree, if it has one")
            if norm.disagreement is None:
                add(("replicas",), norm, "the statistics of all devices, and replica_axis")
            add(_OF_BATCHES + _OF_MODELS, norm, "the model and batches, in diagnose_linen or diagnose_nnx")
        elif norm.path not in reached:
            add(_OF_BATCHES, norm, "batches with values that reach the layer and are not masked")
    return [NotChecked(kinds, tuple(paths), needs) for (kinds, needs), paths in found.items()]
