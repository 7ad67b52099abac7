"""Time of one computation written in several ways, over the time of the first.

The ways differ on CPU; docs/design.md says what follows from it for jaxbn.
"""

import argparse
import contextlib
import statistics
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks.timing import interleave
from jaxbn._kernel import linear, measure

SHAPES = [(64, 7, 7, 512), (32, 28, 28, 128), (8192, 128)]
ROWS = 8


def again(p, times):
    """The same numbers, which the compiler takes for another value than p."""
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
    """Batch norm, forward and backward."""
    y, pull = jax.vjp(lambda x, params: jaxbn.batch_norm_train(x, params, None)[0], x, params)
    return y, pull(dy)


# What jaxbn does for XLA's CPU compiler, each with the functions to replace so that it is not done.
WITHOUT = {
    "as it is": [],
    "shared means": [(measure, "separate_copy", lambda v: v), (linear, "rounded_copy", lambda v: v)],
}


@contextlib.contextmanager
def without(name):
    """Replaces the functions of `WITHOUT[name]`."""
    # jaxbn's functions are jitted, and traces made with the other functions would be reused.
    jax.clear_caches()
    with contextlib.ExitStack() as stack:
        for replaced in WITHOUT[name]:
            stack.enter_context(mock.patch.object(*replaced))
        yield
    jax.clear_caches()


def compile_without(name, *arguments):
    with without(name):
        return jax.jit(step).lower(*arguments).compile()


def draw(shape):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    return x, dy, jnp.asarray(rng.standard_normal(shape[-1]), jnp.float32)


def two_sums(shape):
    x, _, p = draw(shape)
    return {name: (jax.jit(way).lower(x, p).compile(), (x, p)) for name, way in TWO_SUMS.items()}


def steps(shape):
    x, dy, _ = draw(shape)
    arguments = (x, dy, jaxbn.affine_init(shape[-1]))
    return {name: (compile_without(name, *arguments), arguments) for name in WITHOUT}


def time_of(ways, rounds):
    def bound(call, arguments):
        return lambda: jax.block_until_ready(call(*arguments))

    seconds = interleave({name: {"": bound(*way)} for name, way in ways.items()}, rounds)
    return {name: statistics.median(s[""]) for name, s in seconds.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=31, help="how many times each call is timed (%(default)s)")


def run(arguments: argparse.Namespace) -> None:
    console = Console(width=140)
    tables = (
        ("sums of x - p and of its square", two_sums, TWO_SUMS),
        ("batch norm, forward and backward", steps, WITHOUT),
    )
    for title, prepare, ways in tables:
        table = Table("x", *ways, title=f"{title}: time over that of the first")
        for shape in SHAPES:
            medians = time_of(prepare(shape), arguments.rounds)
            first = next(iter(medians.values()))
            table.add_row("x".join(map(str, shape)), *(f"{m / first:.2f}" for m in medians.values()))
        console.print(table)
