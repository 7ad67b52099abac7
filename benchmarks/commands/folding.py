"""Evaluation of ResNets with their batch norms over that of the folded network.

    python -m benchmarks folding             # batches of 1 and 8, float32
    python -m benchmarks folding --batch 32 --size 224 --rounds 11

All networks take turns within one run, as in `python -m benchmarks time`. They
are ResNet-18 and the same with fewer channels, which spends more of its time
between convolutions. XLA fuses a norm with what follows it, and a bias too.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxbn.linen
from benchmarks.resnet import BasicBlock, ResNet
from benchmarks.timing import interleave, spread, versions
from jaxbn.fold import apply_folded, fold_linen

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def resnet(norm: Any, width: int, dtype: Any) -> ResNet:
    return ResNet((2, 2, 2, 2), BasicBlock, norm, num_filters=width, dtype=dtype)


def prepare(width: int, shape: tuple[int, ...], dtype: Any) -> tuple[dict[str, dict], float]:
    """The calls to be timed, and how far the folded network's outputs are from Flax's."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), dtype)

    def trained(path: Any, v: Any) -> jax.Array:
        """Values like those of a trained network: activations keep their scale, and all channels differ."""
        if v.ndim > 1:
            values = rng.standard_normal(v.shape) / np.sqrt(np.prod(v.shape[:-1]))
        else:
            name = jax.tree_util.keystr(path)
            values = rng.uniform(0.5, 1.5, v.shape) if "var" in name or "scale" in name else rng.normal(0, 0.1, v.shape)
        return jnp.asarray(values, v.dtype)

    flax, ours = (resnet(norm, width, dtype) for norm in (nn.BatchNorm, jaxbn.linen.BatchNorm))
    shapes = jax.eval_shape(functools.partial(flax.init, train=False), jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(trained, shapes)
    folded, pairs = fold_linen(flax, variables, x, call=lambda apply, x: apply(x, train=False))
    calls = {
        "folded": (jax.jit(functools.partial(apply_folded, flax, pairs, train=False)), folded),
        "jaxbn.linen": (jax.jit(functools.partial(ours.apply, train=False)), variables),
        "flax.linen": (jax.jit(functools.partial(flax.apply, train=False)), variables),
    }
    outputs = {name: np.asarray(run(v, x)).astype(np.float64) for name, (run, v) in calls.items()}
    difference = np.abs(outputs["folded"] - outputs["flax.linen"]).max() / np.abs(outputs["flax.linen"]).max()

    def call(run: Any, v: Any) -> Any:
        return lambda: run(v, x).block_until_ready()

    return {name: {"eval": call(run, v)} for name, (run, v) in calls.items()}, float(difference)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--width", type=int, nargs="+", default=[16, 64], help="channels of the first stage")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images per batch")
    parser.add_argument("--size", type=int, default=64, help="height and width of the images (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=31, help="how many times each call is timed (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    columns = ["width", "batch", "folded, ms (10 to 90 %)", "jaxbn / folded", "flax / folded", "difference"]
    table = Table(*columns, title=f"evaluation in {arguments.dtype}: time over that of the folded network")
    for width in arguments.width:
        for batch in arguments.batch:
            shape = (batch, arguments.size, arguments.size, 3)
            calls, difference = prepare(width, shape, DTYPES[arguments.dtype])
            seconds = {name: modes["eval"] for name, modes in interleave(calls, arguments.rounds).items()}
            medians = {name: statistics.median(s) for name, s in seconds.items()}
            low, high = spread(seconds["folded"])
            ratios = [f"{medians[name] / medians['folded']:.2f}" for name in ("jaxbn.linen", "flax.linen")]
            own = f"{1e3 * medians['folded']:.2f} ({1e3 * low:.2f} to {1e3 * high:.2f})"
            table.add_row(str(width), str(batch), own, *ratios, f"{difference:.1e}")
    console = Console(width=140)
    console.print(table)
    console.print(f"{versions()}; difference: the largest between outputs of folded and flax, over the largest output")
