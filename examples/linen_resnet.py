"""A small ResNet on handwritten digits in Flax Linen, with jaxbn's BatchNorm in place of Flax's.

After half of the training the network is saved with Orbax and restored, and training continues. The
checkpoint has Flax's layout: the same network with `flax.linen.BatchNorm` restores it too, and returns the
same logits.

    python examples/linen_resnet.py        # less than half a minute on two cores
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import _command
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _data import Batches, accuracy, batches, load
from tqdm import tqdm

# The one changed import. Before: from flax.linen import BatchNorm
from jaxbn.linen import BatchNorm

BATCH_SIZE = 64
LEARNING_RATE = 1.0


class ResNet(nn.Module):
    # A field only so that this example can build the network with Flax's layer, too.
    norm: type[nn.Module] = BatchNorm
    widths: tuple[int, ...] = (16, 16, 32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
        # Flax's momentum is the decay: 0.9 here is 0.1 in jaxbn's functions and in PyTorch. The default of
        # 0.99 averages over about 100 batches, which are five epochs here: the weights change too much meanwhile.
        norm = functools.partial(self.norm, use_running_average=not train, momentum=0.9)

        x = nn.relu(norm()(conv(self.widths[0], (3, 3))(x)))
        for width in self.widths:
            strides = 1 if x.shape[-1] == width else 2
            y = nn.relu(norm()(conv(width, (3, 3), strides)(x)))
            y = norm()(conv(width, (3, 3))(y))
            if strides != 1:
                x = norm()(conv(width, (1, 1), strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class TrainState(NamedTuple):
    step: jax.Array
    variables: Any
    opt_state: Any


def init(model: ResNet, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    variables = model.init(jax.random.key(seed), np.zeros((1, 8, 8, 1), np.float32), train=False)
    return TrainState(jnp.zeros((), int), variables, optimizer.init(variables["params"]))


@functools.partial(jax.jit, static_argnames=("model", "optimizer"))
def train_step(
    model: ResNet, optimizer: optax.GradientTransformation, state: TrainState, images: jax.Array, labels: jax.Array
) -> TrainState:
    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": state.variables["batch_stats"]}
        logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    grads, updates = jax.grad(loss_of, has_aux=True)(state.variables["params"])
    changes, opt_state = optimizer.update(grads, state.opt_state)
    params = optax.apply_updates(state.variables["params"], changes)
    return TrainState(state.step + 1, {"params": params, **updates}, opt_state)


@functools.partial(jax.jit, static_argnames="model")
def predict(model: ResNet, variables: Any, images: jax.Array) -> jax.Array:
    return model.apply(variables, images, train=False)


def train(
    model: ResNet, optimizer: optax.GradientTransformation, state: TrainState, data: Batches, steps: int
) -> TrainState:
    # None: no bar where the output is not a terminal, because it would fill a log.
    for _ in tqdm(range(steps), desc="training", unit="step", disable=None):
        state = train_step(model, optimizer, state, *next(data))
    return state


def main() -> str | None:
    """Runs the example; returns what is not as expected, or None."""
    arguments = _command.parse_arguments(__doc__, epochs=40, out=True)
    digits = load()
    steps = 4 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    data = batches(digits, BATCH_SIZE, arguments.seed)
    optimizer = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    model, flax_model = ResNet(), ResNet(norm=nn.BatchNorm)

    state = init(model, optimizer, arguments.seed)
    state = train(model, optimizer, state, data, steps // 2)
    before = predict(model, state.variables, digits.test_images)

    folder = arguments.out.resolve() / "linen_checkpoint"
    with _command.uninterrupted(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, state, force=True)
        checkpointer.wait_until_finished()
        # The tree of the network with Flax's layer: restoring raises an error if our tree is different.
        state = checkpointer.restore(folder, jax.eval_shape(lambda: init(flax_model, optimizer, arguments.seed)))
    after = predict(model, state.variables, digits.test_images)
    difference = float(np.abs(predict(flax_model, state.variables, digits.test_images) - after).max())

    state = train(model, optimizer, state, data, steps - steps // 2)
    logits = predict(model, state.variables, digits.test_images)

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
        return f"flax.linen.BatchNorm: expected the same logits to 1e-4, got a difference of {difference:.1e}"
    return None


if __name__ == "__main__":
    sys.exit(main())
