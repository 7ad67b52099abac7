"""Data-parallel training on eight simulated CPU devices: three ways to write it, one result.

With `jax.jit` over sharded arrays, batch norm needs no option. With `jax.shard_map` and `jax.pmap` it needs
`axis_name`. The first table compares the three ways with one device.

The second table shows what happens without `axis_name` if each device sees only images of its own classes.
Batch norm then removes on each device the mean that would tell the classes apart, and the network learns
less. `jaxbn.sync_state` gives all devices the same statistics afterwards, but cannot make up for that.

    python examples/data_parallel.py        # less than a minute on two cores
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import _command
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Digits, accuracy, batches, load
from _progress import Progress
from rich.console import Console
from rich.table import Table

import jaxbn

DEVICES = 8
BATCH_SIZE = 64
LEARNING_RATE = 1.0
WIDTHS = (16, 32)
COMPARED_STEPS = 20
AXIS = "batch"
P = jax.P


class TrainState(NamedTuple):
    """What a training step takes and returns; `norm` holds the running statistics of all layers."""

    params: Any
    norm: Any


def init(seed: int) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS) + 1)
    params, norm = {}, {}
    for layer, (before, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False)):
        kernel = jax.nn.initializers.he_normal()(keys[layer], (3, 3, before, width))
        norm_params, norm[f"conv{layer}"] = jaxbn.batch_norm_init(width)
        params[f"conv{layer}"] = {"kernel": kernel, "norm": norm_params}
    kernel = jax.nn.initializers.lecun_normal()(keys[-1], (WIDTHS[-1], 10))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(10)}
    return TrainState(params, norm)


def apply(
    params: Any, norm: Any, images: jax.Array, *, train: bool, axis_name: str | None = None
) -> tuple[jax.Array, Any]:
    """Returns `(logits, norm)`; with `axis_name` the devices along that axis share each layer's statistics."""
    x, new = images, {}
    for name, state in norm.items():
        p = params[name]
        x = jax.lax.conv_general_dilated(x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if train:
            x, new[name] = jaxbn.batch_norm_train(x, p["norm"], state, axis_name=axis_name)
        else:
            x, new[name] = jaxbn.batch_norm_eval(x, p["norm"], state)
        # SiLU is smooth. With ReLU, rounding decides whether a value very near 0 has a gradient, and rounding depends
        # on the order of summation.
        x = jax.nn.silu(x)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], new


@jax.jit
def predict(state: TrainState, images: jax.Array) -> jax.Array:
    return apply(state.params, state.norm, images, train=False)[0]


def gradients(
    state: TrainState, images: jax.Array, labels: jax.Array, *, axis_name: str | None = None, sync: bool = True
) -> tuple[tuple[jax.Array, Any], Any]:
    """Returns `((loss, norm), gradients)`; the loss is the mean over the devices along `axis_name`."""

    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, norm = apply(params, state.norm, images, train=True, axis_name=axis_name if sync else None)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return (loss if axis_name is None else jax.lax.pmean(loss, axis_name)), norm

    return jax.value_and_grad(loss_of, has_aux=True)(state.params)


def update(state: TrainState, norm: Any, grads: Any) -> TrainState:
    return TrainState(jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, grads), norm)


def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, *, axis_name: str | None = None
) -> tuple[TrainState, jax.Array]:
    """A step for one device, for `jax.jit` over sharded arrays, and, with `axis_name`, for `jax.shard_map`."""
    (loss, norm), grads = gradients(state, images, labels, axis_name=axis_name)
    return update(state, norm, grads), loss


def train_step_pmap(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    (loss, norm), grads = gradients(state, images, labels, axis_name=AXIS)
    # shard_map knows that the parameters are the same on all devices, and sums their gradients. pmap does not.
    return update(state, norm, jax.lax.pmean(grads, AXIS)), loss


def train_step_unsynchronized(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
    """A step for `jax.shard_map` whose devices share gradients but not statistics.

    `norm` has a leading axis of devices.
    """
    own = state._replace(norm=jax.tree.map(lambda v: v[0], state.norm))
    (loss, norm), grads = gradients(own, images, labels, axis_name=AXIS, sync=False)
    return update(state, jax.tree.map(lambda v: v[None], norm), grads), loss


def shard_map_step(mesh: jax.sharding.Mesh, step: Callable[..., Any], norm_spec: jax.P) -> Callable[..., Any]:
    state_spec = TrainState(P(), norm_spec)
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(state_spec, P(AXIS), P(AXIS)), out_specs=(state_spec, P())))


def sort_by_label(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts a batch by label: cut in this order, it gives each device one digit or two."""
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def train(
    step: Callable[..., Any],
    state: TrainState,
    digits: Digits,
    steps: int,
    *,
    seed: int,
    name: str,
    arrange: Callable[..., Any] = lambda *batch: batch,
) -> tuple[TrainState, np.ndarray]:
    """Returns the last state and the losses; `arrange` reorders or places each batch."""
    losses = []
    data = batches(digits, BATCH_SIZE, seed)
    for _ in Progress(range(steps), name, len(digits.train_labels) // BATCH_SIZE):
        state, loss = step(state, *arrange(*next(data)))
        losses.append(float(loss))
    return state, np.array(losses)


def difference(actual: Any, expected: Any) -> float:
    """Returns the largest difference of two trees, each array's relative to the array's largest value."""
    pairs = zip(jax.tree.leaves(jax.device_get(actual)), jax.tree.leaves(jax.device_get(expected)), strict=True)
    return float(np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs]))


def compare_ways(mesh: jax.sharding.Mesh, digits: Digits, steps: int, seed: int, console: Console) -> None:
    """Prints the losses of one device and of eight, for each way, and the largest differences.

    All ways start each step from the same state, because training over many steps magnifies rounding errors.
    """
    sharded, replicated = jax.NamedSharding(mesh, P(AXIS)), jax.NamedSharding(mesh, P())

    def on_mesh(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, *batch: step(jax.device_put(state, replicated), *jax.device_put(batch, sharded))

    one_device = jax.jit(train_step)
    pmapped = jax.pmap(train_step_pmap, axis_name=AXIS, in_axes=(None, 0, 0), out_axes=None)
    ways: dict[str, Callable[..., Any]] = {
        "one device": one_device,
        "jit": on_mesh(one_device),
        "shard_map": on_mesh(shard_map_step(mesh, functools.partial(train_step, axis_name=AXIS), P())),
        "pmap": lambda state, *batch: pmapped(state, *(v.reshape(DEVICES, -1, *v.shape[1:]) for v in batch)),
    }
    table = Table(
        "step",
        *ways,
        title=f"Loss on one device and on {DEVICES}",
        caption="largest: relative difference from one device of a loss,\n"
        "a parameter or a running statistic, over all steps",
    )
    state, differences = init(seed), []
    data = batches(digits, BATCH_SIZE, seed)
    for i in Progress(range(steps), "comparing", steps):
        batch = next(data)
        results = [step(state, *batch) for step in ways.values()]
        if i in (0, 1, 4, 9, steps - 1):
            table.add_row(str(i + 1), *(f"{loss:.7f}" for _, loss in results))
        differences.append([difference(result, results[0]) for result in results])
        state = results[0][0]
    largest = np.max(differences, axis=0)
    table.add_section()
    table.add_row("largest", *(f"{d:.1e}" for d in largest))
    console.print(table)


def compare_synchronization(mesh: jax.sharding.Mesh, digits: Digits, steps: int, seed: int, console: Console) -> None:
    """Prints held-out accuracies with and without shared statistics, for shuffled and for sorted batches."""
    synchronized = shard_map_step(mesh, functools.partial(train_step, axis_name=AXIS), P())
    unsynchronized = shard_map_step(mesh, train_step_unsynchronized, P(AXIS))
    sync = jax.jit(
        jax.shard_map(
            lambda norm: jaxbn.sync_state(jax.tree.map(lambda v: v[0], norm), AXIS),
            mesh=mesh,
            in_specs=P(AXIS),
            out_specs=P(),
        )
    )

    def held_out(state: TrainState) -> float:
        return accuracy(jax.device_get(predict(state, digits.test_images)), digits.test_labels)

    columns = []
    for arranged, arrange in (("shuffled", lambda *batch: batch), ("sorted", sort_by_label)):
        run = functools.partial(train, digits=digits, steps=steps, seed=seed, arrange=arrange)
        state = init(seed)
        together, losses = run(synchronized, state, name=f"{arranged}, synchronized")
        stacked = jax.tree.map(lambda v: jnp.stack([v] * DEVICES), state.norm)
        apart, own_losses = run(unsynchronized, state._replace(norm=stacked), name=f"{arranged}, unsynchronized")
        host = jax.device_get(apart)
        own = [held_out(host._replace(norm=jax.tree.map(lambda v, k=k: v[k], host.norm))) for k in range(DEVICES)]
        columns.append(
            [
                f"{losses[-10:].mean():.3f}",
                f"{held_out(together):.1%}",
                f"{own_losses[-10:].mean():.3f}",
                f"{own[0]:.1%}",
                f"{min(own):.1%} to {max(own):.1%}",
                f"{held_out(apart._replace(norm=sync(apart.norm))):.1%}",
            ]
        )
    rows = [
        ("synchronized", "training loss"),
        ("", "accuracy"),
        ("unsynchronized", "training loss"),
        ("", "accuracy, device 0"),
        ("", "accuracy, all devices"),
        ("", "accuracy, sync_state"),
    ]
    table = Table(
        "statistics", "", "shuffled", "sorted by class", title=f"After {steps} steps; accuracies are held-out"
    )
    for row, *values in zip(rows, *columns, strict=True):
        table.add_row(*row, *values)
    console.print(table)


def main() -> None:
    arguments = _command.parse_arguments(__doc__, epochs=10)
    # Before the first use of JAX, which creates the devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    console = Console()
    digits = load()
    steps = 2 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    # Auto: under jit, the compiler decides how the devices share the work.
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))

    compare_ways(mesh, digits, min(COMPARED_STEPS, steps), arguments.seed, console)
    compare_synchronization(mesh, digits, steps, arguments.seed, console)
    if arguments.fast:
        print(f"A fast run of {steps} steps: the accuracies mean nothing.")


if __name__ == "__main__":
    main()
