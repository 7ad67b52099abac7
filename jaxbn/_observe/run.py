"""Runs a Flax model on a batch as its user says, for the tools that measure the model's norms meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp


def apply_linen(
    model: Any, variables: Mapping[str, Any], stats: Any, *args: Any, mutable: Any = (), **kwargs: Any
) -> tuple[Any, Any]:
    """What `model.apply` returns to the user, and the new statistics, which he need not ask for."""
    others = [mutable] if isinstance(mutable, str) else list(mutable or ())
    try:
        y, updates = model.apply({**variables, "batch_stats": stats}, *args, mutable=["batch_stats", *others], **kwargs)
    except ValueError as error:
        # Flax has no class for it.
        if "broadcasted variable has a data dependency" not in str(error):
            raise
        raise ValueError(
            "model: expected batch_stats that can change in nn.scan, got a variable_broadcast with 'batch_stats' in "
            "it; pass this function the same network with variable_carry='batch_stats' in its place, which takes the "
            "same variables"
        ) from error
    return (y, updates) if others else y, updates["batch_stats"]


@contextlib.contextmanager
def whole_batches(batch: Any, call: Any, model: str, argument: str = "batches") -> Iterator[None]:
    """Explains what goes wrong where a tuple, list or dictionary is the model's only argument, for want of `call`."""
    try:
        yield
    except Exception as error:
        if call is not None or not isinstance(batch, tuple | list | Mapping):
            raise
        parts = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
        # Labels are integers, mostly, and in what order jax.jit hands on a dictionary says nothing.
        floating = (key for key, v in parts.items() if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating))
        part = next(floating, next(iter(parts), 0))
        reason = next(iter(str(error).splitlines()), "")
        raise TypeError(
            f"{argument}: expected what the model takes, got a {type(batch).__name__} of {len(batch)}, for which it "
            f"raised {type(error).__name__}: {reason}; say what to give it: "
            f"call=lambda {model}, batch: {model}(batch[{part!r}])"
        ) from error
