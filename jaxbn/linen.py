"""Batch norm as a Flax Linen module: variables in, function, variables out.

`from jaxbn.linen import BatchNorm` takes the place of `flax.linen.BatchNorm`: the same fields, the
same variables, the same checkpoints. Note Flax's meaning of `momentum`: it is the *decay* of the
running statistics, one minus what PyTorch and `jaxbn.batch_norm_train` call momentum.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype

from jaxbn import _layers
from jaxbn._state import BatchNormParams, BatchNormState


class BatchNorm(nn.BatchNorm):
    """Batch normalization; drop-in for `flax.linen.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; with
    `use_running_average=True` the running statistics take the place of the batch's.

    Variables: params `scale`, `bias` in `param_dtype`; batch_stats `mean`, `var` in float32; all of
    shape [C]. With `momentum=None` batch_stats also has `num_batches_tracked`, int32 [].

    All fields of `flax.linen.BatchNorm`, in its order and with its defaults and meanings:

    Attributes:
      use_running_average: True evaluates, False trains; here or in the call, not both.
      axis: the feature axis or axes.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer does not offer.
      epsilon: added to the variance.
      dtype: of the result; by default what x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias, use_scale, bias_init, scale_init: as in Flax.
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

    @nn.compact
    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalizes `x`; see the class.

        Args:
          x: floating-point array.
          use_running_average: True evaluates, False trains; here or in the constructor, not both.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.

        Returns:
          The normalized array, of the shape of `x`.
        """
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x, shape = _layers.check(self, x)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, stats_dtype)
        count = None
        # Evaluation does without it, and so takes a checkpoint of Flax's layer.
        if self.momentum is None and (self.is_initializing() or not evaluate):
            count = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, (), jnp.int32)
        params = BatchNormParams(
            self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        )
        # Initialization needs shapes alone, and is often given a batch of one.
        one_value = x.size == mean.value.size
        y, state = _layers.batch_norm(
            self,
            x,
            params,
            BatchNormState(mean.value, var.value, jnp.zeros((), jnp.int32) if count is None else count.value),
            evaluate=evaluate or (self.is_initializing() and one_value),
            synchronize=not self.is_initializing(),
            mask=mask,
            dtype=canonicalize_dtype(x, *(p for p in params if p is not None), dtype=self.dtype),
        )
        if not evaluate and not self.is_initializing():
            mean.value, var.value = state.mean, state.var
            if count is not None:
                count.value = state.num_batches_tracked
        return y
