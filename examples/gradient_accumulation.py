"""Gradient accumulation with batch norm: what can be exact, and what cannot.

A step cuts its batch into microbatches and averages their gradients. The moments of all microbatches are
merged, and update the running statistics once. The first norm's running statistics are then those of the
whole batch, up to rounding. The gradients are not, because each microbatch is normalized by its own moments.
The tables show by how much they differ. With fixed statistics they do not differ.

    python examples/gradient_accumulation.py        # less than half a minute on two cores
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import _command
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import Digits, accuracy, batches, load
from _progress import Progress
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import jaxbn

BATCH_SIZE = 256
MICROBATCH_SIZES = (64, 16, 4)
TRAINED_SIZE = 32
BN_MOMENTUM = 0.1
LEARNING_RATE = 1.0
WIDTHS = (16, 32)


class TrainState(NamedTuple):
    """What a training step takes and returns; `norm` holds the running statistics of all layers."""

    params: Any
    norm: dict[str, jaxbn.BatchNormState]


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


def convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def apply(
    params: Any, norm: dict[str, jaxbn.BatchNormState] | None, images: jax.Array
) -> tuple[jax.Array, dict[str, jaxbn.Moments]]:
    """Returns the logits and the moments of each norm's input.

    Normalizes by the running statistics `norm`, or by the batch if that is None.
    """
    x, measured = images, {}
    for name in ("conv0", "conv1"):
        p = params[name]
        x = convolve(p["kernel"], x)
        if norm is None:
            # Normalization computes the same moments of the same x; compiled together, they are computed once.
            measured[name] = jaxbn.moments(x)
            x, _ = jaxbn.batch_norm_train(x, p["norm"], None)
        else:
            x, _ = jaxbn.batch_norm_eval(x, p["norm"], norm[name])
        # SiLU is smooth. With ReLU, rounding decides whether a value very near 0 has a gradient, and rounding depends
        # on the order of summation.
        x = jax.nn.silu(x)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], measured


@functools.partial(jax.jit, static_argnames="size")
def accumulate(
    params: Any, norm: dict[str, jaxbn.BatchNormState] | None, images: jax.Array, labels: jax.Array, *, size: int
) -> tuple[Any, dict[str, jaxbn.Moments]]:
    """Returns the mean gradients over microbatches of `size`, and their merged moments; `norm` as in `apply`."""

    def loss_of(params: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        logits, measured = apply(params, norm, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), measured

    def microbatch(total: Any, batch: tuple[jax.Array, ...]) -> tuple[Any, Any]:
        grads, measured = jax.grad(loss_of, has_aux=True)(params, *batch)
        return jax.tree.map(jnp.add, total, grads), measured

    cut = tuple(v.reshape(-1, size, *v.shape[1:]) for v in (images, labels))
    total, stacked = jax.lax.scan(microbatch, jax.tree.map(jnp.zeros_like, params), cut)
    grads = jax.tree.map(lambda g: g / len(cut[0]), total)
    return grads, {name: measured.merge_axis(0) for name, measured in stacked.items()}


@functools.partial(jax.jit, static_argnames="size")
def train_step(state: TrainState, images: jax.Array, labels: jax.Array, *, size: int) -> TrainState:
    grads, measured = accumulate(state.params, None, images, labels, size=size)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, state.params, grads)
    norm = {
        name: jaxbn.batch_norm_update(old, measured[name], momentum=BN_MOMENTUM) for name, old in state.norm.items()
    }
    return TrainState(params, norm)


@jax.jit
def predict(state: TrainState, images: jax.Array) -> jax.Array:
    return apply(state.params, state.norm, images)[0]


@functools.partial(jax.jit, static_argnames="size")
def update_separately(state: TrainState, images: jax.Array, *, size: int) -> jaxbn.BatchNormState:
    """Returns the first norm's running statistics if each microbatch updates them, with the same momentum."""

    def microbatch(norm: jaxbn.BatchNormState, images: jax.Array) -> tuple[jaxbn.BatchNormState, None]:
        x = convolve(state.params["conv0"]["kernel"], images)
        return jaxbn.batch_norm_train(x, None, norm, momentum=BN_MOMENTUM)[1], None

    cut = images.reshape(-1, size, *images.shape[1:])
    return jax.lax.scan(microbatch, state.norm["conv0"], cut)[0]


def difference(actual: Any, expected: Any) -> float:
    """Returns the Euclidean norm of the difference of two trees, relative to that of `expected`."""
    actual, expected = (ravel_pytree(tree)[0] for tree in (actual, expected))
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def compare(
    state: TrainState, images: np.ndarray, labels: np.ndarray, sizes: tuple[int, ...], title: str, console: Console
) -> None:
    """Prints how much microbatches differ from the whole batch."""

    def measure(size: int) -> dict[str, Any]:
        grads, measured = accumulate(state.params, None, images, labels, size=size)
        pooled = {k: jaxbn.batch_norm_update(v, measured[k], momentum=BN_MOMENTUM) for k, v in state.norm.items()}
        return {
            "gradients": grads,
            "gradients,\nfixed norms": accumulate(state.params, state.norm, images, labels, size=size)[0],
            "1st norm,\npooled": pooled["conv0"][:2],
            "1st norm,\nk updates": update_separately(state, images, size=size)[:2],
            "2nd norm,\npooled": pooled["conv1"][:2],
        }

    whole = measure(BATCH_SIZE)
    # The expected statistics come from batch_norm_train and the whole batch, without merging.
    whole["1st norm,\npooled"] = whole["1st norm,\nk updates"]
    table = Table("microbatches", *whole, title=title, caption=f"Relative differences from one batch of {BATCH_SIZE}.")
    for size in sizes:
        differences = [difference(value, whole[name]) for name, value in measure(size).items()]
        table.add_row(f"{BATCH_SIZE // size} of {size}", *(f"{d:.1e}" for d in differences))
    console.print(table)


def train(digits: Digits, steps: int, *, size: int, seed: int) -> TrainState:
    state = init(seed)
    data = batches(digits, BATCH_SIZE, seed)
    for _ in Progress(range(steps), f"microbatches of {size}", len(digits.train_labels) // BATCH_SIZE):
        state = train_step(state, *next(data), size=size)
    return state


def main() -> None:
    arguments = _command.parse_arguments(__doc__, epochs=40)
    console = Console()
    digits = load()
    steps = 2 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    sizes = MICROBATCH_SIZES[:1] if arguments.fast else MICROBATCH_SIZES

    batch = next(batches(digits, BATCH_SIZE, arguments.seed + 1))
    compare(init(arguments.seed), *batch, sizes, "With the initial weights", console)
    table = Table("microbatches", "held-out accuracy", title=f"After {steps} steps")
    for size in (BATCH_SIZE, TRAINED_SIZE):
        state = train(digits, steps, size=size, seed=arguments.seed)
        correct = accuracy(jax.device_get(predict(state, digits.test_images)), digits.test_labels)
        table.add_row(f"{BATCH_SIZE // size} of {size}", f"{correct:.1%}")
    compare(state, *batch, sizes, f"After {steps} steps with microbatches of {TRAINED_SIZE}", console)
    console.print(table)
    if arguments.fast:
        print(f"A fast run of {steps} steps: the accuracies mean nothing.")


if __name__ == "__main__":
    main()
