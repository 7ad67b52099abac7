"""A ResNet ported from PyTorch to Flax, with jaxbn's BatchNorm: the same logits and running statistics.

The networks' weights and PyTorch's results with them are stored, so PyTorch need not be installed. If it is
installed, a network with new weights is ported too, and the ported weights are loaded back into PyTorch.
Then the example shows the effect of common mistakes: the logits differ a little, and nothing else tells.

    python examples/port_from_torch.py     # less than a minute on two cores
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import sys
from typing import Any

import _command
import jax
import jax.numpy as jnp
import numpy as np
from _resnet import NORM, LinenResNet, NNXResNet, torch_name
from flax import nnx

from jaxbn.interop import load_torch, to_torch

# The networks and PyTorch's results with them are those of the tests.
sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent / "tests"))
from golden import make_torch_resnet as on_record

# Whether blocks are bottlenecks, and the number of blocks and the width of each stage.
Network = tuple[bool, tuple[int, ...], tuple[int, ...]]
# Common mistakes, and the fields of the network that make them.
MISTAKES: dict[str, dict[str, Any]] = {
    "none": {},
    "epsilon 1e-3, Keras' default": {"norm": NORM.copy({"epsilon": 1e-3})},
    'padding "SAME" with strides': {"same_padding": True},
    "momentum 0.1 in a layer": {"norm": NORM.copy({"momentum": 0.1})},
    "correction 0, Flax's default": {"norm": NORM.copy({"correction": 0})},
}


def largest(actual: Any, expected: Any) -> float:
    """Returns the largest difference of two arrays, or of two mappings of arrays."""
    if isinstance(expected, dict):
        return max(largest(actual[name], v) for name, v in expected.items())
    return float(np.abs(np.asarray(actual) - expected).max())


def statistics(trained: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the running statistics of a state dict without its counters, which Flax's layers do not have."""
    return {name: v for name, v in trained.items() if "running" in name}


def images(record: dict[str, Any]) -> jax.Array:
    # [N, C, H, W] in PyTorch, channels last in Flax.
    return jnp.asarray(np.moveaxis(record["x"], 1, -1), jnp.float32) / 255


@functools.partial(jax.jit, static_argnames="model")
def run_linen(model: LinenResNet, variables: Any, x: jax.Array) -> tuple[Any, Any]:
    """Returns the logits of evaluation, and the variables after one forward pass in training."""
    _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return model.apply(variables, x, train=False), {**variables, **updates}


@nnx.jit
def run_nnx(model: NNXResNet, x: jax.Array) -> jax.Array:
    """Returns the logits of evaluation; then one forward pass in training updates the model's statistics."""
    model.eval()
    logits = model(x)
    model.train()
    model(x)
    return logits


def port_to_linen(network: Network, record: dict[str, Any], **mistake: Any) -> tuple[Any, Any, dict[str, float]]:
    """Returns the variables, the report, and the differences from PyTorch: of the logits, and of the running
    statistics after one forward pass in training.
    """
    model, x = LinenResNet(*network, on_record.CLASSES, **mistake), images(record)
    # Shapes are enough: every value comes from the state dict, or load_torch raises an error.
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables, report = load_torch(record["state_dict"], shapes, torch_name)

    logits, trained = run_linen(model, variables, x)
    differences = {
        "logits": largest(logits, record["logits"]),
        "statistics": largest(to_torch(trained, torch_name), statistics(record["trained"])),
    }
    return variables, report, differences


def port_to_nnx(network: Network, record: dict[str, Any]) -> dict[str, float]:
    model = nnx.eval_shape(lambda: NNXResNet(*network, on_record.CLASSES, nnx.Rngs(0)))
    # The attributes have PyTorch's names, so nothing is renamed.
    model, _ = load_torch(record["state_dict"], model)
    logits = run_nnx(model, images(record))
    return {
        "logits": largest(logits, record["logits"]),
        "statistics": largest(to_torch(model), statistics(record["trained"])),
    }


def back_to_torch(network: Network, state_dict: dict[str, np.ndarray], record: dict[str, Any]) -> float:
    """Returns the largest difference between the logits of PyTorch's network with the ported and its own weights."""
    import torch

    model = on_record.build(network)
    model.load_state_dict({name: torch.from_numpy(v) for name, v in state_dict.items()}, strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(record["x"]).float() / 255)
    return largest(logits.numpy(), record["logits"])


def main() -> None:
    arguments = _command.parse_arguments(__doc__, out=True)
    with np.load(on_record.PATH) as file:
        arrays = dict(file)
    names = ["basic"] if arguments.fast else list(on_record.NETWORKS)
    records = {name: (on_record.NETWORKS[name], on_record.read(arrays, name)) for name in names}
    live = importlib.util.find_spec("torch") is not None
    if live:
        network = on_record.NETWORKS["basic"]
        model = on_record.randomize(on_record.build(network), 1000 + arguments.seed)
        new = on_record.record(model, on_record.make_input())
        records["new weights"] = network, on_record.read({f"new/{key}": v for key, v in new.items()}, "new")

    same = True
    print("largest difference from PyTorch   logits    statistics after a step")
    for name, (network, record) in records.items():
        variables, report, linen = port_to_linen(network, record)
        ported: dict[str, Any] = to_torch(variables, torch_name, counters=report.counters)
        same &= ported.keys() == record["state_dict"].keys()
        same &= all(np.array_equal(ported[key], v) for key, v in record["state_dict"].items())
        with _command.uninterrupted():
            np.savez(arguments.out / f"{name.replace(' ', '_')}.npz", **ported)
        results = {"Linen": linen, "NNX": port_to_nnx(network, record)}
        for flax, difference in results.items():
            print(f"{name:12} {flax:20} {difference['logits']:7.1e}   {difference['statistics']:7.1e}")
        if live:
            back = back_to_torch(network, ported, record)
            print(f"{name:12} {'back in PyTorch':20} {back:7.1e}")
    returned = "the same state dicts, bit for bit" if same else "OTHER state dicts"
    print(f"to_torch returns {returned}; saved as .npz in {arguments.out}")
    print(f"counters that have no place in the layers, in the last network: {len(report.counters)}")
    if not live:
        print("PyTorch is not installed: compared only with its stored results")

    if arguments.fast:
        print("\nA fast run of one network: the effect of mistakes is left out.")
    else:
        print("\nmistake                           logits    statistics after a step")
        for mistake, fields in MISTAKES.items():
            _, _, difference = port_to_linen(*records["basic"], **fields)
            print(f"{mistake:33} {difference['logits']:7.1e}   {difference['statistics']:7.1e}")


if __name__ == "__main__":
    main()
