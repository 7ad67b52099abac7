# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "torch==2.13.0"]
# ///
"""Writes torch_batch_norm.npz, what PyTorch's batch norm layers do: `python make_torch.py`.

The file holds the version of torch as `torch`, the inputs of each kind of layer as `kind/field`, and
the results of each case as `case/name`. Tests import the cases from here, so torch, which they may
not have, is imported where it is used.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PATH = Path(__file__).with_name("torch_batch_norm.npz")

# Each case trains this many times, on a new batch each time, and evaluates once on one more batch.
TRAINING_STEPS = 3

# Name in torch.nn, and the shape of a batch; channels are on axis 1.
KINDS = {
    "1d": ("BatchNorm1d", (6, 3)),
    "1d-length": ("BatchNorm1d", (4, 3, 5)),
    "2d": ("BatchNorm2d", (3, 3, 4, 2)),
    "3d": ("BatchNorm3d", (2, 3, 2, 3, 2)),
}


class Case(NamedTuple):
    kind: str
    affine: bool
    track_running_stats: bool
    momentum: float | None

    def __str__(self) -> str:
        options = [name for name in ("affine", "track_running_stats") if getattr(self, name)]
        return "-".join([self.kind, *options, f"momentum={self.momentum}"])


CASES = [Case(*options) for options in itertools.product(KINDS, (True, False), (True, False), (0.1, None))]


class Inputs(NamedTuple):
    x: np.ndarray  # float32[steps, N, C, ...]
    dy: np.ndarray  # like x
    weight: np.ndarray  # float32[C], or what the layer's parameters have for a shape
    bias: np.ndarray  # like weight


def make_inputs(kind: str) -> Inputs:
    shape = KINDS[kind][1]
    return draw(shape, TRAINING_STEPS + 1, shape[1])


def draw(shape: tuple[int, ...], steps: int, params_shape: int | tuple[int, ...]) -> Inputs:
    """Returns a batch of `shape` for each step, each channel with an offset and a spread of its own."""
    channels = shape[1]
    rng = np.random.default_rng(len(shape))
    per_channel = (1, 1, channels) + (1,) * (len(shape) - 2)
    x = rng.standard_normal((steps, *shape))
    x = x * rng.uniform(0.3, 3, per_channel) + rng.uniform(-4, 4, per_channel)
    dy = rng.standard_normal(x.shape)
    weight, bias = rng.uniform(0.5, 2, params_shape), rng.standard_normal(params_shape)
    return Inputs(*(v.astype(np.float32) for v in (x, dy, weight, bias)))


def record(case: Case, inputs: Inputs) -> dict[str, np.ndarray]:
    import torch

    name, shape = KINDS[case.kind]
    layer = getattr(torch.nn, name)(
        shape[1], affine=case.affine, track_running_stats=case.track_running_stats, momentum=case.momentum
    )
    return run(layer, inputs)


def run(layer: Any, inputs: Inputs) -> dict[str, np.ndarray]:
    """Returns output, gradients of sum(y * dy) and buffers of PyTorch's layer, a row for each step."""
    import torch

    # The layer takes those that it has.
    layer.load_state_dict({"weight": torch.tensor(inputs.weight), "bias": torch.tensor(inputs.bias)}, strict=False)
    rows = defaultdict(list)
    for step, (x, dy) in enumerate(zip(inputs.x, inputs.dy, strict=True)):
        layer.train(step < TRAINING_STEPS)
        layer.zero_grad()
        x = torch.tensor(x, requires_grad=True)
        y = layer(x)
        (y * torch.tensor(dy)).sum().backward()
        rows["y"].append(y)
        rows["dx"].append(x.grad)
        for name, parameter in layer.named_parameters():
            rows["d" + name].append(parameter.grad)
        for name, buffer in layer.named_buffers():
            rows[name].append(buffer.clone())
    return {name: torch.stack(values).detach().numpy() for name, values in rows.items()}


def write(
    path: Path,
    cases: Sequence[Any],
    make_inputs: Callable[[str], Inputs],
    record: Callable[[Any, Inputs], dict[str, np.ndarray]],
) -> None:
    import torch

    if torch.__version__.split("+")[0] != "2.13.0":
        raise SystemExit(f"expected torch 2.13.0, got {torch.__version__}")
    torch.set_num_threads(1)
    arrays = {"torch": np.array(torch.__version__)}
    kinds = {case.kind: make_inputs(case.kind) for case in cases}
    for kind, inputs in kinds.items():
        arrays |= {f"{kind}/{name}": value for name, value in inputs._asdict().items()}
    for case in cases:
        arrays |= {f"{case}/{name}": value for name, value in record(case, kinds[case.kind]).items()}
    np.savez_compressed(path, **arrays)


def read(arrays: dict[str, np.ndarray], case: Any) -> tuple[Inputs, dict[str, np.ndarray]]:
    """Returns the inputs and the results of `case` in a file that `write` made."""
    prefix = f"{case}/"
    results = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return Inputs(*(arrays[f"{case.kind}/{name}"] for name in Inputs._fields)), results


if __name__ == "__main__":
    write(PATH, CASES, make_inputs, record)
