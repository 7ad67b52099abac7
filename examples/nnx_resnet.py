"""A small ResNet on handwritten digits in Flax NNX, with jaxbn's BatchNorm in place of Flax's.

After half of the training the network is saved with Orbax and restored, and training continues. The
checkpoint has Flax's layout: the same network with `flax.nnx.BatchNorm` restores it too, and returns the
same logits.

    python examples/nnx_resnet.py        # less than half a minute on two cores
"""

from __future__ import annotations

import sys

import _command
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from _data import Batches, accuracy, batches, load
from flax import nnx
from tqdm import tqdm

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
        return self.norm(self.conv(x))


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
    def __init__(self, *, norm: type[nnx.BatchNorm] = BatchNorm, rngs: nnx.Rngs):
        self.stem = ConvNorm(1, WIDTHS[0], 3, norm=norm, rngs=rngs)
        pairs = zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)
        self.blocks = nnx.List([Block(before, width, norm=norm, rngs=rngs) for before, width in pairs])
        self.head = nnx.Linear(WIDTHS[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


@nnx.jit
def train_step(model: ResNet, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def loss_of(model: ResNet) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    optimizer.update(model, nnx.grad(loss_of)(model))


@nnx.jit
def apply(model: ResNet, images: jax.Array) -> jax.Array:
    return model(images)


def predict(model: ResNet, images: np.ndarray) -> jax.Array:
    model.eval()
    return apply(model, images)


def train(model: ResNet, optimizer: nnx.Optimizer, data: Batches, steps: int) -> None:
    model.train()
    # None: no bar where the output is not a terminal, because it would fill a log.
    for _ in tqdm(range(steps), desc="training", unit="step", disable=None):
        train_step(model, optimizer, *next(data))


def main() -> str | None:
    """Runs the example; returns what is not as expected, or None."""
    arguments = _command.parse_arguments(__doc__, epochs=40, out=True)
    digits = load()
    steps = 4 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    data = batches(digits, BATCH_SIZE, arguments.seed)

    def init(norm: type[nnx.BatchNorm]) -> tuple[ResNet, nnx.Optimizer]:
        model = ResNet(norm=norm, rngs=nnx.Rngs(arguments.seed))
        schedule = optax.cosine_decay_schedule(LEARNING_RATE, steps)
        return model, nnx.Optimizer(model, optax.sgd(schedule), wrt=nnx.Param)

    model, optimizer = init(BatchNorm)
    train(model, optimizer, data, steps // 2)
    before = predict(model, digits.test_images)

    folder = arguments.out.resolve() / "nnx_checkpoint"
    with _command.uninterrupted(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, nnx.state((model, optimizer)), force=True)
        checkpointer.wait_until_finished()
        # Into new networks, so that all values come from the checkpoint.
        restored, flax_restored = init(BatchNorm), init(nnx.BatchNorm)
        for fresh in (restored, flax_restored):
            nnx.update(fresh, checkpointer.restore(folder, nnx.state(fresh)))
    model, optimizer = restored
    after = predict(model, digits.test_images)
    difference = float(np.abs(predict(flax_restored[0], digits.test_images) - after).max())

    train(model, optimizer, data, steps - steps // 2)
    logits = predict(model, digits.test_images)

    identical = np.array_equal(before, after)
    print(f"checkpoint          after {steps // 2} steps, in {arguments.out / folder.name}")
    print(f"restored            logits {'bit for bit the same' if identical else 'DIFFER'}")
    print(f"Flax's BatchNorm    restores it too, logits differ by {difference:.2g}")
    if arguments.fast:
        print(f"accuracy            means nothing after a fast run of {steps} steps")
    else:
        print(f"held-out accuracy   {accuracy(logits, digits.test_labels):.2%} after {steps} steps")
    if not identical:
        return "checkpoint: expected the same logits after restoring"
    if difference > 1e-4:
        return f"flax.nnx.BatchNorm: expected the same logits to 1e-4, got a difference of {difference:.1e}"
    return None


if __name__ == "__main__":
    sys.exit(main())
