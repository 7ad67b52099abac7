"""The same written in several ways: what XLA makes of each, as time over that of the first.

Run: python benchmarks/formulations.py        (on CPU the ways differ; docs/design.md has what follows from it)
"""

import random
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxbn
from jaxbn._kernel import moments, normalize
from jaxbn._kernel import sums as kernel_sums

SHAPES = [(64, 7, 7, 512), (32, 28, 28, 128), (8192, 128)]
ROWS = 8
ROUNDS = 31


def again(p, times):
    """p as another value to the compiler, and the same to us."""
    for _ in range(times):
        p = jax.lax.reduce_precision(p, 8, 23)
    return p


def over_rows(x):
    return jnp.sum(x, tuple(range(x.ndim - 1)))


def squares(d):
    return over_rows(d * d)


def scanned(x, p):
    def block(total, x):
        d = x - p
        return (total[0] + jnp.sum(d, 0), total[1] + jnp.sum(d * d, 0)), None

    zero = jnp.zeros(x.shape[-1])
    return jax.lax.scan(block, (zero, zero), x.reshape(ROWS, -1, x.shape[-1]))[0]


def complex_sum(x, p):
    d = x - p
    return over_rows(jax.lax.complex(d, d * d))


def reduce_of_two(x, p):
    d = x - p
    zero = jnp.zeros((), x.dtype)
    both = (lambda a, b: (a[0] + b[0], a[1] + b[1]),)
    return jax.lax.reduce((d, d * d), (zero, zero), *both, tuple(range(x.ndim - 1)))


# The sums of x - p and of its square.
TWO_SUMS = {
    "p for each sum": lambda x, p: (over_rows(x - again(p, 1)), squares(x - again(p, 2))),
    "one p": lambda x, p: (over_rows(x - p), squares(x - p)),
    "without p": lambda x, p: (over_rows(x), squares(x)),
    "blocks in a scan": scanned,
    "complex numbers": complex_sum,
    "one reduction of two": reduce_of_two,
}


def step(x, dy, params):
    """Batch norm's training step, forward and backward."""
    y, pull = jax.vjp(lambda x, params: jaxbn.batch_norm_train(x, params, None)[0], x, params)
    return y, pull(dy)


# What the library does for XLA's CPU compiler, each replaced by what it would do without.
DEVICES = {
    "as it is": {},
    "shared means": {"separate_copy": lambda v, number: v},
    "arithmetic in loops": {"materialize": lambda v, var: v},
    "third sum always": {"cond": lambda near_zero, near, far: far()},
}


def compile_without(replaced, *arguments):
    modules = (kernel_sums, moments, normalize, jax.lax)
    homes = [(module, name) for name in replaced for module in modules if hasattr(module, name)]
    originals = [getattr(module, name) for module, name in homes]
    for module, name in homes:
        setattr(module, name, replaced[name])
    # The library's own functions are jitted, and would be taken as they were traced before.
    jax.clear_caches()
    try:
        return jax.jit(step).lower(*arguments).compile()
    finally:
        for (module, name), original in zip(homes, originals, strict=True):
            setattr(module, name, original)


def draw(shape):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    return x, dy, jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)


def sums(shape):
    x, _, p = draw(shape)
    return {name: (jax.jit(way).lower(x, p).compile(), (x, p)) for name, way in TWO_SUMS.items()}


def steps(shape):
    x, dy, _ = draw(shape)
    arguments = (x, dy, jaxbn.affine_init(shape[-1]))
    return {name: (compile_without(replaced, *arguments), arguments) for name, replaced in DEVICES.items()}


def measure(ways):
    seconds = {name: [] for name in ways}
    turns, chance = list(ways.items()), random.Random(0)
    for _ in range(ROUNDS):
        chance.shuffle(turns)
        for name, (call, arguments) in turns:
            jax.block_until_ready(call(*arguments))
            start = time.perf_counter()
            jax.block_until_ready(call(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def main():
    console = Console(width=140)
    tables = (("sums of x - p and of its square", sums, TWO_SUMS), ("batch norm, forward and backward", steps, DEVICES))
    for title, prepare, ways in tables:
        table = Table("x", *ways, title=f"{title}: time over that of the first")
        for shape in SHAPES:
            medians = measure(prepare(shape))
            first = next(iter(medians.values()))
            table.add_row("x".join(map(str, shape)), *(f"{m / first:.2f}" for m in medians.values()))
        console.print(table)


if __name__ == "__main__":
    main()
