"""One batch norm of a PyTorch state dict as parameters and state of the functions, and back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxbn._norms.state import AffineParams, BatchNormState
from jaxbn.interop._advice import nested
from jaxbn.interop._formats import COUNTER, TORCH
from jaxbn.interop._matching import raise_all
from jaxbn.interop._source import Source, as_array, fits_jax, read_counter, read_source

# PyTorch's names for scale, bias, mean and variance.
_FIELDS = ("weight", "bias", "running_mean", "running_var")


def batch_norm_from_torch(state_dict: Source, prefix: str = "") -> tuple[AffineParams | None, BatchNormState | None]:
    """Returns the parameters and the state of one batch norm of a PyTorch state dict.

    Formula: `weight` is the scale, `running_mean`, `running_var` and `num_batches_tracked` are the state.
    PyTorch's running variance is the unbiased one, as the functions keep it (`correction=1`).

    Args:
      state_dict: mapping of names to arrays or tensors, or the path of a `.safetensors` file.
      prefix: the name of the norm's module, with or without the last dot: `"layer1.0.bn1"`.

    Returns:
      `(params, state)`, copies in the source's dtypes, the counter in int32. `params` is None without
      `weight` and `bias` (affine=False), `state` is None without statistics (track_running_stats=False).
      Checkpoints from before PyTorch 0.4.1 have no counter; it becomes 0, as in PyTorch, for "not known".
      The counter has no effect if `momentum` is a number. With `momentum=None` a 0 means that the next batch
      replaces the loaded statistics.

    Raises:
      ValueError: there is no entry with this prefix, an entry that batch norm does not have, only one of the
        two statistics, a shape that is not [C], or a dtype that JAX has only with x64. One error lists all
        problems.
      TypeError: `state_dict` is neither a mapping of names nor the path of a `.safetensors` file.

    Source: torch.nn.modules.batchnorm (`_NormBase._load_from_state_dict`).

    Example:
      >>> import numpy as np
      >>> from jaxbn.interop import batch_norm_from_torch
      >>> entries = {"bn.weight": np.full(2, 3, np.float32), "bn.bias": np.zeros(2, np.float32)}
      >>> batch_norm_from_torch(entries, "bn")
      (AffineParams(scale=Array([3., 3.], dtype=float32), bias=Array([0., 0.], dtype=float32)), None)
    """
    source = read_source(state_dict)
    prefix = _dotted(prefix)
    raw = {name.removeprefix(prefix): v for name, v in source.items() if name.startswith(prefix)}
    known = (*_FIELDS, COUNTER)
    if not raw.keys() & {*known} and (inside := nested(source, {prefix + name for name in known}, TORCH)):
        raise ValueError(inside)
    if not raw and (prefix or source):
        raise ValueError(
            f"prefix: expected that of a batch norm with entries, got {prefix!r}, with which none of the "
            f"{len(source)} names begins; a batch norm without parameters and statistics has no entries to load"
        )
    errors, arrays = [], {}
    for name in raw:
        try:
            if name not in known:
                raise ValueError(f"expected one of {', '.join(known)}, got another name")
            if name == COUNTER:
                read_counter(raw[name])
            arrays[name] = as_array(raw[name])
        except (TypeError, ValueError) as error:
            errors.append(f"{prefix}{name}: {error}")
    features = next((v.shape for v in arrays.values() if v.ndim == 1), "[C]")
    for name, v in arrays.items():
        if name == COUNTER:
            continue
        if v.shape != features:
            errors.append(f"{prefix}{name}: expected shape {features}, got {v.shape}")
        if not jnp.issubdtype(v.dtype, jnp.floating) or not fits_jax(v.dtype):
            errors.append(
                f"{prefix}{name}: expected a floating-point dtype that JAX holds, got {v.dtype}; enable x64 for float64"
            )
    tracked = [name for name in known[2:] if name in raw]
    if tracked and not {"running_mean", "running_var"} <= {*tracked}:
        errors.append(f"{prefix}running_mean, {prefix}running_var: expected both or none, got {', '.join(tracked)}")
    raise_all("batch_norm_from_torch", "returned", errors)

    scale, bias, mean, var = (jnp.array(arrays[name]) if name in arrays else None for name in _FIELDS)
    params = None if scale is None and bias is None else AffineParams(scale, bias)
    if mean is None or var is None:
        return params, None
    count = jnp.asarray(int(arrays[COUNTER]) if COUNTER in arrays else 0, jnp.int32)
    return params, BatchNormState(mean, var, count)


def batch_norm_to_torch(
    params: AffineParams | None, state: BatchNormState | None, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Returns PyTorch's state dict entries of one batch norm: what `batch_norm_from_torch` takes.

    Args:
      params, state: as the functions take them; entries are left out for None and for fields that are None.
      prefix: the name of the norm's module, with or without the last dot.

    Returns:
      NumPy arrays, copies in the same dtypes; the counter is int64 [], as in PyTorch.

    Source: torch.nn.modules.batchnorm (`_NormBase`).

    Example:
      >>> import jaxbn
      >>> from jaxbn.interop import batch_norm_to_torch
      >>> list(batch_norm_to_torch(*jaxbn.batch_norm_init(3), "bn1"))
      ['bn1.weight', 'bn1.bias', 'bn1.running_mean', 'bn1.running_var', 'bn1.num_batches_tracked']
    """
    values = (*(params or (None, None)), *(state[:2] if state else (None, None)))
    entries = {name: np.array(v, order="C") for name, v in zip(_FIELDS, values, strict=True) if v is not None}
    if state is not None:
        entries[COUNTER] = np.array(state.num_batches_tracked, np.int64)
    return {_dotted(prefix) + name: v for name, v in entries.items()}


def _dotted(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."
