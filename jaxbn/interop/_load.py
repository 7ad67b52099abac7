"""Whole models: every leaf finds its array, or nothing is loaded."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn.interop._conventions import KERAS, TORCH, Array, Convention, read_source
from jaxbn.interop._matching import (
    COUNTER,
    Names,
    convert,
    copy,
    make_plans,
    no_name_fits,
    raise_all,
    read_counter,
    twice,
)
from jaxbn.interop._targets import open_target


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every name, on both sides. `print` it.

    Attributes:
      used: the source's name for each leaf of the target that was filled.
      missing: for each leaf that the source does not have, the name looked for. The leaf keeps its value;
        `num_batches_tracked` becomes 0, see `batch_norm_from_torch`.
      kept: leaves that keep their value because `names` gives None for them.
      left_over: names of the source that no leaf takes.
      counters: `num_batches_tracked` of norms that have no place for it, by the source's name: Flax's,
        and jaxbn's unless `momentum=None`. `to_torch` takes them back.

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

    Formula: a leaf `module/name` takes `<name of the module in PyTorch>.<name>`, where kernel, scale and
    embedding are called `weight`, mean and var `running_mean` and `running_var`, and all others as they
    are in Flax. A kernel [in, out] is the transpose of Linear's weight, a kernel [*window, in / groups,
    out] that of a convolution with the two channel axes moved to the end, likewise if depthwise. All
    other leaves lie alike.

    Args:
      source: the state dict: mapping of names to arrays or tensors, or the path of a `.safetensors` file.
      target: Linen variables, `{"params": ..., "batch_stats": ...}`, or their shapes (`jax.eval_shape`);
        or an `nnx.Module`, or its shapes (`nnx.eval_shape`), of which the `nnx.Param` and `nnx.BatchStat`
        are filled. Nothing else changes, but for what `rngs` fills.
      names: what modules are called in PyTorch. By default as in Flax, with dots for slashes. A function
        takes the path of a module (`"layer1_0/bn1"`, `""` for the model itself) and returns the name
        (`"layer1.0.bn1"`). A mapping has paths of modules, which hold for what is inside too, or of
        leaves; the longest counts, and where there is none the default. None in the place of a name
        leaves that part of the target as it is.
      kinds: how kernels lie, by path of their module or their own, where that cannot be seen:
        "conv_transpose" for Linen's ConvTranspose with `transpose_kernel=False` (NNX models say so
        themselves; with True the layout is that of a convolution), "dense", "conv", or "as_is".
      strict: whether it is an error if a leaf gets nothing, or a name of the source is not used. False
        leaves that to the report, as long as anything is used.
      cast: whether floating-point arrays are converted to the dtype of their leaf. Without it another
        dtype is an error, but for counters.
      rngs: `nnx.Rngs` for the random streams (dropout) of an NNX model that has only shapes: a key of the
        stream of the same name, or of `default`, for each. Streams that have keys keep them.

    Returns:
      `(filled, report)`: a new tree, in which arrays are copies, or the same model, changed.

    Raises:
      ValueError: a name is unknown, missing, left over or used twice, an array has the wrong shape or
        dtype, or something in `target` would be left with a shape and no value. One error names all that is
        wrong, and then nothing has been changed.
      TypeError: `source`, `target` or `rngs` is not what is expected.
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

    Formula: as `load_torch` with Keras' names: `gamma`, `beta`, `moving_mean`, `moving_variance`,
    `kernel`, `depthwise_kernel`, `bias`, `embeddings`, behind slashes. Kernels lie as in Flax, but for
    two: a `depthwise_kernel` [*window, in, multiplier] becomes [*window, 1, in * multiplier], and that of
    a transposed convolution is [*window, out, in], as Flax has it with `transpose_kernel=True`.

    Args:
      source: mapping of names to arrays, `{w.path: w.numpy() for w in model.weights}`, or `w.name` before
        Keras 3; the `:0` behind a name does not count. Or the path of a `.safetensors` file.
      target, names, strict, cast, rngs: as in `load_torch`; names of the source are separated by slashes.
      kinds: "depthwise" for a depthwise kernel that is only called `kernel`, as from Keras 3 on;
        "conv_transpose" for Linen's ConvTranspose with `transpose_kernel=False`; or "as_is".

    Returns:
      `(filled, report)`, as `load_torch`. Keras has no counters.

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


def to_torch(
    target: Any,
    names: Names | None = None,
    *,
    kinds: Mapping[str, str] | None = None,
    counters: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """Returns Linen variables or an NNX model as a PyTorch state dict: what `load_torch` takes.

    Formula: that of `load_torch`, the other way round. Every norm with running statistics also has
    `num_batches_tracked`, int64 [], which `load_state_dict(strict=True)` asks for.

    Args:
      target, names, kinds: as in `load_torch`. Where `names` gives None nothing is written.
      counters: `num_batches_tracked` of norms that have no place for it, by PyTorch's name:
        `report.counters`. It is 0 where nothing is said.

    Returns:
      NumPy arrays, contiguous copies that `torch.from_numpy` takes, in the dtypes of the leaves.

    Raises:
      ValueError: a name is unknown or given twice, or a leaf has no value. One error names all.
      TypeError: `target` is not what is expected.

    Source: torch.nn.Module.state_dict.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> from jaxbn.interop import to_torch
      >>> variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
      >>> {name: v.shape for name, v in to_torch(variables, {"": "fc"}).items()}
      {'fc.bias': (2,), 'fc.weight': (2, 3)}
    """
    goal = open_target(target)
    problems: list[str] = []
    state_dict: dict[str, Array] = {}
    takers = defaultdict(list)
    unused = dict(counters or {})
    for path, leaf, candidates, kind in make_plans(goal, names, kinds, TORCH, problems):
        if not candidates:
            continue
        name = candidates[0]
        takers[name].append(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            problems.append(f"{path}: expected an array, got only shape and dtype")
            continue
        array = TORCH.layouts[kind].save(np.asarray(leaf))
        module, slash, own = path.rpartition("/")
        state_dict[name] = copy(array.astype(np.int64) if own == COUNTER else array)
        counter = _counter_of(name)
        if own == "mean" and f"{module}{slash}{COUNTER}" not in goal.leaves and counter is not None:
            state_dict[counter] = np.array(unused.pop(counter, 0), np.int64)
    problems += twice(takers)
    problems += [f"counters: expected names of norms without a place for it, got {name!r}" for name in unused]
    raise_all("to_torch", "returned", problems)
    return state_dict


def _load(
    function: str,
    convention: Convention,
    source: Mapping[str, Any],
    target: Any,
    names: Names | None,
    kinds: Mapping[str, str] | None,
    strict: bool,
    cast: bool,
    rngs: Any,
) -> tuple[Any, LoadReport]:
    goal = open_target(target, rngs)
    problems = list(goal.problems)
    values = dict(goal.leaves)
    missing: dict[str, str] = {}
    unmatched, kept = [], []
    takers = defaultdict(list)
    for plan in make_plans(goal, names, kinds, convention, problems):
        if not plan.candidates:
            kept.append(plan.path)
            continue
        name = next((name for name in plan.candidates if name in source), None)
        if name is None:
            missing[plan.path] = plan.candidates[0]
            if plan.path.split("/")[-1] == COUNTER:
                values[plan.path] = jnp.zeros(plan.leaf.shape, plan.leaf.dtype)
            elif strict:
                wanted = " or ".join(map(repr, plan.candidates))
                unmatched.append(f"{plan.path}: expected {wanted} in the source, got no such name")
            continue
        takers[name].append(plan.path)
        try:
            values[plan.path] = convert(source[name], name, plan, convention, cast)
        except (TypeError, ValueError) as error:
            problems.append(f"{plan.path}: {error}")
    problems += twice(takers)
    counters, left_over = {}, []
    counted = {_counter_of(name) for name in takers}
    for name in source:
        if name in takers:
            continue
        if name in counted:
            try:
                counters[name] = read_counter(source[name])
            except (TypeError, ValueError) as error:
                problems.append(f"{name}: {error}")
        else:
            left_over.append(name)
    if missing and not takers:
        problems.append(no_name_fits(goal, missing, source, convention))
    elif strict:
        problems += unmatched
        problems += [f"{name}: expected a leaf of the target to take it, got none" for name in left_over]
    elif not takers:
        problems.append("names: expected some leaf of the target to be found in the source, got none")
    for path in (*kept, *(() if strict or not takers else missing)):
        if isinstance(values[path], jax.ShapeDtypeStruct):
            problems.append(f"{path}: expected an array, since it stays as it is, got only shape and dtype")
    raise_all(function, "loaded", problems)
    used = {path: name for name, paths in takers.items() for path in paths}
    return goal.rebuild(list(values.values())), LoadReport(used, missing, tuple(kept), tuple(left_over), counters)


def _counter_of(name: str) -> str | None:
    """The counter that belongs to a running mean of this name."""
    return name.removesuffix("running_mean") + COUNTER if name.endswith("running_mean") else None
