"""Loads whole models: either all leaves get their arrays, or nothing is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxbn.interop._fill import LoadReport, fill
from jaxbn.interop._formats import KERAS, TORCH
from jaxbn.interop._matching import Names
from jaxbn.interop._source import read_source


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

    Formula: a leaf `module/name` is filled with `<name of the module in PyTorch>.<name>`, where kernel, scale,
    embedding and negative_slope are called `weight`, mean and var `running_mean` and `running_var`, and all
    others as in Flax. A kernel [in, out] is the transpose of Linear's weight; so is one with several axes of
    inputs or outputs, whose axes are rows or columns of the weight in C order. A kernel [*window, in / groups,
    out] is a convolution's weight with the two channel axes moved to the end, also if it is depthwise. Flax's
    attention is torch.nn.MultiheadAttention (`in_proj_weight` or `q_proj_weight` and so on, `out_proj`) or four
    linear layers. A leaf of stacked layers, along its first axis, is filled with one entry for each layer. All
    other leaves have the same layout. Of a value stored in parts (weight norm, spectral norm with its vectors,
    pruning) the whole is loaded, rounded to the dtype of the parts.

    Args:
      source: the state dict: mapping of names to arrays or tensors, or the path of a `.safetensors` file.
      target: Linen variables, `{"params": ..., "batch_stats": ...}`, or their shapes (`jax.eval_shape`);
        or an `nnx.Module`, or its shapes (`nnx.eval_shape`). Of an NNX module, `nnx.Param` and
        `nnx.BatchStat` are filled, and random streams from `rngs`; nothing else changes.
      names: the names of modules in PyTorch. The default is the path in Flax with dots in place of slashes.
        A function takes the path of a module (`"layer1_0/bn1"`, `""` for the model itself) and returns its
        name (`"layer1.0.bn1"`). A mapping has paths of modules, which apply to all modules inside them, or
        of leaves; the longest path that applies is used, and the default if none does. None in place of a
        name leaves that part of the target as it is; entries that have the part's default names are then no
        error. A * in a name stands for the numbers of stacked layers, from 0: `{"blocks": "layers.*"}`. Without
        it they are found if they are a part of the name between dots.
      kinds: the layouts of kernels, by the path of the module or of the kernel, where the target does not
        show them: "conv_transpose" for Linen's ConvTranspose with `transpose_kernel=False` (with True the
        layout is that of a convolution; NNX models need neither), "to_heads" and "from_heads" for Linen's
        DenseGeneral [in, heads, head_dim] and [heads, head_dim, out] (attention, NNX models and kernels whose
        bias has several axes need neither), "dense", "conv", or "as_is".
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
      torch.nn.ConvTranspose2d, torch.nn.MultiheadAttention, torch.nn.utils.parametrizations, flax.linen.Conv,
      flax.linen.ConvTranspose, flax.linen.MultiHeadDotProductAttention.

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
    return fill("load_torch", TORCH, read_source(source), target, names, kinds, strict, cast, rngs)


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
    `depthwise_kernel`, `pointwise_kernel`, `bias`, `embeddings`, `alpha`, after slashes, and `attention_output` for
    attention's `out`. Two modules with the name of one SeparableConv2D get a kernel each. Kernels have Flax's
    layout with two exceptions: a `depthwise_kernel` [*window, in, multiplier] becomes [*window, 1, in *
    multiplier], and the kernel of a transposed convolution is [*window, out, in], which is Flax's layout with
    `transpose_kernel=True`.

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
    return fill("load_keras", KERAS, short, target, names, kinds, strict, cast, rngs)
