"""The norms as Linen modules."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from jaxbn._kernel.inputs import as_inexact_array, sizes
from jaxbn._layers import flax_options
from jaxbn._norms.state import BatchNormParams, BatchNormState


class BatchNorm(nn.BatchNorm):
    """Batch normalization; drop-in for `flax.linen.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; with
    `use_running_average=True` the running statistics take the place of the batch's.

    Variables: params `scale`, `bias` in `param_dtype`; batch_stats `mean`, `var` in float32; all of
    shape [C]. With `momentum=None` batch_stats also has `num_batches_tracked`, int32 []. A checkpoint
    without it has counted no batch: in training the first one takes the place of its mean and var. The first
    training on complex x makes `mean` complex.

    All fields of `flax.linen.BatchNorm`, in its order and with its defaults and meanings:

    Attributes:
      use_running_average: True evaluates, False trains; here or in the call, not both.
      axis: the feature axis or axes.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer does not offer.
      epsilon: added to the variance.
      dtype: of the result; by default what x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias, use_scale, bias_init, scale_init: as in Flax. Of initializers that are partitioned
        (`nn.with_partitioning`) `domain_affine` makes boxes whose first axis is not sharded.
      axis_name: the mapped axis, or axes, whose devices share statistics in training; they need not
        be bound in initialization and evaluation. Counts weigh, so masks may differ.
      axis_index_groups: sets of devices along `axis_name` that share.
      use_fast_variance: has no effect. Variances are computed in a way that is both fast and exact.
      force_float32_reductions: statistics are always float32 at least. False only gives the running
        statistics the dtype `param_dtype`, as Flax does.
      correction: keyword only. Subtracted from the count for the stored variance: 0 as Flax, 1 for
        PyTorch's unbiased one.
      virtual_batch_size: keyword only. How many examples share a statistic in training, as in
        `jaxbn.batch_norm_train`.
      num_domains: keyword only. Statistics for each of so many domains, of which every call names one
        by `domain`: mean and var are [D, C] then. See `jaxbn.take_domain`.
      domain_affine: keyword only. Whether scale and bias are [D, C] too, rather than shared.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_norm_train`, of which one differs from Flax's layer: a
        training batch with one value per channel is an error, not a variance of 0.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167; interface: flax.linen.BatchNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm
      >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
      >>> layer = BatchNorm(use_running_average=False, momentum=0.9)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.round(3).tolist(), updates["batch_stats"]["mean"].tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
    """

    correction: float = dataclasses.field(default=0, kw_only=True)
    virtual_batch_size: int | None = dataclasses.field(default=None, kw_only=True)
    num_domains: int | None = dataclasses.field(default=None, kw_only=True)
    domain_affine: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        domain: int | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`; see the class.

        Args:
          x: floating-point array, or complex: then the variance is the mean of `|x - mean|**2`.
          use_running_average: True evaluates, False trains; here or in the constructor, not both.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.
          domain: with `num_domains`, which domain x is from; may be traced.

        Returns:
          The normalized array, of the shape of `x`.
        """
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x, shape = flax_options.check(self, x)
        domains = flax_options.domains(self.num_domains)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, (*domains, *shape), stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (*domains, *shape), stats_dtype)
        count = None
        # Evaluation does without it, and so takes a checkpoint of Flax's layer.
        if (self.momentum is None or hasattr(self, "limits")) and (self.is_initializing() or not evaluate):
            count = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, domains, jnp.int32)
        params = _affine(self, shape, domains if self.domain_affine else ())
        # Initialization needs shapes alone, and is often given a batch of one.
        one_value = x.size == math.prod(shape)
        y, state = flax_options.batch_norm(
            self,
            x,
            params,
            BatchNormState(mean.value, var.value, jnp.zeros(domains, jnp.int32) if count is None else count.value),
            evaluate=evaluate or (self.is_initializing() and one_value),
            synchronize=not self.is_initializing(),
            mask=mask,
            domain=domain,
            dtype=_result_dtype(self, x, params),
        )
        if not evaluate and not self.is_initializing():
            mean.value, var.value = state.mean, state.var
            if count is not None:
                count.value = state.num_batches_tracked
        return y


class BatchRenorm(BatchNorm):
    """Batch renormalization: batch norm that trains on small batches as it will be evaluated.

    Formula: that of `jaxbn.batch_renorm_train`; in evaluation that of `BatchNorm`.

    Variables: those of `BatchNorm`, and batch_stats `num_batches_tracked`, int32 [], always.

    All fields of `BatchNorm`, and:

    Attributes:
      limits: keyword only, required. `(r_max, d_max)`, or a function that gives them for the number of
        batches tracked: `jaxbn.batch_renorm_limits`, or a partial of it, is the paper's schedule.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_renorm_train`.

    Source: Ioffe (2017), arXiv:1702.03275.

    Example:
      >>> import jax, jax.numpy as jnp, jaxbn
      >>> from jaxbn.linen import BatchRenorm
      >>> x = jnp.array([[1.0], [2.0]])
      >>> layer = BatchRenorm(use_running_average=False, momentum=0.9, limits=jaxbn.batch_renorm_limits)
      >>> variables = layer.init(jax.random.key(0), x)
      >>> y, updates = layer.apply(variables, x, mutable=["batch_stats"])
      >>> y.round(3).ravel().tolist(), int(updates["batch_stats"]["num_batches_tracked"])
      ([-1.0, 1.0], 1)
    """

    limits: flax_options.Limits = dataclasses.field(kw_only=True)


class LayerNorm(nn.LayerNorm):
    """Layer normalization; drop-in for `flax.linen.LayerNorm`.

    Formula: that of `jaxbn.layer_norm` over `reduction_axes`, with scale and bias along `feature_axes`.

    Variables: params `scale`, `bias` in `param_dtype`, in the sizes of `feature_axes`.

    All fields of `flax.linen.LayerNorm`, in its order and with its defaults and meanings. Three have
    less to do: `use_fast_variance` and `force_float32_reductions` have no effect, since variances are
    computed in a way that is both fast and exact, in float32 at least; `axis_name` need not be bound in
    initialization, and counts weigh, so masks may differ between devices.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.layer_norm`.

    Source: Ba, Kiros & Hinton (2016), arXiv:1607.06450; interface: flax.linen.LayerNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import LayerNorm
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> y, variables = LayerNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist(), variables["params"]["scale"].tolist()
      ([[-1.0, 1.0], [-1.0, 1.0]], [1.0, 1.0])
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.layer_axes(self, x), mask)


class RMSNorm(nn.RMSNorm):
    """RMS normalization; drop-in for `flax.linen.RMSNorm`.

    Formula: that of `jaxbn.rms_norm` over `reduction_axes`, with scale along `feature_axes`.

    Variables: params `scale` in `param_dtype`, in the sizes of `feature_axes`.

    All fields of `flax.linen.RMSNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.rms_norm`.

    Source: Zhang & Sennrich (2019), arXiv:1910.07467; interface: flax.linen.RMSNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import RMSNorm
      >>> y, _ = RMSNorm().init_with_output(jax.random.key(0), jnp.array([[20.0, -20.0]]))
      >>> y.round(3).tolist()
      [[1.0, -1.0]]
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.layer_axes(self, x, about_zero=True), mask)


class GroupNorm(nn.GroupNorm):
    """Group normalization; drop-in for `flax.linen.GroupNorm`.

    Formula: that of `jaxbn.group_norm`, channels last, with examples along the axes that are not
    `reduction_axes`: the first one by default.

    Variables: params `scale`, `bias` in `param_dtype`, shape [C].

    All fields of `flax.linen.GroupNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.group_norm`, of which one differs from Flax's layer: one value
        per group is an error, not a variance of 0.

    Source: Wu & He (2018), arXiv:1803.08494; interface: flax.linen.GroupNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> y, _ = GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                f"num_groups, group_size: expected one number and one None, got {self.num_groups} and "
                f"{self.group_size}; with group_size pass num_groups=None, which is 32 by default"
            )
        x = as_inexact_array(x)
        num_groups = self.num_groups
        if num_groups is None:
            assert self.group_size is not None
            if self.group_size < 1 or x.shape[-1] % self.group_size:
                raise ValueError(
                    f"group_size: expected a divisor of the {x.shape[-1]} channels of x with shape {x.shape}, "
                    f"got {self.group_size}; all groups have the same number of channels"
                )
            num_groups = x.shape[-1] // self.group_size
        return _sample_norm(self, x, flax_options.group_axes(self, x, num_groups), mask)


class InstanceNorm(nn.InstanceNorm):
    """Instance normalization; drop-in for `flax.linen.InstanceNorm`.

    Formula: that of `jaxbn.instance_norm_train` without a state, with channels along `feature_axes` and
    examples along the first axis. Tracked statistics are `BatchNorm(virtual_batch_size=1)`.

    Variables: params `scale`, `bias` in `param_dtype`, in the sizes of `feature_axes`.

    All fields of `flax.linen.InstanceNorm`; see `LayerNorm`. Devices along `axis_name` have parts of each
    example.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.instance_norm_train`, of which one differs from Flax's layer: one
        value per channel of an example is an error, not a variance of 0.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), arXiv:1607.08022; interface: flax.linen.InstanceNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
      >>> y, _ = InstanceNorm().init_with_output(jax.random.key(0), x)
      >>> y[..., 0].round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.instance_axes(self, x), mask)


def _sample_norm(layer: Any, x: jax.Array, axes: flax_options.SampleAxes, mask: jax.Array | None) -> jax.Array:
    params = _affine(layer, sizes(x, axes.feature))
    return flax_options.sample_norm(
        layer,
        x,
        params,
        axes,
        initializing=layer.is_initializing(),
        mask=mask,
        dtype=_result_dtype(layer, x, params),
    )


def _affine(layer: Any, shape: tuple[int, ...], domains: tuple[int, ...] = ()) -> BatchNormParams:
    """The layer's scale and bias. All domains begin alike."""

    def parameter(name: str, used: bool, init: Any) -> jax.Array | None:
        def stacked(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
            # What is partitioned is in a box, which learns of the axis of the domains, and that it is not sharded.
            one = nn.meta.add_axis(init(key, shape, dtype), 0, {nn.meta.PARTITION_NAME: None})
            return jax.tree.map(lambda v: jnp.broadcast_to(v, (*domains, *shape)), one)

        return layer.param(name, stacked if domains else init, shape, layer.param_dtype) if used else None

    # RMSNorm has no bias, and no field for it.
    use_bias = getattr(layer, "use_bias", False)
    return BatchNormParams(
        parameter("scale", layer.use_scale, layer.scale_init),
        parameter("bias", use_bias, layer.bias_init if use_bias else None),
    )


def _result_dtype(layer: Any, x: jax.Array, params: BatchNormParams) -> Any:
    return canonicalize_dtype(x, *(p for p in params if p is not None), dtype=layer.dtype)
