"""Sums within groups of devices under `jax.shard_map` and `jax.pmap`.

`jax.lax.psum` takes no groups where JAX checks which arrays vary over devices. So `sum_in_groups` is a primitive of
the library: its result varies over devices, and it is its own transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from jaxbn._kernel.platforms import register_forms
from jaxbn._versions import psum

Names = tuple[str, ...]
Groups = tuple[tuple[int, ...], ...]


def sum_in_groups(v: jax.Array, names: Names, groups: Groups) -> jax.Array:
    """Returns the sum over this device's group, the same on all devices of the group; `v` varies over `names`."""
    total: jax.Array
    (total,) = _SUM.bind(v, names=names, groups=groups)
    return total


def _psum_of_groups(v: jax.Array, names: Names, groups: Groups) -> list[jax.Array]:
    return [psum(v, names, groups)]


def _sum_in_pairs(v: jax.Array, names: Names, groups: Groups) -> list[jax.Array]:
    """For TPUs, on which groups of unequal size have no all-reduce.

    In each step pairs of devices exchange what they have and add it, so that all have the same number in the end.
    Devices beyond a power of two give their arrays away before the first step, and get the sum after the last.
    """
    if len(set(map(len, groups))) == 1:
        return _psum_of_groups(v, names, groups)
    powers = [1 << (len(group).bit_length() - 1) for group in groups]
    sized = list(zip(groups, powers, strict=True))
    beyond = [(group[k], group[k - power]) for group, power in sized for k in range(power, len(group))]
    v = v + jax.lax.ppermute(v, names, beyond)
    step = 1
    while step < max(powers):
        pairs = [(group[k], group[k ^ step]) for group, power in sized if step < power for k in range(power)]
        v = v + jax.lax.ppermute(v, names, pairs)
        step *= 2
    is_beyond = jnp.asarray(np.isin(np.arange(sum(map(len, groups))), [giver for giver, _ in beyond]))
    total = jax.lax.ppermute(v, names, [(taker, giver) for giver, taker in beyond])
    return [jnp.where(is_beyond[jax.lax.axis_index(names)], total, v)]


_SUM = Primitive("jaxbn_sum_in_groups")
_SUM.multiple_results = True
_SUM.def_abstract_eval(lambda v, **_: [v])
register_forms(_SUM, {"default": _psum_of_groups, "tpu": _sum_in_pairs})
ad.deflinear2(_SUM, lambda cts, _, **options: _SUM.bind(*cts, **options))
batching.primitive_batchers[_SUM] = lambda vs, dims, **options: (_SUM.bind(*vs, **options), dims)
