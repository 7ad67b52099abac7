"""Writes torch_family.npz, what PyTorch's layers other than batch norm do: `python -m golden.make_torch_family`.

To be run in the folder of the tests, with what make_torch.py needs; the file is laid out as the one it writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from golden.make_torch import TRAINING_STEPS, Inputs, draw, run, write

PATH = Path(__file__).with_name("torch_family.npz")


class Kind(NamedTuple):
    layer: str  # its name in torch.nn
    shape: tuple[int, ...]  # of a batch; channels are on axis 1
    arguments: tuple[Any, ...]  # of the layer
    params_shape: tuple[int, ...]


def group_norms(shape: tuple[int, ...], *groups: int) -> dict[str, Kind]:
    channels = shape[1]
    return {
        f"GroupNorm-{len(shape) - 2}d-{g}-of-{channels}": Kind("GroupNorm", shape, (g, channels), (channels,))
        for g in groups
    }


def over_last(layer: str, shape: tuple[int, ...], *counts: int) -> dict[str, Kind]:
    return {f"{layer}-{len(shape)}d-last-{k}": Kind(layer, shape, (shape[-k:],), shape[-k:]) for k in counts}


KINDS = {
    **group_norms((4, 6), 2),
    **group_norms((3, 6, 5), 1, 3, 6),
    **group_norms((3, 8, 3, 2), 4, 8),
    **group_norms((2, 4, 2, 3, 2), 1, 2),
    "InstanceNorm1d": Kind("InstanceNorm1d", (4, 3, 5), (3,), (3,)),
    "InstanceNorm2d": Kind("InstanceNorm2d", (3, 3, 4, 2), (3,), (3,)),
    "InstanceNorm3d": Kind("InstanceNorm3d", (2, 3, 2, 3, 2), (3,), (3,)),
    **over_last("LayerNorm", (4, 6), 1),
    **over_last("LayerNorm", (3, 4, 5), 1, 2),
    **over_last("LayerNorm", (2, 3, 4, 3), 3),
    **over_last("RMSNorm", (4, 6), 1),
    **over_last("RMSNorm", (3, 4, 5), 1, 2),
    **over_last("RMSNorm", (2, 3, 4, 3), 3),
}

OPTIONS = {
    "GroupNorm": ({"affine": True}, {"affine": False}),
    "InstanceNorm": tuple(
        {"affine": affine, "track_running_stats": track, "momentum": 0.1}
        for affine in (True, False)
        for track in (True, False)
    ),
    "LayerNorm": (
        {"elementwise_affine": True},
        {"elementwise_affine": True, "bias": False},
        {"elementwise_affine": False},
    ),
    "RMSNorm": (
        {"elementwise_affine": True, "eps": 1e-5},
        {"elementwise_affine": True, "eps": None},
        {"elementwise_affine": False, "eps": None},
    ),
}


class Case(NamedTuple):
    kind: str
    options: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.kind, *(f"{name}={value}" for name, value in self.options.items())])


CASES = [
    Case(kind, options)
    for kind in KINDS
    for family, choices in OPTIONS.items()
    if kind.startswith(family)
    for options in choices
]


def make_inputs(kind: str) -> Inputs:
    layer, shape, _, params_shape = KINDS[kind]
    if layer.startswith("InstanceNorm"):
        return draw(shape, TRAINING_STEPS + 1, params_shape)
    inputs = draw(shape, 1, params_shape)
    # Beside values this small each eps counts, the machine's too.
    return inputs._replace(x=inputs.x * np.float32(1e-3)) if layer == "RMSNorm" else inputs


def record(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    import torch

    layer, _, arguments, _ = KINDS[case.kind]
    results = run(getattr(torch.nn, layer)(*arguments, **case.options), inputs)
    # PyTorch's InstanceNorm has this buffer, and leaves it at 0.
    results.pop("num_batches_tracked", None)
    return results


if __name__ == "__main__":
    write(PATH, CASES, make_inputs, record)
