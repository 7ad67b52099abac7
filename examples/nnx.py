"""A small ResNet in Flax NNX with jaxbn's BatchNorm in place of Flax's: one import changes.

python examples/nnx.py        # less than half a minute on two cores
"""

from __future__ import annotations

import jax
import numpy as np
import optax
from _data import accuracy, batches, load
from flax import nnx

# The one changed import. Before: from flax.nnx import BatchNorm
from jaxbn.nnx import BatchNorm

BATCH_SIZE = 64
LEARNING_RATE = 1.0
WIDTHS = (16, 16, 32, 32)


class ConvNorm(nnx.Module):
    def __init__(
        self, before: int, width: int, size: int, strides: int = 1, *, norm: type[nnx.BatchNorm], rngs: nnx.Rngs
    ):
        he_normal = nnx.initializers.he_normal()
        self.conv = nnx.Conv(
            before, width, (size, size), strides=strides, use_bias=False, kernel_init=he_normal, rngs=rngs
        )
        # Flax's momentum is the decay: 0.9 here is 0.1 in jaxbn's functions and in PyTorch. The default of
        # 0.99 averages over about 100 batches, which are five epochs here: the weights change too much meanwhile.
        self.norm = norm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y: jax.Array = self.norm(self.conv(x))
        return y


class Block(nnx.Module):
    def __init__(self, before: int, width: int, *, norm: type[nnx.BatchNorm], rngs: nnx.Rngs):
        strides = 1 if before == width else 2
        self.first = ConvNorm(before, width, 3, strides, norm=norm, rngs=rngs)
        self.second = ConvNorm(width, width, 3, norm=norm, rngs=rngs)
        self.shortcut = None if strides == 1 else ConvNorm(before, width, 1, strides, norm=norm, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    # `norm` is there only so that this example can build the network with Flax's layer, too.
    def __init__(self, widths: tuple[int, ...], *, norm: type[nnx.BatchNorm] = BatchNorm, rngs: nnx.Rngs):
        self.stem = ConvNorm(1, widths[0], 3, norm=norm, rngs=rngs)
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nnx.List([Block(before, width, norm=norm, rngs=rngs) for before, width in pairs])
        self.head = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model: ResNet, optimizer: nnx.Optimizer[ResNet], images: jax.Array, labels: jax.Array) -> None:
    def loss_of(model: ResNet) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    # The norms update their statistics, and the optimizer the parameters, both in place.
    optimizer.update(model, nnx.grad(loss_of)(model))


@nnx.jit
def predict(model: ResNet, images: jax.Array) -> jax.Array:
    return model(images)


def main(epochs: int = 20, widths: tuple[int, ...] = WIDTHS) -> tuple[float, float]:
    """Trains, and prints a line for each epoch.

    Returns the accuracy on held-out images, and by how much the logits with Flax's BatchNorm differ.
    """
    digits = load()
    steps = len(digits.train_labels) // BATCH_SIZE
    model = ResNet(widths, rngs=nnx.Rngs(0))
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, epochs * steps)
    optimizer = nnx.Optimizer(model, optax.sgd(schedule), wrt=nnx.Param)
    test_images = jax.device_put(digits.test_images)
    data = batches(digits, BATCH_SIZE, seed=0)
    for epoch in range(1, epochs + 1):
        model.train()
        for _ in range(steps):
            train_step(model, optimizer, *jax.device_put(next(data)))
        # Without it, the norms would normalize by the batch of held-out images.
        model.eval()
        logits = predict(model, test_images)
        correct = accuracy(logits, digits.test_labels)
        print(f"epoch {epoch:2}: held-out accuracy {correct:.1%}")
    # Variables have the same names and shapes, so checkpoints of either layer load in the other.
    flax = ResNet(widths, norm=nnx.BatchNorm, rngs=nnx.Rngs(1))
    nnx.update(flax, nnx.state(model))
    flax.eval()
    difference = float(np.abs(predict(flax, test_images) - logits).max())
    print(f"Flax's BatchNorm with these variables: logits differ by {difference:.1g}")
    return correct, difference


if __name__ == "__main__":
    main()
