"""Networks whose weights changed after training, before and after their statistics are recalibrated.

The network of linen.py trains with a constant learning rate, and averages of its weights are kept: an
exponential moving average (EMA), and the mean over epochs of stochastic weight averaging (SWA). Then the
smallest weights of the SWA network are pruned. No training batch passed through these networks, so their
running statistics belong to other weights, until jaxbn.recalibrate measures them.

    python examples/recalibrate.py        # less than a minute on two cores
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import _command
import jax
import numpy as np
import optax
from _data import Digits, accuracy, batches, load
from _progress import Progress
from linen import BATCH_SIZE, ResNet, init, predict, train_step
from rich.console import Console
from rich.table import Table

from jaxbn.recalibrate import recalibrate_linen

LEARNING_RATE = 0.3
EMA_DECAY = 0.98
PRUNED = 0.7
# Batches for recalibration need not have the size of training batches; they may be as large as memory allows.
# 479 is a third of the training images.
MEASURED_TOGETHER = 479


def train(model: ResNet, digits: Digits, steps: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """Returns the last variables, and the averages of the weights."""
    data, optimizer = batches(digits, BATCH_SIZE, seed), optax.sgd(LEARNING_RATE, momentum=0.9)
    state = init(model, optimizer, seed)
    epoch = len(digits.train_labels) // BATCH_SIZE
    ema, swa, averaged = None, None, 0
    for step in Progress(range(steps), "training", epoch):
        state = train_step(model, optimizer, state, *next(data))
        params = state.variables["params"]
        if step == steps // 2:
            ema = params
        if step > steps // 2:
            ema = mix(ema, params, 1 - EMA_DECAY)
            if step % epoch == epoch - 1 or step == steps - 1:
                averaged += 1
                swa = mix(params if swa is None else swa, params, 1 / averaged)
    return state.variables, {"EMA": ema, "SWA": swa}


@jax.jit
def mix(old: Any, new: Any, weight: float) -> Any:
    return jax.tree.map(lambda a, b: (1 - weight) * a + weight * b, old, new)


def prune(params: Any) -> Any:
    """Sets the smallest weights of each convolution to zero: a share of `PRUNED`."""
    return jax.tree.map(lambda w: w * (abs(w) > np.quantile(abs(w), PRUNED)) if w.ndim == 4 else w, params)


def evaluate(apply: Callable[..., jax.Array], images: np.ndarray) -> jax.Array:
    return apply(images, train=False)


def main() -> None:
    arguments = _command.parse_arguments(__doc__, epochs=20, out=True)
    digits = load()
    steps = 4 if arguments.fast else arguments.epochs * (len(digits.train_labels) // BATCH_SIZE)
    model = ResNet()
    last, networks = train(model, digits, steps, arguments.seed)
    networks[f"SWA, {PRUNED:.0%} pruned"] = prune(networks["SWA"])

    images = digits.train_images[: 100 if arguments.fast else None]
    data = [images[i : i + MEASURED_TOGETHER] for i in range(0, len(images), MEASURED_TOGETHER)]
    table = Table("weights", "running statistics", "accuracy", "loss", "seconds", title="Held-out digits")

    def report(weights: str, statistics: str, variables: Any, seconds: float | None = None) -> None:
        logits = predict(model, variables, digits.test_images)
        correct = accuracy(logits, digits.test_labels)
        loss = float(optax.softmax_cross_entropy_with_integer_labels(logits, digits.test_labels).mean())
        took = "" if seconds is None else f"{seconds:.1f}"
        table.add_row(weights, statistics, f"{correct:.2%}", f"{loss:.3f}", took)

    report("last", "of the training", last)
    for name in Progress(list(networks), "recalibrating", 1):
        table.add_section()
        variables = {**last, "params": networks[name]}
        report(name, "of the last weights", variables)
        for method in ("batchwise", "layerwise"):
            start = time.perf_counter()
            recalibrated = recalibrate_linen(model, variables, data, method=method, call=evaluate)
            jax.block_until_ready(recalibrated)
            report(name, f"recalibrated {method}", recalibrated, time.perf_counter() - start)

    path = arguments.out / "recalibrate.txt"
    with _command.uninterrupted(), path.open("w") as file:
        Console(file=file, width=80).print(table)
    Console().print(table)
    print("The seconds include compilation, which the first network needs.")
    print(f"table {path}")
    if arguments.fast:
        print(f"A fast run of {steps} steps: the numbers mean nothing.")


if __name__ == "__main__":
    main()
