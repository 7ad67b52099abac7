"""Calls of Linen's batch norm, as an interceptor sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from jaxbn.linen._batch_norm import BatchNorm


def is_batch_norm_call(context: nn.module.InterceptorContext) -> bool:
    """Whether the call is that of Flax's batch norm or jaxbn's, rather than one of a class derived from them."""
    method: Any = context.orig_method
    return _qualified_name(method.func) in _CALLS


def _qualified_name(function: Callable[..., object]) -> tuple[str, str]:
    # Linen wraps methods anew for each class, so the functions themselves cannot be compared.
    function = inspect.unwrap(function)
    return function.__module__, function.__qualname__


_CALLS = {_qualified_name(c.__call__) for c in (nn.BatchNorm, BatchNorm)}
