"""The linear maps that the kernel's derivative consists of, as primitives.

Reverse mode keeps what a linear operation multiplies by. If that is `x - mean`, it keeps an array that is larger
than x where x has half precision. A primitive of our own is one operation to JAX: reverse mode keeps its operands,
which are x in its own dtype and arrays of the size of the moments. All operands have the rank of x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jaxbn._kernel import inputs
from jaxbn._kernel.explicit_mesh import broadcast_as
from jaxbn._kernel.platforms import at_front, register_forms
from jaxbn._kernel.varying import as_equally_varying
from jaxbn._kernel.xla import rounded_copy, sum_by_axes
from jaxbn._versions import HAS_SUMS_IN_TREES

# Arrays, or their types; None in place of an operand that is left out.
Operands = tuple[Any, ...]
Presence = tuple[bool, ...]
_Operand = TypeVar("_Operand")


class LinearMap:
    """`function(fixed, linear, axes)`, linear in the operands `linear`, as a primitive that returns several arrays.

    `transpose(fixed, types, axes, *cotangents)` returns the cotangents of the linear operands, which have these types.
    `forms` are named after platforms, which run them instead of `function`.
    """

    def __init__(
        self,
        function: Callable[..., list[jax.Array]],
        transpose: Callable[..., Operands],
        **forms: Callable[..., list[jax.Array]],
    ):
        self._transpose = transpose
        self._primitive = primitive = Primitive(f"jaxbn{function.__name__}")
        primitive.multiple_results = True
        self._function = _flat(function)
        jitted = jax.jit(self._function, static_argnames=("fixed", "linear", "axes"))
        primitive.def_impl(jitted)
        primitive.def_abstract_eval(lambda *avals, **options: jitted.trace(*avals, **options).jaxpr.out_avals)
        register_forms(primitive, {"default": self._function} | {name: _flat(form) for name, form in forms.items()})
        ad.primitive_jvps[primitive] = self._jvp
        ad.primitive_transposes[primitive] = self._transposed
        batching.primitive_batchers[primitive] = self._batched

    def __call__(self, fixed: Operands, linear: Operands, axes: tuple[int, ...] = ()) -> list[jax.Array]:
        operands = as_equally_varying(*(v for v in fixed + linear if v is not None))
        presence = (tuple(v is not None for v in kind) for kind in (fixed, linear))
        options = dict(zip(("fixed", "linear"), presence, strict=True))
        result: list[jax.Array] = self._primitive.bind(*operands, **options, axes=axes)
        return result

    def _jvp(
        self,
        primals: Sequence[jax.Array],
        tangents: Sequence[jax.Array | ad.Zero],
        **options: Presence | tuple[int, ...],
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        number = sum(options["fixed"])
        terms = []
        if any(type(t) is not ad.Zero for t in tangents[number:]):
            moved = map(ad.instantiate_zeros, tangents[number:])
            terms.append(self._primitive.bind(*primals[:number], *moved, **options))
        varied = [k for k in range(number) if type(tangents[k]) is not ad.Zero]
        if varied:

            def of_varied(*values: jax.Array) -> list[jax.Array]:
                replaced = dict(zip(varied, values, strict=True))
                return self._function(*(replaced.get(k, v) for k, v in enumerate(primals)), **options)

            terms.append(jax.jvp(of_varied, [primals[k] for k in varied], [tangents[k] for k in varied])[1])
        return self._primitive.bind(*primals, **options), [
            sum(parts[1:], parts[0]) for parts in zip(*terms, strict=True)
        ]

    def _transposed(
        self,
        cotangents: Sequence[jax.Array | ad.Zero],
        *operands: jax.Array | ad.UndefinedPrimal,
        fixed: Presence,
        linear: Presence,
        axes: tuple[int, ...],
    ) -> list[jax.Array | None]:
        given, wanted = _by_kind(operands, fixed, linear)
        types = tuple(v.aval if isinstance(v, ad.UndefinedPrimal) else v for v in wanted)
        found = self._transpose(given, types, axes, *map(ad.instantiate_zeros, cotangents))
        back = (
            v if isinstance(w, ad.UndefinedPrimal) else None
            for v, w in zip(found, wanted, strict=True)
            if w is not None
        )
        return [*(None for there in fixed if there), *back]

    def _batched(
        self, operands: Sequence[jax.Array], dims: Sequence[int | None], *, axes: tuple[int, ...], **options: Presence
    ) -> tuple[list[jax.Array], list[int]]:
        results = self._primitive.bind(*at_front(operands, dims), **options, axes=tuple(a + 1 for a in axes))
        return results, [0] * len(results)


def _flat(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    def of_operands(*operands: jax.Array, fixed: Presence, linear: Presence, axes: tuple[int, ...]) -> list[jax.Array]:
        return function(*_by_kind(operands, fixed, linear), axes)

    return of_operands


def _by_kind(operands: Iterable[_Operand], fixed: Presence, linear: Presence) -> list[tuple[_Operand | None, ...]]:
    values = iter(operands)
    return [tuple(next(values) if there else None for there in kind) for kind in (fixed, linear)]


def prepare(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Returns `x` in the dtype of its statistics, with 0 for NaN and infinity where the mask is False."""
    x = x.astype(inputs.statistics_dtype(x.dtype))
    return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, 0)


# x, its mask, and its centre, as two arrays; a factor of v, or the mask of the values that are summed; a factor of all.
Fixed = tuple[Any, Any, Any, Any, Any, Any]


def _centred(x: jax.Array, mask: jax.Array | None, *centre: jax.Array | None) -> jax.Array:
    return functools.reduce(jnp.subtract, (v for v in centre if v is not None), prepare(x, mask))


def _spread(fixed: Fixed, linear: Operands, axes: tuple[int, ...]) -> list[jax.Array]:
    (x, *centred, factor, outer), (v, a, b) = fixed, linear
    terms = [] if v is None else [_times(v, factor)]
    if b is not None:
        terms.append(_centred(x, *centred) * b)
    terms += [] if a is None else [a]
    return [_times(functools.reduce(jnp.add, terms), outer)]


def _spread_transposed(fixed: Fixed, linear: Operands, axes: tuple[int, ...], ct: jax.Array) -> Operands:
    (x, *centred, factor, outer), (v, a, b) = fixed, linear
    dv = None if v is None else _sum_to(_times(_times(ct, outer), factor), v.shape)
    if b is None:
        return dv, None if a is None else _sum_to(_times(ct, outer), a.shape), None
    summed = tuple(k for k, (n, m) in enumerate(zip(b.shape, ct.shape, strict=True)) if n != m)
    db, *da = _SUMS((x, *centred, None, outer), (ct, None if a is None else ct), summed)
    return dv, da[0] if da else None, db


def _sums(fixed: Fixed, linear: Operands, axes: tuple[int, ...]) -> list[jax.Array]:
    return [jnp.sum(v, axes, keepdims=True) for v in _summands(fixed, linear)]


def _sums_on_cpu(fixed: Fixed, linear: Operands, axes: tuple[int, ...]) -> list[jax.Array]:
    """Each sum has copies of its own of what both use, other ones along rows than along columns: see `rounded_copy`."""
    (x, mask, *centre, where, outer), (v, alone) = fixed, linear
    for _ in range(2 if inputs.are_last(x.ndim, axes) else 1):
        *centre, outer = (None if c is None else rounded_copy(c) for c in (*centre, outer))
    found = [_sum_on_cpu(v, axes) for v in _summands((x, mask, *centre, where, outer), (v, None))]
    if alone is not None:
        alone = _times(alone, None if outer is None else rounded_copy(outer))
        found.append(_sum_on_cpu(alone if where is None else jnp.where(where, alone, 0), axes))
    return found


def _sum_on_cpu(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sum(v, axes, keepdims=True) if HAS_SUMS_IN_TREES else jnp.expand_dims(sum_by_axes(v, axes), axes)


def _stacked_sums(fixed: Fixed, linear: Operands, axes: tuple[int, ...]) -> list[jax.Array]:
    """Computes both sums as one: what computes v, such as ReLU's derivative, has one user less and is fused into it."""
    both = _summands(fixed, linear)
    if len(both) == 1 or both[0].ndim - 1 in axes or not both[0].ndim:
        return _sums(fixed, linear, axes)
    total = jnp.sum(jnp.stack(jnp.broadcast_arrays(*both), -2), axes, keepdims=True)
    return [jnp.squeeze(v, -2) for v in jax.lax.split(total, (1, 1), total.ndim - 2)]


def _summands(fixed: Fixed, linear: Operands) -> list[jax.Array]:
    (x, *centred, where, outer), (v, alone) = fixed, linear
    both = [_centred(x, *centred) * _times(v, outer)] + ([] if alone is None else [_times(alone, outer)])
    return both if where is None else [jnp.where(where, v, 0) for v in both]


def _sums_transposed(fixed: Fixed, linear: Operands, axes: tuple[int, ...], *cts: jax.Array) -> Operands:
    (x, *centred, where, outer), (_, alone) = fixed, linear
    back = [_SPREAD((x, *centred, None, outer), (None, None, cts[0]))[0], *(_times(ct, outer) for ct in cts[1:])]
    back = back if where is None else [jnp.where(where, v, 0) for v in back]
    return back[0], None if alone is None else broadcast_as(back[1], alone)


def _times(v: jax.Array, factor: jax.Array | None) -> jax.Array:
    return v if factor is None else v * factor


def _sum_to(v: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    axes = tuple(k for k, n in enumerate(shape) if n == 1 and v.shape[k] != 1)
    return jnp.sum(v, axes, keepdims=True) if axes else v


def _keep(fixed: Operands, linear: Operands, axes: tuple[int, ...]) -> list[jax.Array]:
    (x, mask), (v,) = fixed, linear
    return [v if mask is None else jnp.where(mask | jnp.isfinite(x), v, 0)]


def _keep_transposed(fixed: Operands, linear: Operands, axes: tuple[int, ...], ct: jax.Array) -> Operands:
    return tuple(_keep(fixed, (ct,), axes))


_SPREAD = LinearMap(_spread, _spread_transposed)
_SUMS = LinearMap(_sums, _sums_transposed, cpu=_sums_on_cpu, cuda=_stacked_sums, rocm=_stacked_sums)
_KEEP = LinearMap(_keep, _keep_transposed)


def combine(
    fixed: Fixed, v: jax.Array | None = None, a: jax.Array | None = None, b: jax.Array | None = None
) -> jax.Array | None:
    """Returns `(v * factor + (x - centre) * b + a) * outer`, which is linear in v, a and b, where None is 0."""
    if v is None and b is None and a is None:
        return None
    if a is not None and b is not None:
        a, b = jnp.broadcast_arrays(a, b)
    x, mask, *centre, factor, outer = fixed
    if b is None:
        x, mask, centre = None, None, [None, None]
    return _SPREAD((x, mask, *centre, factor, outer), (v, a, b))[0]


def products_and_sums(
    x: jax.Array,
    mask: jax.Array | None,
    centre: jax.Array | None,
    v: jax.Array,
    axes: tuple[int, ...],
    *,
    only_products: bool = False,
) -> list[jax.Array]:
    """Returns the sums of `(x - centre) * v` and of `v`, which is linear in v, over the values that count."""
    return _SUMS((x, mask, centre, None, mask, None), (v, None if only_products else v), axes)


def keep_finite(x: jax.Array, mask: jax.Array | None, v: jax.Array) -> jax.Array:
    """The derivative of `prepare`: returns `v`, with 0 where `prepare` replaced x."""
    return v if mask is None else _KEEP((x, mask), (v,))[0]
