"""Statistics, and optionally parameters, for each of several domains: stacked arrays and an index."""

from __future__ import annotations

import operator
from typing import TypeVar

import jax
import jax.numpy as jnp

_Tree = TypeVar("_Tree")


def take_domain(stacked: _Tree, domain: int | jax.Array) -> _Tree:
    """Returns the arrays of one domain from a tree whose arrays have domains on their first axis.

    Data from different distributions (clean and adversarial examples in AdvProp, source and target, the
    steps of a diffusion) are normalized by statistics of their own. Stack what `batch_norm_init` returns,
    take the state of a domain before the call, and `put_domain` the new state after it. Parameters that
    are not stacked are shared.

    Args:
      stacked: any tree of arrays [D, ...], such as a `BatchNormState` or `AffineParams`.
      domain: which one, in [0, D); may be traced.

    Returns:
      The tree with arrays [...]. If `domain` is traced and out of range, they are NaN, or -1 for integers,
      and `put_domain` changes nothing.

    Raises:
      ValueError: a `domain` that is a Python number is out of range, or arrays differ in D.
      TypeError: `domain` is not an integer [].

    Source: Xie et al. (2020), Adversarial Examples Improve Image Recognition, arXiv:1911.09665;
    Chang et al. (2019), Domain-Specific Batch Normalization, arXiv:1906.03950.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> params, one = jaxbn.batch_norm_init(1)
      >>> states = jax.tree.map(lambda v: jnp.stack([v, v]), one)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> y, new = jaxbn.batch_norm_train(x, params, jaxbn.take_domain(states, 1))
      >>> states = jaxbn.put_domain(states, 1, new)
      >>> states.num_batches_tracked.tolist(), states.mean.round(3).tolist()
      ([0, 1], [[0.0], [0.20000000298023224]])
    """
    index = _check(stacked, domain)

    def take(v: jax.Array) -> jax.Array:
        fill = jnp.nan if jnp.issubdtype(v.dtype, jnp.inexact) else -1
        return v.at[index].get(mode="fill", fill_value=fill, wrap_negative_indices=False)

    result: _Tree = jax.tree.map(take, jax.tree.map(jnp.asarray, stacked))
    return result


def put_domain(stacked: _Tree, domain: int | jax.Array, new: _Tree) -> _Tree:
    """Returns `stacked` with the arrays of one domain replaced by `new`; see `take_domain`.

    Raises:
      ValueError, TypeError: as `take_domain`; or `new` is not like what that returns.

    Source: as `take_domain`.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.put_domain(jnp.zeros((3, 2)), 1, jnp.ones(2)).tolist()
      [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    index = _check(stacked, domain)

    def put(v: jax.Array, n: jax.Array) -> jax.Array:
        if jnp.shape(n) != jnp.shape(v)[1:]:
            raise ValueError(
                f"new: expected arrays like those of one domain, shape {jnp.shape(v)[1:]}, got shape {jnp.shape(n)}; "
                "pass what the norm returned for the domain that was taken"
            )
        v = jnp.asarray(v)
        return v.at[index].set(jnp.asarray(n).astype(v.dtype), mode="drop", wrap_negative_indices=False)

    result: _Tree = jax.tree.map(put, stacked, new)
    return result


def _check(stacked: object, domain: int | jax.Array) -> int | jax.Array:
    shapes = {jnp.shape(v)[:1] for v in jax.tree.leaves(stacked)}
    if not shapes:
        return 0  # None: a norm without parameters or state
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "stacked: expected arrays with the domains on their first axis, as many in each, got first axes of sizes "
            f"{sorted(shapes)}; stack one state per domain: jax.tree.map(lambda *v: jnp.stack(v), *states)"
        )
    ((number,),) = shapes
    if isinstance(domain, jax.Array):
        if domain.shape != () or not jnp.issubdtype(domain.dtype, jnp.integer):
            raise TypeError(
                f"domain: expected one integer, got {domain.dtype}{list(domain.shape)}; for a batch of several "
                "domains call the norm for each with a mask"
            )
        return domain
    try:
        index = operator.index(domain)
    except TypeError:
        raise TypeError(f"domain: expected an integer, got {type(domain).__name__}") from None
    if not 0 <= index < number:
        raise ValueError(f"domain: expected a number from 0 to {number - 1}, got {index}; there are {number} domains")
    return index
