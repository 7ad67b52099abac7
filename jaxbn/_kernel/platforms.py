"""A choice between forms of a function that is made when a program is lowered for a platform."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxbn._kernel.devices import as_equally_varying

Form = Callable[..., tuple[jax.Array, ...]]


def by_platform(forms: Mapping[str, Form]) -> Callable[..., tuple[jax.Array, ...]]:
    """Returns a function that runs the form of its platform, or `forms["default"]`.

    Each form takes arrays of equal rank and the reduced axes, and returns several arrays. Derivatives have to be given
    by whoever calls the result. Unlike `jax.lax.platform_dependent` it leaves no branch in the program. Its name and
    its parameter `call_jaxpr` are those of `jax.custom_jvp`: programs that read jaxprs by name find the default form.
    """
    primitive = Primitive("custom_jvp_call")
    primitive.multiple_results = True
    default = jax.jit(forms["default"], static_argnames=("axes", "options"))

    def call(*arrays: jax.Array, axes: tuple[int, ...], options: Hashable = None) -> tuple[jax.Array, ...]:
        arrays = tuple(as_equally_varying(*arrays))
        jaxpr = default.trace(*arrays, axes=axes, options=options).jaxpr
        return tuple(primitive.bind(*arrays, call_jaxpr=jaxpr, axes=axes, options=options))

    def batched(
        arrays: Sequence[Any], dims: Sequence[int | None], *, call_jaxpr: Any, axes: tuple[int, ...], options: Hashable
    ) -> tuple[tuple[jax.Array, ...], list[int]]:
        front = [v[None] if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(arrays, dims, strict=True)]
        results = call(*front, axes=tuple(a + 1 for a in axes), options=options)
        return results, [0] * len(results)

    def of(form: Form) -> Callable[..., tuple[jax.Array, ...]]:
        return lambda *arrays, call_jaxpr, axes, options: form(*arrays, axes=axes, options=options)

    primitive.def_impl(of(forms["default"]))
    primitive.def_abstract_eval(lambda *_, call_jaxpr, **__: call_jaxpr.out_avals)
    for platform, form in forms.items():
        mlir.register_lowering(primitive, mlir.lower_fun(of(form)), None if platform == "default" else platform)
    batching.primitive_batchers[primitive] = batched
    return call
