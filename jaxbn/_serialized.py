"""Lets `jax.export` serialize functions that take or return the library's classes."""

from __future__ import annotations

from typing import TypeVar

from jax import export
from jax._src.export._export import deserialization_registry  # JAX has no public way to register a class again.

_Class = TypeVar("_Class", bound=type)
_FIRST_NAMES = {"AffineParams": "BatchNormParams"}


def serializable(kind: _Class) -> _Class:
    """Registers a class of arrays under its first public name, by which serialized functions refer to it."""
    name = f"jaxbn.{_FIRST_NAMES.get(kind.__name__, kind.__name__)}"
    # A second import of the library defines the classes again, and JAX registers a name only once.
    deserialization_registry.pop(name, None)
    export.register_pytree_node_serialization(
        kind,
        serialized_name=name,
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: None,
        from_children=lambda _, fields: kind(*fields),
    )
    return kind
