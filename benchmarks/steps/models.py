"""Networks with either batch norm, and what their training steps cost."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbn.linen
from benchmarks.comparison import Comparison, in_turn, kept_bytes, staged, timed
from benchmarks.resnet import resnet18, resnet50

NORMS = {
    "jaxbn": functools.partial(jaxbn.linen.BatchNorm, momentum=0.9),
    "flax": functools.partial(nn.BatchNorm, momentum=0.9),
}
CLASSES = 10
PART = "models"


class DenseBlock(nn.Module):
    norm: Callable[..., nn.Module]
    features: int
    train: bool

    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(self.features, use_bias=False)(x)
        return x + nn.relu(self.norm(use_running_average=not self.train)(y)), None


class ScannedMLP(nn.Module):
    """One block in a scan, whose reverse mode keeps residuals of every iteration."""

    norm: Callable[..., nn.Module]
    features: int = 256
    depth: int = 8

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(self.features)(x.reshape(-1, x.shape[-1]))
        axes = {"params": 0, "batch_stats": 0}
        blocks = nn.scan(DenseBlock, variable_axes=axes, split_rngs={"params": True}, length=self.depth)
        x, _ = blocks(self.norm, self.features, train)(x, None)
        return nn.Dense(CLASSES)(x)


class ConvBlock(nn.Module):
    norm: Callable[..., nn.Module]
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.features, (3, 3), self.stride, use_bias=False)(x)
        return nn.relu(self.norm(use_running_average=not train)(x))


class BlockwiseConvNet:
    """A network in which each block is a compiled program of its own.

    Residuals pass from one program to the next, so the compiler cannot remove any.
    """

    def __init__(self, norm: Callable[..., nn.Module]):
        sizes = [(32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1)]
        self.blocks = [ConvBlock(norm, *size) for size in sizes]
        self.head = nn.Dense(CLASSES)
        self.forward = [
            jax.jit(functools.partial(block.apply, train=True, mutable=["batch_stats"])) for block in self.blocks
        ]
        self.evaluate = [jax.jit(functools.partial(block.apply, train=False)) for block in self.blocks]

    def init(self, key: jax.Array, x: jax.Array, train: bool) -> dict[str, Any]:
        params, stats = [], []
        for block in self.blocks:
            x, variables = block.init_with_output(key, x, train=train)
            params.append(variables["params"])
            stats.append(variables["batch_stats"])
        params.append(self.head.init(key, x.mean((1, 2)))["params"])
        return {"params": params, "batch_stats": stats}

    def apply(self, variables: dict[str, Any], x: jax.Array, train: bool, mutable: Any = None) -> Any:
        *params, head = variables["params"]
        stats = []
        for k, (own, old) in enumerate(zip(params, variables["batch_stats"], strict=True)):
            both = {"params": own, "batch_stats": old}
            if train:
                x, updates = self.forward[k](both, x)
                stats.append(updates["batch_stats"])
            else:
                x = self.evaluate[k](both, x)
        logits = self.head.apply({"params": head}, x.mean((1, 2)))
        return (logits, {"batch_stats": stats}) if train else logits


class State(NamedTuple):
    params: Any
    stats: Any
    optimizer: Any


class Training:
    """A model, its initial state, and its training step."""

    def __init__(self, model: Any, variables: dict[str, Any], x: jax.Array, labels: jax.Array):
        self.model, self.batch = model, (x, labels)
        self.optimizer = optax.sgd(1e-3, momentum=0.9)
        self.state = State(variables["params"], variables["batch_stats"], self.optimizer.init(variables["params"]))

    def loss(self, params: Any, stats: Any, x: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        variables = {"params": params, "batch_stats": stats}
        logits, updates = self.model.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates["batch_stats"]

    def update(self, state: State, gradients: Any, stats: Any) -> State:
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), stats, optimizer)

    def step(self, state: State, x: jax.Array, labels: jax.Array) -> tuple[State, jax.Array]:
        (value, stats), gradients = jax.value_and_grad(self.loss, has_aux=True)(state.params, state.stats, x, labels)
        return self.update(state, gradients, stats), value

    def evaluate(self, state: State, x: jax.Array) -> jax.Array:
        return self.model.apply({"params": state.params, "batch_stats": state.stats}, x, train=False)


def carried(step: Callable, state: State, batch: tuple) -> Callable[[], None]:
    """A call of `step` that starts from the state that the last call returned."""

    def run() -> None:
        nonlocal state
        state, value = step(state, *batch)
        jax.block_until_ready((state, value))

    return run


def evaluated(evaluate: Callable, *arguments: Any) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(evaluate(*arguments))


def draw(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Inputs and labels of one batch."""
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32), jnp.asarray(rng.integers(0, CLASSES, shape[0]))


def kept_outside_jit(case: str, trainings: dict[str, Training]) -> Comparison:
    """Bytes of the residuals where no compiler sees the whole step, without parameters."""
    kept = {
        name: kept_bytes(t.loss, t.state.params, t.state.stats, *t.batch, has_aux=True, count_first=False)
        for name, t in trainings.items()
    }
    return Comparison(PART, case, "kept outside jit", "MB", kept)


def compiled_steps(case: str, trainings: dict[str, Training], rounds: int, repeats: int) -> list[Comparison]:
    functions = {name: (t.step, (t.state, *t.batch)) for name, t in trainings.items()}
    comparisons, steps = staged(PART, case, functions, repeats)
    calls, donated = {}, {}
    for name, t in trainings.items():
        evaluate = jax.jit(t.evaluate).lower(t.state, t.batch[0]).compile()
        donated[name] = jax.jit(t.step, donate_argnums=0).lower(t.state, *t.batch).compile()
        calls[name] = {
            "step": carried(steps[name], t.state, t.batch),
            # A copy: donation invalidates the buffers, and the other calls use them.
            "step, state donated": carried(donated[name], jax.tree.map(jnp.copy, t.state), t.batch),
            "eval": evaluated(evaluate, t.state, t.batch[0]),
        }
    comparisons += timed(PART, case, calls, rounds, warm_up=1)
    for kind, programs in (("", steps), (", state donated", donated)):
        memory = {name: program.memory_analysis() for name, program in programs.items()}
        totals = {
            name: m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
            for name, m in memory.items()
        }
        temporary = {name: m.temp_size_in_bytes for name, m in memory.items()}
        comparisons.append(Comparison(PART, case, f"temporary memory{kind}", "MB", temporary))
        comparisons.append(Comparison(PART, case, f"all memory{kind}", "MB", totals))
    return [*comparisons, kept_outside_jit(case, trainings)]


def blockwise_steps(case: str, trainings: dict[str, Training], rounds: int, repeats: int) -> list[Comparison]:
    updates = {name: jax.jit(t.update) for name, t in trainings.items()}

    def step(t: Training, update: Callable, state: State, *batch: jax.Array) -> tuple[State, jax.Array]:
        (value, stats), gradients = jax.value_and_grad(t.loss, has_aux=True)(state.params, state.stats, *batch)
        return update(state, gradients, stats), value

    calls = {
        name: {
            "step": carried(functools.partial(step, t, updates[name]), t.state, t.batch),
            "eval": evaluated(t.evaluate, t.state, t.batch[0]),
        }
        for name, t in trainings.items()
    }
    first = {name: [] for name in calls}
    for name in in_turn(calls, repeats):
        jax.clear_caches()
        start = time.perf_counter()
        calls[name]["step"]()
        first[name].append(time.perf_counter() - start)
    return [
        Comparison(PART, case, "first step", "ms", {name: statistics.median(s) for name, s in first.items()}),
        *timed(PART, case, calls, rounds, warm_up=1),
        kept_outside_jit(case, trainings),
    ]


def measure(name: str, batch: int, size: int, rounds: int, repeats: int) -> list[Comparison]:
    make, shape, measure = MODELS[name]
    x, labels = draw(shape(batch, size))
    models = {norm: make(NORMS[norm]) for norm in NORMS}
    # The variables of both layers have the same structure.
    variables = models["flax"].init(jax.random.key(0), x, train=True)
    trainings = {norm: Training(model, variables, x, labels) for norm, model in models.items()}
    return measure(name, trainings, rounds, repeats)


def images(batch: int, size: int) -> tuple[int, ...]:
    return batch, size, size, 3


MODELS = {
    "ResNet-18": (functools.partial(resnet18, num_classes=CLASSES), images, compiled_steps),
    "ResNet-50": (functools.partial(resnet50, num_classes=CLASSES), images, compiled_steps),
    "scanned-MLP": (ScannedMLP, lambda batch, size: (128 * batch, 64), compiled_steps),
    "convnet-by-block": (BlockwiseConvNet, lambda batch, size: (batch, 32, 32, 3), blockwise_steps),
}
