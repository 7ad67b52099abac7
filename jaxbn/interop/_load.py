"""Loads whole models: either all leaves get their arrays, or nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxbn.interop._formats import COUNTER, KERAS, TORCH, WeightFormat
from jaxbn.interop._matching import Names, Plan, counter_of, duplicates, make_plans, no_match, raise_all
from jaxbn.interop._source import as_array, fits_jax, is_floating, read_counter, read_source
from jaxbn.interop._targets import open_target


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each leaf of the target and each name of the source. `print` shows it.

    Attributes:
      used: for each leaf that was filled, its name in the source.
      missing: for each leaf that the source does not have, the name that was looked for. The leaf keeps its
        value, except that `num_batches_tracked` becomes 0; see `batch_norm_from_torch`.
      kept: leaves that keep their value because `names` gives None for them.
      left_over: names of the source that belong to no leaf.
      counters: `num_batches_tracked`, by its name in the source, of norms that have no place for it: all of
        Flax's, and jaxbn's unless `momentum=None`. Pass it to `to_torch` to write them back.

    Example:
      >>> from jaxbn.interop import LoadReport
      >>> print(LoadReport({"fc/kernel": "fc.weight"}, {}, (), ("old.bias",), {}))
      1 used, 0 missing, 0 kept, 1 left over, 0 counters without a place
      left over: old.bias
    """

    used: Mapping[str, str]
    missing: Mapping[str, str]
    kept: tuple[str, ...]
    left_over: tuple[str, ...]
    counters: Mapping[str, int]

    def __str__(self) -> str:
        lines = [
            f"{len(self.used)} used, {len(self.missing)} missing, {len(self.kept)} kept, "
            f"{len(self.left_over)} left over, {len(self.counters)} counters without a place"
        ]
        lines += [f"missing: {name} for {path}" for path, name in self.missing.items()]
        lines += [f"kept: {path}" for path in self.kept]
        return "\n".join(lines + [f"left over: {name}" for name in self.left_over])


def load_torch(
    source: Any,
    target: Any,
    names: Names | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    strict: bool = True,
    cast: bool = False,
    rngs: Any = None,
) -> tuple[Any, LoadReport]:
    """Fills Linen variables or an NNX model with a PyTorch state dict.

    Formula: a leaf `module/name` is filled with `<name of the module in PyTorch>.<name>`, where kernel, scale
    and embedding are called `weight`, mean and var `running_mean` and `running_var`, and all others as in
    Flax. A kernel [in, out] is the transpose of Linear's weight. A kernel [*window, in / groups, out] is a
    convolution's weight with the two channel axes moved to the end, also if it is depthwise. All other leaves
    have the same layout.

    Args:
      source: the state dict: mapping of names to arrays or tensors, or the path of a `.safetensors` file.
      target: Linen variables, `{"params": ..., "batch_stats": ...}`, or their shapes (`jax.eval_shape`);
        or an `nnx.Module`, or its shapes (`nnx.eval_shape`). Of an NNX module, `nnx.Param` and
        `nnx.BatchStat` are filled, and random streams from `rngs`; nothing else changes.
      names: the names of modules in PyTorch. The default is the path in Flax with dots in place of slashes.
        A function takes the path of a module (`"layer1_0/bn1"`, `""` for the model itself) and returns its
        name (`"layer1.0.bn1"`). A mapping has paths of modules, which apply to all modules inside them, or
        of leaves; the longest path that applies is used, and the default if none does. None in place of a
        name leaves that part of the target as it is.
      kinds: the layouts of kernels, by the path of the module or of the kernel, where the target does not
        show them: "conv_transpose" for Linen's ConvTranspose with `transpose_kernel=False` (with True the
        layout is that of a convolution; NNX models need neither), "dense", "conv", or "as_is".
      strict: whether it is an error if the source lacks the name of a leaf or has a name that belongs to no
        leaf. With False both are only reported, as long as anything is loaded.
      cast: whether floating-point arrays are converted to the dtype of their leaf. Without it another
        dtype is an error, except for counters.
      rngs: `nnx.Rngs` for the random streams (dropout) of an NNX model that has only shapes. Each stream gets
        a key from the stream of the same name, or from `default`. Streams that have keys keep them.

    Returns:
      `(filled, report)`. For Linen, `filled` is a new tree, and the variables passed are not changed. For NNX
      it is the model passed, changed in place. Arrays are copies of those of the source.

    Raises:
      ValueError: a name is unknown, missing, left over or used twice, an array has the wrong shape or
        dtype, or something in `target` would keep only a shape and get no value. One error lists all
        problems, and nothing is changed.
      TypeError: `source`, `target` or `rngs` is of another type.
      ImportError: the source is a `.safetensors` file, and safetensors is not installed.

    Source: torch.nn.Module.load_state_dict; layouts: torch.nn.Linear, torch.nn.Conv2d,
      torch.nn.ConvTranspose2d, flax.linen.Conv, flax.linen.ConvTranspose.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> import flax.linen as nn
      >>> from jaxbn.interop import load_torch
      >>> weights = {"fc.weight": np.ones((2, 3), np.float32), "fc.bias": np.zeros(2, np.float32)}
      >>> target = jax.eval_shape(nn.Dense(2, name="head").init, jax.random.key(0), jnp.ones((1, 3)))
      >>> variables, report = load_torch(weights, target, {"": "fc"})
      >>> variables["params"]["kernel"].shape, report.used["kernel"]
      ((3, 2), 'fc.weight')
    """
    return _load("load_torch", TORCH, read_source(source), target, names, kinds, strict, cast, rngs)


def load_keras(
    source: Any,
    target: Any,
    names: Names | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    strict: bool = True,
    cast: bool = False,
    rngs: Any = None,
) -> tuple[Any, LoadReport]:
    """Fills Linen variables or an NNX model with the weights of a Keras model.

    Formula: as `load_torch` with Keras' names: `gamma`, `beta`, `moving_mean`, `moving_variance`, `kernel`,
    `depthwise_kernel`, `bias`, `embeddings`, after slashes. Kernels have Flax's layout with two exceptions:
    a `depthwise_kernel` [*window, in, multiplier] becomes [*window, 1, in * multiplier], and the kernel of a
    transposed convolution is [*window, out, in], which is Flax's layout with `transpose_kernel=True`.

    Args:
      source: mapping of names to arrays, `{w.path: w.numpy() for w in model.weights}`, with `w.name` before
        Keras 3; a `:0` at the end of a name is ignored. Or the path of a `.safetensors` file.
      target, names, strict, cast, rngs: as in `load_torch`; names of the source are separated by slashes.
      kinds: "depthwise" for a depthwise kernel whose name is `kernel`, as in Keras 3 and later;
        "conv_transpose" for Linen's ConvTranspose with `transpose_kernel=False`; or "as_is".

    Returns:
      `(filled, report)`, as `load_torch`: a new Linen tree, or the NNX model passed, changed in place. Keras has
      no counters.

    Raises:
      ValueError, TypeError, ImportError: as `load_torch`.

    Source: keras.layers.BatchNormalization, keras.layers.DepthwiseConv2D, keras.layers.Conv2DTranspose.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from jaxbn.interop import load_keras
      >>> from jaxbn.linen import BatchNorm
      >>> four = ("gamma", "beta", "moving_mean", "moving_variance")
      >>> weights = {f"bn/{name}:0": np.full(2, i, np.float32) for i, name in enumerate(four)}
      >>> target = BatchNorm(use_running_average=True).init(jax.random.key(0), jnp.ones((1, 2)))
      >>> variables, report = load_keras(weights, target, {"": "bn"})
      >>> variables["batch_stats"]["var"].tolist()
      [3.0, 3.0]
    """
    weights = read_source(source)
    short = {name.removesuffix(":0"): v for name, v in weights.items()}
    if len(short) < len(weights):
        raise ValueError("source: expected names that differ without ':0', got some that do not; rename one of each")
    return _load("load_keras", KERAS, short, target, names, kinds, strict, cast, rngs)


def _load(
    function: str,
    weight_format: WeightFormat,
    source: Mapping[str, Any],
    target: Any,
    names: Names | None,
    kinds: Mapping[str, str] | None,
    strict: bool,
    cast: bool,
    rngs: Any,
) -> tuple[Any, LoadReport]:
    opened = open_target(target, rngs)
    plans, plan_errors = make_plans(opened, names, kinds, weight_format)
    errors = [*opened.errors, *plan_errors]
    values = dict(opened.leaves)
    missing: dict[str, str] = {}
    not_found, kept = [], []
    leaves = defaultdict(list)
    for plan in plans:
        if not plan.candidates:
            kept.append(plan.path)
            continue
        name = next((name for name in plan.candidates if name in source), None)
        if name is None:
            missing[plan.path] = plan.candidates[0]
            if plan.path.split("/")[-1] == COUNTER:
                values[plan.path] = jnp.zeros(plan.leaf.shape, plan.leaf.dtype)
            else:
                wanted = " or ".join(map(repr, plan.candidates))
                not_found.append(f"{plan.path}: expected {wanted} in the source, got no such name")
            continue
        leaves[name].append(plan.path)
        try:
            values[plan.path] = _convert(source[name], name, plan, weight_format, cast)
        except (TypeError, ValueError) as error:
            errors.append(f"{plan.path}: {error}")
    errors += duplicates(leaves)
    counters, left_over, counter_errors = _unused(source, leaves)
    errors += counter_errors
    if missing and not leaves:
        errors.append(no_match(opened, missing, source, weight_format))
    elif strict:
        errors += not_found
        errors += [f"{name}: expected a leaf of the target to take it, got none" for name in left_over]
    elif not leaves:
        errors.append("names: expected some leaf of the target to be found in the source, got none")
    for path in (*kept, *(() if strict or not leaves else missing)):
        if isinstance(values[path], jax.ShapeDtypeStruct):
            errors.append(f"{path}: expected an array, since it stays as it is, got only shape and dtype")
    raise_all(function, "loaded", errors)
    used = {path: name for name, paths in leaves.items() for path in paths}
    return opened.fill(list(values.values())), LoadReport(used, missing, tuple(kept), tuple(left_over), counters)


def _unused(source: Mapping[str, Any], leaves: Mapping[str, Any]) -> tuple[dict[str, int], list[str], list[str]]:
    """Of the names that no leaf has: the counters of norms whose mean is loaded, all others, and the errors."""
    counters, left_over, errors = {}, [], []
    expected = {counter_of(name) for name in leaves}
    for name in source:
        if name in leaves:
            continue
        if name not in expected:
            left_over.append(name)
            continue
        try:
            counters[name] = read_counter(source[name])
        except (TypeError, ValueError) as error:
            errors.append(f"{name}: {error}")
    return counters, left_over, errors


def _convert(value: Any, name: str, plan: Plan, weight_format: WeightFormat, cast: bool) -> jax.Array:
    """Returns a value of the source in the layout, shape and dtype of its leaf.

    Raises:
      ValueError, TypeError: the value does not fit.
    """
    leaf, array = plan.leaf, as_array(value)
    by_name = weight_format is KERAS and name.endswith("depthwise_kernel")
    layout = weight_format.layouts["depthwise" if by_name else plan.kind]
    loaded = layout.load(array) if array.ndim == leaf.ndim else array
    if loaded.shape != leaf.shape:
        expected = layout.save(np.broadcast_to(np.empty((), leaf.dtype), leaf.shape)).shape
        raise ValueError(
            f"expected {name!r} with shape {expected}, got {array.shape}{_other_kind(array, plan, weight_format)}"
        )
    if plan.path.split("/")[-1] == COUNTER:
        return jnp.asarray(read_counter(array), leaf.dtype)
    if array.dtype != leaf.dtype:
        floating = is_floating(array.dtype) and is_floating(leaf.dtype)
        if not floating or not cast:
            cure = "; pass cast=True to convert" if floating else ""
            raise ValueError(f"expected {name!r} of dtype {leaf.dtype}, got {array.dtype}{cure}")
    if not fits_jax(leaf.dtype):
        raise ValueError(f"expected a leaf of a dtype that JAX has, got {leaf.dtype}; enable x64")
    # astype copies, so that changes of the source do not reach the leaf.
    return jnp.asarray(loaded.astype(leaf.dtype))


def _other_kind(array: NDArray[Any], plan: Plan, weight_format: WeightFormat) -> str:
    """The cure for a kernel whose shape is right in another layout."""
    module, _, leaf_name = plan.path.rpartition("/")
    if leaf_name == "kernel" and array.ndim == plan.leaf.ndim > 1:
        for kind, layout in weight_format.layouts.items():
            if layout.load(array).shape == plan.leaf.shape:
                return f"; pass kinds={{{module!r}: {kind!r}}} if that is its layout"
    return ""
