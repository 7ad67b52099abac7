"""A choice between forms of a function that is made when a program is lowered for a platform."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from jaxbn._kernel.varying import as_equally_varying

Form = Callable[..., Sequence[jax.Array]]
# The forms of each primitive of the library by platform; "default" is that of all others.
FORMS: dict[Primitive, Mapping[str, Form]] = {}


def register_forms(primitive: Primitive, forms: Mapping[str, Form]) -> None:
    """Lowers `primitive` to the form of each platform, whose arguments are those of the primitive."""
    FORMS[primitive] = forms
    for platform, form in forms.items():
        mlir.register_lowering(primitive, mlir.lower_fun(form), None if platform == "default" else platform)


def by_platform(forms: Mapping[str, Form]) -> Callable[..., Sequence[jax.Array]]:
    """Returns a function that runs the form of its platform.

    A form takes arrays of equal rank, the reduced `axes`, and `options`. Unlike `jax.lax.platform_dependent` this
    leaves no branch in the program. It has no derivative. The primitive's name and its parameter `call_jaxpr` are
    those of `jax.custom_jvp`: tools that read jaxprs by name find the default form.
    """
    primitive = Primitive("custom_jvp_call")
    primitive.multiple_results = True
    default = jax.jit(forms["default"], static_argnames=("axes", "options"))

    def call(*arrays: jax.Array, axes: tuple[int, ...], options: Hashable = None) -> Sequence[jax.Array]:
        arrays = tuple(as_equally_varying(*arrays))
        jaxpr = default.trace(*arrays, axes=axes, options=options).jaxpr
        result: list[jax.Array] = primitive.bind(*arrays, call_jaxpr=jaxpr, axes=axes, options=options)
        return result

    def batched(
        arrays: Sequence[jax.Array],
        dims: Sequence[int | None],
        *,
        call_jaxpr: object,
        axes: tuple[int, ...],
        options: Hashable,
    ) -> tuple[Sequence[jax.Array], list[int]]:
        results = call(*at_front(arrays, dims), axes=tuple(a + 1 for a in axes), options=options)
        return results, [0] * len(results)

    def of_primitive(form: Form) -> Form:
        return lambda *arrays, call_jaxpr, axes, options: form(*arrays, axes=axes, options=options)

    bound = {platform: of_primitive(form) for platform, form in forms.items()}
    primitive.def_impl(bound["default"])
    primitive.def_abstract_eval(lambda *_, call_jaxpr, **__: call_jaxpr.out_avals)
    register_forms(primitive, bound)
    batching.primitive_batchers[primitive] = batched
    return call


def at_front(arrays: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Returns arrays with the axis that `jax.vmap` maps as their first; of size 1 where there is none."""
    return [v[None] if d is None else jnp.moveaxis(v, d, 0) for v, d in zip(arrays, dims, strict=True)]
