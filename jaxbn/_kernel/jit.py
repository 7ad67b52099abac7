"""`jax.jit`, to type checkers a function of the type that it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar, cast

import jax

_Function = TypeVar("_Function", bound=Callable[..., object])


def jit(*static: str) -> Callable[[_Function], _Function]:
    """Returns a decorator; `static` are the names of the arguments that are fixed when the function is traced."""
    return cast(Callable[[_Function], _Function], functools.partial(jax.jit, static_argnames=static))
