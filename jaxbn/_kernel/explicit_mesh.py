"""Explicit mesh axes, where types say how arrays are divided among devices, and what no type can say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])
# The shape of a result, and of each of its axes the axis of x that it is.
Like = tuple[tuple[int, ...], tuple[int, ...]]


def left_to_compiler(function: _Function, x: jax.Array, axis: int, *results: Like) -> _Function:
    """`function` of `x` and other arrays, in which the compiler divides what lies along `axis` of `x`.

    An array's type names whole mesh axes. So it can say that each of 8 devices has its part of a batch, but
    not that each part of a virtual batch is on 2 of them, which is what a compiler makes of automatic axes.
    Results are divided as `x` is, where their sizes allow it.
    """
    sharding = jax.typeof(x).sharding
    if sharding.spec[axis] is None:
        return function

    def names(axis: int) -> tuple[str, ...]:
        entry = sharding.spec[axis]
        return entry if isinstance(entry, tuple) else () if entry is None else (entry,)

    def divide(shape: tuple[int, ...], axes: tuple[int, ...]) -> Any:
        devices = [math.prod(sharding.mesh.shape[name] for name in names(a)) for a in axes]
        spec = (names(a) if n % d == 0 else () for n, a, d in zip(shape, axes, devices, strict=True))
        return sharding.update(spec=jax.P(*spec))

    out = tuple(divide(*like) for like in results)
    return cast(_Function, jax.sharding.auto_axes(function, axes=names(axis), out_sharding=out))
