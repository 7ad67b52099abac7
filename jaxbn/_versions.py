"""What differs between the supported versions of JAX and Flax, and nothing else; docs/getting_started.md lists it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core.primitives import psum_p


def check_version(package: str, version: str, oldest: str, cure: str) -> None:
    """Raises ImportError if an installed package is older than the library supports."""
    installed, wanted = (tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version, oldest))
    if installed < wanted:
        raise ImportError(f"{package}: expected version {oldest} or newer, got {version}; {cure}", name=package)


check_version("jax", jax.__version__, "0.7.2", "pip install --upgrade jax")
# Before, XLA added up arrays of more than 3 dimensions one value after the other on CPU.
HAS_SUMS_IN_TREES = jax.__version_info__ >= (0, 10, 2)
# In JAX 0.7.2 an axis that is sharded had wrong values after padding and a reshape (0.8 was not tried).
HAS_EXACT_UNEVEN_PARTS = jax.__version_info__ >= (0, 9, 2)


def varying_axes(v: jax.Array) -> frozenset[str]:
    """Returns the axes of a `jax.shard_map` over which `v` varies, by its type."""
    kind: Any = jax.typeof(v)
    # JAX 0.10 replaced the attribute `vma`.
    axes: frozenset[str] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return axes


def as_varying(v: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Returns `v`, which varies over none of the axes `names`, typed as varying over them."""
    lax: Any = jax.lax
    # JAX 0.10 removed `pvary`.
    varying: jax.Array = lax.pcast(v, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(v, names)
    return varying


def psum(v: jax.Array, names: tuple[str, ...], groups: tuple[tuple[int, ...], ...]) -> jax.Array:
    """Returns the sum within groups of devices, without the checks of `jax.lax.psum`."""
    total: Any = psum_p.bind(v, axes=names, axis_index_groups=groups)
    # In older versions the primitive takes several arrays.
    summed: jax.Array = total[0] if psum_p.multiple_results else total
    return summed


def reshard(v: jax.Array, sharding: Any) -> jax.Array:
    """Returns `v` with the type's sharding `sharding`."""
    move: Any = jax.reshard if hasattr(jax, "reshard") else jax.sharding.reshard
    resharded: jax.Array = move(v, sharding)
    return resharded


def take_parts(v: jax.Array, axis: int, size: int) -> jax.Array:
    """Returns parts of `size` values of `v`, along a new axis in front of `axis`; zeros fill the last part."""
    number = -(-v.shape[axis] // size)
    index = jnp.arange(number * size).reshape(number, size)
    parts: jax.Array = v.at[(*(slice(None),) * axis, index)].get(mode="fill", fill_value=0)
    return parts


def take_joined(parts: jax.Array, axis: int, length: int) -> jax.Array:
    """Returns the first `length` values of what `take_parts` returned."""
    index, size = jnp.arange(length), parts.shape[axis + 1]
    return parts[(*(slice(None),) * axis, index // size, index % size)]


# Variables of NNX. Flax is not imported here: functions need jax alone.


def get_value(variable: Any) -> Any:
    # Flax 0.12.1 replaced the properties `value` and `raw_value` by methods.
    return variable.get_value() if hasattr(variable, "get_value") else variable.value


def set_value(variable: Any, value: Any) -> None:
    if hasattr(variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def get_raw_value(variable: Any) -> Any:
    return variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value


def variable_type(variable: Any) -> Any:
    return variable.var_type if hasattr(variable, "var_type") else type(variable)


def variable_kind(variable: Any) -> dict[str, bool]:
    """Returns the arguments that make another variable a reference, or one of hijax, as this one is."""
    for names in (("ref", "hijax"), ("has_ref", "is_hijax")):
        if all(hasattr(variable, name) for name in names):
            return {name: getattr(variable, name) for name in names}
    return {"use_ref": variable.has_ref}


def sharding_entry(metadata: dict[str, Any]) -> str:
    """Returns the name under which a variable's metadata have its sharding; it was another before Flax 0.12.4."""
    return "sharding_names" if "sharding_names" in metadata else "out_sharding"


def iter_modules(model: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    from flax import nnx

    modules: Iterator[tuple[tuple[Any, ...], Any]]
    modules = nnx.iter_modules(model) if hasattr(nnx, "iter_modules") else model.iter_modules()
    return modules


def promote_dtype(layer: Any) -> Any:
    """Returns the function that promotes dtypes in an NNX layer, which Flax before 0.12.1 did not let users choose."""
    if hasattr(layer, "promote_dtype"):
        return layer.promote_dtype
    from flax.nnx.nn import dtypes

    return dtypes.promote_dtype


def current_linen_module() -> Any:
    from flax.nnx.bridge import wrappers

    if hasattr(wrappers, "current_linen_module"):
        return wrappers.current_linen_module()
    from flax.linen.module import _context

    return _context.module_stack[-1] if _context.module_stack else None


def bridged_linen_module(module: Any) -> Any:
    """Returns what an `nnx.bridge.ToNNX` wraps."""
    return module.to_nnx__module if hasattr(module, "to_nnx__module") else module.module


def instance_norm_class() -> Any:
    """Returns `nnx.InstanceNorm`; before Flax 0.12 a layer norm, which has its arguments and one more."""
    from flax import nnx

    if hasattr(nnx, "InstanceNorm"):
        return nnx.InstanceNorm

    class InstanceNorm(nnx.LayerNorm):
        def __init__(self, num_features: int, *, rngs: nnx.Rngs, **options: Any):
            if "reduction_axes" in options:
                raise TypeError("InstanceNorm.__init__() got an unexpected keyword argument 'reduction_axes'")
            super().__init__(num_features, rngs=rngs, **options)

    return InstanceNorm
