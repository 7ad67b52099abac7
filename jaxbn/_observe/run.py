"""One observed run of a Flax model on a batch, in Linen and in NNX."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp

from jaxbn._observe import calls


def run_linen(
    model: Any, variables: Mapping[str, Any], batch: Any, call: Any, observer: calls.Observer | None
) -> tuple[Any, dict[str, Any]]:
    """Runs `call(apply, batch)`, by default `apply(batch)`; `apply` is the model's, with its variables given.

    Returns the output, and what each layer's slot holds in the end, by the layer's name: nothing without an observer.
    """
    stats = variables.get("batch_stats", {})

    def apply(*args: Any, **kwargs: Any) -> Any:
        nonlocal stats
        y, stats = _apply_linen(model, variables, stats, *args, **kwargs)
        return y

    if observer is None:
        return _call(call, apply, batch), {}
    slot = calls.new_slot()
    stats = calls.add_slots(stats, slot, observer.initial)
    with calls.observe_linen(observer, slot), suggest_call(batch, call, "apply"):
        output = _call(call, apply, batch)
    return output, calls.take_slots(stats, slot)


def run_nnx(model: Any, batch: Any, call: Any, observer: calls.Observer | None) -> tuple[Any, dict[str, Any]]:
    """The same for `call(model, batch)`. The model must be a copy: observing changes it."""
    if observer is None:
        return _call(call, model, batch), {}
    with calls.observe_nnx(model, observer) as slots, suggest_call(batch, call, "model"):
        output = _call(call, model, batch)
        return output, slots()


def _call(call: Callable[[Any, Any], Any] | None, model: Callable[..., Any], batch: Any) -> Any:
    return model(batch) if call is None else call(model, batch)


def _apply_linen(
    model: Any, variables: Mapping[str, Any], stats: Any, *args: Any, mutable: Any = (), **kwargs: Any
) -> tuple[Any, Any]:
    """What `model.apply` returns to the user, and the new batch_stats, for which the user need not ask."""
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


def cached(make: Callable[..., Any], *static: Any) -> Any:
    """`make(*static)`, with an `lru_cache`: the compiled step of last time if the arguments are equal and hashable."""
    try:
        return make(*static)
    except TypeError:  # not hashable
        return make.__wrapped__(*static)  # type: ignore[attr-defined]


@contextlib.contextmanager
def suggest_call(batch: Any, call: Any, model: str, argument: str = "batches") -> Iterator[None]:
    """If the model fails because it wants more arguments or another batch: suggests a `call`, or another one.

    `model` is the name of what `call` runs, `argument` that of the parameter with the batch.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        missing = _MISSING.search(reason) if isinstance(error, TypeError) else None
        has_parts = isinstance(batch, tuple | list | Mapping)
        if call is not None and has_parts:
            # Not an error of its own: `call` may have taken out what the model takes, which then failed for another
            # reason.
            error.add_note(
                f"{argument}: got a {type(batch).__name__} of {len(batch)}; if `call` gives the model all of it, the "
                f"labels too, take out what the model takes: {model}(batch[{_input_of(batch)!r}], ...)"
            )
        if call is not None or not (missing or has_parts):
            raise
        got = f"a {type(batch).__name__} of {len(batch)}" if has_parts else "one batch alone"
        given = [f"batch[{_input_of(batch)!r}]" if has_parts else "batch"]
        for name in re.findall(r"'(\w+)'", missing[1]) if missing else ():
            given.append(f"{name}={'False' if 'train' in name else '...'}")
        raise TypeError(
            f"{argument}: expected what the model takes, got {got}, for which it raised {type(error).__name__}: "
            f"{reason}; say what to give it: call=lambda {model}, batch: {model}({', '.join(given)})"
        ) from error


_MISSING = re.compile(r"missing \d+ required \S+ arguments?: (.*)")


def _input_of(batch: Any) -> Any:
    """The key of what is probably the input: it is floating point, mostly, and labels are not."""
    # jax.jit sorts dictionaries, so being first says nothing.
    parts = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
    floating = (key for key, v in parts.items() if hasattr(v, "dtype") and jnp.issubdtype(v.dtype, jnp.floating))
    return next(floating, next(iter(parts), 0))
