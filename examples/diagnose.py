"""Three mistakes with batch norm, planted in a network that reads digits, and found by jaxbn.diagnose.

A network is trained. Then three copies get one mistake each: running statistics that were not carried on,
weights that changed after the statistics were measured, and evaluation in train mode. Each copy is diagnosed
on held-out images. The report is printed, and its picture is saved.

    python examples/diagnose.py        # about a minute on two cores
"""

from __future__ import annotations

import functools
from typing import Any

import _command
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _data import accuracy, batches, load
from _progress import Progress
from rich.console import Console

from jaxbn.diagnose import Report, diagnose_linen
from jaxbn.linen import BatchNorm

BATCH_SIZE = 64
LEARNING_RATE = 0.3


class Net(nn.Module):
    widths: tuple[int, ...] = (16, 16, 32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        for number, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), 2 if number == 2 else 1, use_bias=False)(x)
            x = nn.relu(BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.mean((1, 2)))


OPTIMIZER = optax.sgd(LEARNING_RATE)


@functools.partial(jax.jit, static_argnames="model")
def train_step(model: Net, variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    def loss_of(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    grads, updates = jax.grad(loss_of, has_aux=True)(variables["params"])
    changes, opt_state = OPTIMIZER.update(grads, opt_state)
    return {"params": optax.apply_updates(variables["params"], changes), **updates}, opt_state


@functools.partial(jax.jit, static_argnames=("model", "train"))
def run(model: Net, variables: Any, images: jax.Array, *, train: bool) -> jax.Array:
    logits: jax.Array = model.apply(variables, images, train=train, mutable=["batch_stats"])[0]
    return logits


def diagnose(model: Net, variables: Any, images: np.ndarray, steps: int, *, train: bool = False) -> Report:
    call = functools.partial(lambda apply, x, train: apply(x, train=train), train=train)
    return diagnose_linen(model, variables, [images[:128], images[128:256]], call=call, steps=steps)


def main() -> None:
    arguments = _command.parse_arguments(__doc__, epochs=10, out=True)
    digits = load()
    steps = 60 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    data = batches(digits, BATCH_SIZE, arguments.seed)
    model = Net(widths=(8, 8)) if arguments.fast else Net()
    init = jax.jit(functools.partial(model.init, train=False))
    fresh = init(jax.random.key(arguments.seed), jnp.zeros((1, 8, 8, 1)))
    variables, opt_state = fresh, OPTIMIZER.init(fresh["params"])
    for _ in Progress(range(steps), "training", len(digits.train_labels) // BATCH_SIZE):
        variables, opt_state = train_step(model, variables, opt_state, *next(data))

    # Only one kernel changes. The statistics behind it still belong to the old kernel.
    changed = jax.tree.map(lambda v: v, variables)
    layer = f"Conv_{len(model.widths) // 2}"
    changed["params"][layer]["kernel"] = 3 * variables["params"][layer]["kernel"]
    cases = {
        "healthy": (variables, False),
        "statistics not carried on": ({**variables, "batch_stats": fresh["batch_stats"]}, False),
        "weights changed after the statistics": (changed, False),
        "evaluated in train mode": (variables, True),
    }
    console = Console()
    for name, (spoiled, train) in cases.items():
        right = accuracy(run(model, spoiled, digits.test_images[:8], train=train), digits.test_labels[:8])
        everywhere = accuracy(run(model, spoiled, digits.test_images, train=train), digits.test_labels)
        report = diagnose(model, spoiled, digits.test_images, steps, train=train)
        console.rule(name)
        print(f"held-out accuracy {everywhere:.1%}; of the first 8 images, in a batch of their own, {right:.1%}")
        report.print()
        picture = arguments.out / f"diagnose_{name.split()[0]}.png"
        with _command.uninterrupted():
            report.draw(picture)
        print(f"picture {picture}")
    if arguments.fast:
        print(f"A fast run of {steps} steps: the healthy network may have findings, too.")


if __name__ == "__main__":
    main()
