"""CPU seconds until a first step, measured once in a process that has traced and compiled nothing before.

`python -m benchmarks size` starts this module, and reads the seconds of each stage from the JSON that it prints:

    python -m benchmarks.first_step WORKLOAD SUBJECT
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from benchmarks.chips import compilers
from benchmarks.chips.compile import AXIS, norm_of, training_step
from benchmarks.chips.programs import STEP, Program
from benchmarks.resnet import resnet50
from jaxbn.diagnose import diagnose_linen, diagnose_nnx

IMAGES = (8, 64, 64, 3)
PROGRAMS = {
    "H100": Program("h100", "ResNet-50", STEP, "bfloat16"),
    "v5e": Program("v5e", "bottleneck", STEP, "bfloat16"),
}
# Of the network that is diagnosed: channels of its input and of its convolutions.
WIDTHS = (8, 8, 12, 16, 20, 24, 28, 32, 36)
# A function and its arguments, which may be without values.
Call = tuple[Callable, tuple]
Seconds = dict[str, float]


def in_turn(*stages: tuple[str, Callable[[Any], Any]]) -> Seconds:
    """CPU seconds of each stage, which takes what the stage before returned."""
    found, value = {}, None
    for name, stage in stages:
        start = time.process_time()
        value = stage(value)
        found[name] = time.process_time() - start
    return found


def traced(call: Call) -> Seconds:
    function, arguments = call
    return in_turn(("trace", lambda _: jax.jit(function).trace(*arguments)))


def compiled(call: Call) -> Seconds:
    function, arguments = call
    return in_turn(
        ("trace", lambda _: jax.jit(function).trace(*arguments)),
        ("lower", lambda trace: trace.lower()),
        ("compile", lambda lowered: lowered.compile()),
    )


def resnet(implementation: str) -> tuple[nn.Module, Callable, jax.ShapeDtypeStruct]:
    """A ResNet-50, its `init`, and its input without values."""
    model = resnet50(functools.partial(norm_of, implementation, "batch", momentum=0.9))
    x = jax.ShapeDtypeStruct(IMAGES, jnp.float32)
    return model, lambda x: model.init(jax.random.key(0), x, train=True), x


def gradients(implementation: str) -> Call:
    """Loss, gradients and new statistics of a ResNet-50."""
    model, init, x = resnet(implementation)

    def loss(params, stats, x):
        y, new = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
        return (y**2).mean(), new

    variables = dict(jax.eval_shape(init, x))
    return jax.value_and_grad(loss, has_aux=True), (variables.pop("params"), variables, x)


def initialization(implementation: str) -> Call:
    _, init, x = resnet(implementation)
    return init, (x,)


def evaluation(implementation: str) -> Call:
    model, init, x = resnet(implementation)
    return lambda variables, x: model.apply(variables, x, train=False), (jax.eval_shape(init, x), x)


def chip_step(chip: str, implementation: str, device: jax.Device | None = None) -> Call:
    """The training step that `python -m benchmarks programs` compiles for the chip."""
    mesh = jax.sharding.Mesh(np.array([device or compilers.devices(chip.lower(), 1)[0]]), (AXIS,))
    return training_step(PROGRAMS[chip], implementation, mesh)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for width in WIDTHS[1:]:
            x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train)(nn.Conv(width, (3, 3))(x)))
        return x


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List([nnx.Conv(*pair, (3, 3), rngs=rngs) for pair in itertools.pairwise(WIDTHS)])
        self.norms = nnx.List([jaxbn.nnx.BatchNorm(width, rngs=rngs) for width in WIDTHS[1:]])

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return x


def diagnosis(interface: str, subject: str) -> Seconds:
    """Of the network's training forward pass, or of diagnosing it twice: with two batches of one shape."""
    first, second = np.random.default_rng(0).standard_normal((2, 16, 12, 12, WIDTHS[0]), np.float32)
    if interface == "linen":
        model = LinenNet()
        variables = jax.jit(model.init)(jax.random.key(0), first)
        forward = functools.partial(model.apply, train=True, mutable=["batch_stats"]), (variables, first)
        diagnose = functools.partial(diagnose_linen, model, variables)
    else:
        model = NNXNet()
        graph, state = nnx.split(model)

        def train(state, x):
            model = nnx.merge(graph, state)
            return model(x), nnx.state(model)

        forward = train, (state, first)
        model.eval()
        diagnose = functools.partial(diagnose_nnx, model)
    if subject == "forward":
        return {"first": sum(compiled(forward).values())}
    return in_turn(("first", lambda _: diagnose([first])), ("again", lambda _: diagnose([second])))


WORKLOADS: dict[str, Callable[[str], Seconds]] = {
    "cpu": lambda name: compiled(gradients(name)),
    **{chip: lambda name, chip=chip: compiled(chip_step(chip, name)) for chip in PROGRAMS},
    "init": lambda name: traced(initialization(name)),
    "evaluation": lambda name: traced(evaluation(name)),
    "diagnose_linen": functools.partial(diagnosis, "linen"),
    "diagnose_nnx": functools.partial(diagnosis, "nnx"),
}

if __name__ == "__main__":
    workload, subject = sys.argv[1:]
    jax.config.update("jax_enable_compilation_cache", False)
    print(json.dumps(WORKLOADS[workload](subject)))
