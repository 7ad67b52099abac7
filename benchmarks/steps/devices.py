"""Forward and backward of batch norm as 1 to 8 simulated CPU devices share one batch."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

import jaxbn.linen
from benchmarks.comparison import Comparison, timed
from benchmarks.implementations import Case, arrays, forward_and_backward

DEVICES = [1, 2, 4, 8]
SHAPE = (32, 28, 28, 128)
AXIS = "data"


def shared_call(layer: Any, number: int, sharded_by: str) -> Callable[[], Any]:
    """Forward and backward of `layer` on one global batch that `number` devices share."""
    x, dy = arrays(Case("batch", SHAPE, "float32"))
    variables = layer(use_running_average=True).init(jax.random.key(0), x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:number]), (AXIS,))
    split, same = jax.P(AXIS), jax.P()
    module = layer(use_running_average=False, axis_name=AXIS if sharded_by == "shard_map" else None)

    def train(x, params):
        return module.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    function = forward_and_backward(train)
    if sharded_by == "shard_map":
        out_specs = (split, same, (split, same))
        function = jax.shard_map(function, mesh=mesh, in_specs=(split, split, same), out_specs=out_specs)
    specs = (split, split, same)
    arguments = [
        jax.device_put(v, jax.NamedSharding(mesh, spec))
        for v, spec in zip((x, dy, variables["params"]), specs, strict=True)
    ]
    compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: jax.block_until_ready(compiled(*arguments))


def measure_here(rounds: int) -> list[Comparison]:
    rows = []
    layers = {"jaxbn": jaxbn.linen.BatchNorm, "flax": nn.BatchNorm}
    for sharded_by in ("sharded jit", "shard_map"):
        for number in DEVICES:
            calls = {name: {str(number): shared_call(layer, number, sharded_by)} for name, layer in layers.items()}
            rows += timed("devices", sharded_by, calls, rounds)
    return rows


def measure(rounds: int) -> list[Comparison]:
    """`measure_here` in a child process, as the number of devices cannot change once JAX has started."""
    if jax.config.jax_num_cpu_devices == DEVICES[-1]:
        return measure_here(rounds)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks", "steps", "--parts", "devices", "--rounds", str(rounds)]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(DEVICES[-1]), "JAX_PLATFORMS": "cpu"}
        subprocess.run([*command, "--out", folder], env=environment, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads((pathlib.Path(folder) / "steps.json").read_text())["results"]
        return [Comparison(**row) for row in rows]
