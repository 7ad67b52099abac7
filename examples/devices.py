"""Batch norm on several devices: the same batch on one device and on eight gives the same step, in two ways.

The devices are simulated on CPU. Under `jax.jit` statistics of a sharded batch are global without an option. Inside of
`jax.shard_map` each device sees its part of the batch, and `axis_name` makes the statistics those of the whole.

    python examples/devices.py        # a few seconds on two cores
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import optax
from _data import accuracy, batches, load

import jaxbn

DEVICES = 8
AXIS = "batch"
WIDTH = 64
BATCH_SIZE = 64
LEARNING_RATE = 0.5
P = jax.P


def init(key: jax.Array) -> tuple[Any, jaxbn.BatchNormState]:
    """Returns parameters and running statistics of a network with one hidden layer."""
    first, second = jax.random.split(key)
    norm, stats = jaxbn.batch_norm_init(WIDTH)
    lecun_normal = jax.nn.initializers.lecun_normal()
    return {"in": lecun_normal(first, (64, WIDTH)), "norm": norm, "out": lecun_normal(second, (WIDTH, 10))}, stats


def loss_of(
    params: Any, stats: jaxbn.BatchNormState, images: jax.Array, labels: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jaxbn.BatchNormState]:
    """Returns the mean loss over the whole batch, and the new statistics."""
    x = images.reshape(len(images), -1) @ params["in"]
    x, stats = jaxbn.batch_norm_train(x, params["norm"], stats, axis_name=axis_name)
    loss = optax.softmax_cross_entropy_with_integer_labels(jax.nn.silu(x) @ params["out"], labels).mean()
    # On each device this is the mean over its own part.
    return (loss if axis_name is None else jax.lax.pmean(loss, axis_name)), stats


def train_step(
    params: Any, stats: jaxbn.BatchNormState, images: jax.Array, labels: jax.Array, axis_name: str | None = None
) -> tuple[Any, jaxbn.BatchNormState]:
    grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, images, labels, axis_name)
    return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), stats


@jax.jit
def predict(params: Any, stats: jaxbn.BatchNormState, images: jax.Array) -> jax.Array:
    # Evaluation needs no axis_name anywhere: it reads running statistics.
    x, _ = jaxbn.batch_norm_eval(images.reshape(len(images), -1) @ params["in"], params["norm"], stats)
    logits: jax.Array = jax.nn.silu(x) @ params["out"]
    return logits


def main(epochs: int = 10) -> dict[str, tuple[float, float]]:
    """Trains in each way; returns the held-out accuracy, and the largest difference from one device after one step."""
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, sharded = jax.NamedSharding(mesh, P()), jax.NamedSharding(mesh, P(AXIS))
    mapped = jax.shard_map(
        functools.partial(train_step, axis_name=AXIS),
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS), P(AXIS)),
        out_specs=P(),
    )
    # How a step runs, where parameters and statistics are, and where a batch is.
    ways = {
        "one device": (jax.jit(train_step), None, None),
        "eight, jit": (jax.jit(train_step), replicated, sharded),
        "eight, shard_map": (jax.jit(mapped), replicated, sharded),
    }
    digits = load()
    steps = epochs * (len(digits.train_labels) // BATCH_SIZE)
    first, results = None, {}
    for name, (step, place, place_batch) in ways.items():
        state = jax.device_put(init(jax.random.key(0)), place)
        data = batches(digits, BATCH_SIZE, seed=0)
        for number in range(steps):
            state = step(*state, *jax.device_put(next(data), place_batch))
            if number == 0:
                after = jax.device_get(state)
                first = first or after
                apart = jax.tree.map(lambda a, b: np.abs(a - b).max(initial=0), after, first)
        correct = accuracy(predict(*jax.device_get(state), digits.test_images), digits.test_labels)
        results[name] = correct, max(map(float, jax.tree.leaves(apart)))
        print(f"{name:16}  differs by {results[name][1]:.1e} after a step; held-out accuracy {correct:.1%}")
    return results


if __name__ == "__main__":
    # Before the first use of JAX, which creates the devices.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
