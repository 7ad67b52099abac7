"""Batch norm as pure functions: a convolutional network learns to read digits.

python examples/functions.py        # a few seconds on two cores
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from _data import accuracy, batches, load

import jaxbn

WIDTHS = (16, 32)
BATCH_SIZE = 64
LEARNING_RATE = 1.0


def init(key: jax.Array) -> tuple[Any, Any]:
    """Returns what is trained, and the running statistics: two trees of arrays."""
    keys = jax.random.split(key, len(WIDTHS) + 1)
    params, stats = {}, {}
    for k, (before, width) in enumerate(zip((1, *WIDTHS), WIDTHS, strict=False)):
        kernel = jax.nn.initializers.he_normal()(keys[k], (3, 3, before, width))
        # Scale 1 and bias 0; mean 0 and variance 1.
        norm, stats[f"conv{k}"] = jaxbn.batch_norm_init(width)
        params[f"conv{k}"] = {"kernel": kernel, "norm": norm}
    kernel = jax.nn.initializers.lecun_normal()(keys[-1], (WIDTHS[-1], 10))
    params["head"] = {"kernel": kernel, "bias": jnp.zeros(10)}
    return params, stats


def apply(params: Any, stats: Any, images: jax.Array, *, train: bool) -> tuple[jax.Array, Any]:
    """Returns the logits, and the running statistics: new ones in training, the same ones in evaluation."""
    x, new = images, {}
    for name, old in stats.items():
        layer = params[name]
        x = jax.lax.conv_general_dilated(x, layer["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        # Training normalizes by the batch, evaluation by the running statistics.
        norm = jaxbn.batch_norm_train if train else jaxbn.batch_norm_eval
        x, new[name] = norm(x, layer["norm"], old)
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], new


@jax.jit
def train_step(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any, jax.Array]:
    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, new = apply(params, stats, images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads)
    # Return the new statistics, and pass them to the next step: nothing is changed in place.
    return params, stats, loss


@jax.jit
def predict(params: Any, stats: Any, images: jax.Array) -> jax.Array:
    return apply(params, stats, images, train=False)[0]


def main(epochs: int = 20) -> float:
    """Trains, prints a line for each epoch, and returns the accuracy on held-out images."""
    digits = load()
    params, stats = init(jax.random.key(0))
    data = batches(digits, BATCH_SIZE, seed=0)
    for epoch in range(1, epochs + 1):
        for _ in range(len(digits.train_labels) // BATCH_SIZE):
            params, stats, loss = train_step(params, stats, *next(data))
        correct = accuracy(predict(params, stats, digits.test_images), digits.test_labels)
        print(f"epoch {epoch:2}: loss {loss:.3f}, held-out accuracy {correct:.1%}")
    return correct


if __name__ == "__main__":
    main()
