"""Compiles programs for one chip and reads their figures.

`python -m benchmarks programs` and `collectives` start this module in an environment of its own
(`compilers.environment`):

    python -m benchmarks.chips.compile CHIP FILE

FILE is JSON: a list of programs, which is replaced by the same list with figures.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import jaxbn
import jaxbn.linen
from benchmarks import resnet
from benchmarks.chips import compilers, hlo
from benchmarks.chips.programs import BOTH, DEEP, EVAL, FORWARD, LAYERS, MANY, MAPPED, ONE, Program
from benchmarks.implementations import GROUPS
from benchmarks.implementations import LAYERS as OPTIONS

AXIS = "data"
# Shapes on each device; larger than the caches and the on-chip memory.
LAYER = (128, 56, 56, 256)
DEEP_LAYER = (8, 7, 7, 2048)
IMAGES = (64, 224, 224, 3)
TOKENS = (8, 1024, 1024)
HEADS = 8
IMPLEMENTATIONS = {"jaxbn": (jaxbn.linen, {}), "Flax": (nn, {}), "Flax two-pass": (nn, {"use_fast_variance": False})}


def keep_convolutions(primitive: Any, *_: Any, **options: Any) -> bool:
    return primitive.name == "conv_general_dilated"


keep_convolutions_and_moments = jax.checkpoint_policies.save_from_both_policies(
    keep_convolutions, jax.checkpoint_policies.save_only_these_names(jaxbn.MOMENTS_NAME)
)


def norm_of(implementation: str, norm: str, **options: Any) -> nn.Module:
    module, more = IMPLEMENTATIONS[implementation]
    name, own = OPTIONS[norm]
    groups = {"num_groups": GROUPS} if norm == "group" else {}
    return getattr(module, name)(**own, **groups, **more, **options)


def figures(function: Callable, arguments: tuple, chip: str, x_bytes: int | None) -> dict[str, float]:
    """Figures of the program that one device runs."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    found = {
        "bytes": compiled.cost_analysis()["bytes accessed"] if chip == "v5e" else hlo.traffic(text),
        "kernels": hlo.kernels(text),
        "collectives": sum(hlo.collectives(text).values()),
        "received": hlo.received(text),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": seconds,
    }
    if chip == "v5e":
        found["cycles"] = hlo.cycles(text)
    if x_bytes:
        found["passes"] = found["bytes"] / x_bytes
    return found


def described(tree: Any, mesh: jax.sharding.Mesh, spec: jax.P) -> Any:
    sharding = jax.NamedSharding(mesh, spec)
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding), tree)


def layer(program: Program, implementation: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    norm, _, relu = ("batch", "", "") if program.workload == DEEP else program.workload.partition("+")
    shape = DEEP_LAYER if program.workload == DEEP else LAYER
    mapped, batch, same = program.mode == MAPPED, jax.P(AXIS), jax.P()
    options = {"use_running_average": program.kind == EVAL, "momentum": 0.9} if norm == "batch" else {}
    module = norm_of(implementation, norm, dtype=program.dtype, **options)
    variables = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape)))
    if mapped:
        module = module.clone(axis_name=AXIS)

    def apply(x, params, others):
        y, new = module.apply({"params": params, **others}, x, mutable=["batch_stats"])
        return nn.relu(y) if relu else y, new

    def forward(x, variables):
        others = {name: v for name, v in variables.items() if name != "params"}
        return apply(x, variables["params"], others)

    def both(x, dy, variables):
        others = {name: v for name, v in variables.items() if name != "params"}
        y, pull, new = jax.vjp(lambda *v: apply(*v, others), x, variables["params"], has_aux=True)
        return y, new, pull(dy)

    function, number, out = {
        FORWARD: (forward, 1, (batch, same)),
        BOTH: (both, 2, (batch, same, (batch, same))),
        EVAL: (lambda *v: forward(*v)[0], 1, batch),
    }[program.kind]
    x = jax.ShapeDtypeStruct((shape[0] * mesh.size, *shape[1:]), program.dtype)
    if mapped:
        function = jax.shard_map(function, mesh=mesh, in_specs=(*[batch] * number, same), out_specs=out)
    arguments = (*described((x,) * number, mesh, batch), described(variables, mesh, same))
    return figures(function, arguments, program.chip, x.size * x.dtype.itemsize // mesh.size)


class TransformerBlock(nn.Module):
    norm: Callable[[], nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + nn.MultiHeadDotProductAttention(HEADS, dtype=self.dtype)(self.norm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1], dtype=self.dtype)(self.norm()(x)))
        return self.norm()(x + nn.Dense(x.shape[-1], dtype=self.dtype)(y))


def training_step(program: Program, implementation: str, mesh: jax.sharding.Mesh) -> tuple[Callable, tuple]:
    """The step as a function, and its arguments without values."""
    images = not program.workload.startswith("transformer")
    shape = IMAGES if images else TOKENS
    norm = "batch" if images else "rms" if "RMS" in program.workload else "layer"

    mapped = program.mode == MAPPED

    def make_norm(**options: Any) -> nn.Module:
        return norm_of(implementation, norm, **options)

    def make_model(**options: Any) -> nn.Module:
        if images:
            sizes = (1,) if program.workload == "bottleneck" else (3, 4, 6, 3)
            own = functools.partial(make_norm, momentum=0.9, **options)
            return resnet.ResNet(sizes, resnet.Bottleneck, own, dtype=program.dtype)
        return TransformerBlock(functools.partial(make_norm, dtype=program.dtype), program.dtype)

    model = make_model(**({"axis_name": AXIS} if mapped else {}))
    model_options = {"train": True} if images else {}

    def train(variables, x, labels):
        def loss_of(params):
            y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"], **model_options)
            if not images:
                return jnp.square(y.astype(jnp.float32)).mean(), updates
            loss = -jnp.take_along_axis(jax.nn.log_softmax(y), labels[:, None], 1).mean()
            return jax.lax.pmean(loss, AXIS) if mapped else loss, updates

        # As in docs/performance.md. Flax has no name for its moments, so its step is compiled as it is.
        less = "less-memory" in program.workload and implementation == "jaxbn"
        kept = jax.checkpoint(loss_of, policy=keep_convolutions_and_moments) if less else loss_of
        (loss, updates), gradients = jax.value_and_grad(kept, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
        return loss, {"params": params, **updates}

    x = jax.ShapeDtypeStruct((shape[0] * mesh.size, *shape[1:]), program.dtype)
    labels = jax.ShapeDtypeStruct(x.shape[:1], jnp.int32)
    one = jnp.zeros((1, *shape[1:]), program.dtype)
    variables = jax.eval_shape(lambda: make_model().init(jax.random.key(0), one, **model_options))
    arguments = (described(variables, mesh, jax.P()), *described((x, labels), mesh, jax.P(AXIS)))
    if mapped:
        batch = jax.P(AXIS)
        train = jax.shard_map(train, mesh=mesh, in_specs=(jax.P(), batch, batch), out_specs=jax.P())
    return train, arguments


def step(program: Program, implementation: str, mesh: jax.sharding.Mesh) -> dict[str, float]:
    return figures(*training_step(program, implementation, mesh), program.chip, None)


def main() -> None:
    chip, file = sys.argv[1:]
    todo = [Program(**p) for p in json.loads(pathlib.Path(file).read_text())]
    rows = []
    # disable=None shows the progress bar on terminals only, so that it does not fill log files.
    for program in tqdm(todo, desc=chip, disable=None):
        mesh = jax.sharding.Mesh(np.array(compilers.devices(chip, program.devices, program.slices)), (AXIS,))
        compile_one = layer if program.workload in (*LAYERS, DEEP) else step
        # RMS norm has no variance, so use_fast_variance makes no difference.
        one_pass = "rms" in program.workload.lower() or (program.mode != ONE and program.workload in MANY)
        names = [name for name in IMPLEMENTATIONS if not (one_pass and name == "Flax two-pass")]
        rows.append(program._asdict() | {"figures": {name: compile_one(program, name, mesh) for name in names}})
    pathlib.Path(file).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
