"""Batch norm and batch renormalization as Linen modules."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._kernel.devices import AxisName
from jaxbn._kernel.inputs import sizes
from jaxbn._layers import flax_options
from jaxbn._norms.arguments import Axis
from jaxbn._norms.state import BatchNormState
from jaxbn.linen._params import affine_params, result_dtype


class BatchNorm(nn.BatchNorm):
    """Batch normalization; drop-in for `flax.linen.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; with
    `use_running_average=True` the running statistics take the place of the batch's.

    Variables: params `scale`, `bias` in `param_dtype`; batch_stats `mean`, `var` in float32; all of
    shape [C]. With `momentum=None` batch_stats also has `num_batches_tracked`, int32 []. In a checkpoint
    without it this is 0: the first batch in training replaces mean and var. After training on
    complex x `mean` is complex.

    All fields of `flax.linen.BatchNorm`, in its order and with its defaults and meanings:

    Attributes:
      use_running_average: True evaluates, False trains; here or in the call, not both.
      axis: the feature axis or axes.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer cannot.
      epsilon: added to the variance.
      dtype: of the result; by default what x, scale and bias promote to.
      param_dtype: of scale and bias.
      use_bias, use_scale, bias_init, scale_init: as in Flax. With `domain_affine` the boxes of partitioned
        initializers (`nn.with_partitioning`) get a first axis that is not sharded.
      axis_name: the mapped axis, or axes, whose devices share statistics in training; they need not
        be bound in initialization and evaluation. Each value has equal weight, so masks may differ.
      axis_index_groups: sets of devices along `axis_name` that share statistics.
      use_fast_variance: has no effect. Variances are computed in a way that is both fast and exact.
      force_float32_reductions: statistics are always float32 at least. False only gives the running
        statistics the dtype `param_dtype`, as Flax does.
      correction: keyword only. Subtracted from the count for the stored variance: 0 as Flax, 1 for
        PyTorch's unbiased one.
      virtual_batch_size: keyword only. How many examples share statistics in training, as in
        `jaxbn.batch_norm_train`.
      num_domains: keyword only. The number of domains D with statistics of their own: mean and var are
        [D, C], and every call names a `domain`. See `jaxbn.take_domain`.
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

    # Flax's fields, with the types of what is allowed here.
    axis: Axis = -1  # type: ignore[assignment]
    momentum: float | None = 0.99  # type: ignore[assignment]
    axis_name: AxisName | None = None  # type: ignore[assignment]
    correction: float = dataclasses.field(default=0, kw_only=True)
    virtual_batch_size: int | None = dataclasses.field(default=None, kw_only=True)
    num_domains: int | None = dataclasses.field(default=None, kw_only=True)
    domain_affine: bool = dataclasses.field(default=False, kw_only=True)

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        mask: jax.Array | None = None,
        domain: int | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`; see the class.

        All arguments may be given by position: `nn.vmap` ignores those that are given by name.

        Args:
          x: array of numbers. Integers and booleans are taken as floating-point numbers, as in Flax. Complex x is
            normalized by Flax's layer, and the options that Flax's has not are errors.
          use_running_average: True evaluates, False trains; here or in the constructor, not both.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.
          domain: the domain that x is from, with `num_domains`; may be traced.

        Returns:
          The normalized array, of the shape of `x`.
        """
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            flax_options.check_complex(self, x, domain)
            return super().__call__(x, use_running_average, mask=mask)
        mode = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        evaluate = flax_options.check_mode(mode)
        feature = flax_options.resolve_features(self, x)
        shape = sizes(x, feature)
        domains = flax_options.domain_axes(self.num_domains)
        stats_dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        mean = self.variable("batch_stats", "mean", jnp.zeros, (*domains, *shape), stats_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, (*domains, *shape), stats_dtype)
        count = None
        # Evaluation does not need it, and so accepts a checkpoint of Flax's layer.
        if (self.momentum is None or self._renorm_limits is not None) and (self.is_initializing() or not evaluate):
            count = self.variable("batch_stats", "num_batches_tracked", jnp.zeros, domains, jnp.int32)
        params = affine_params(self, shape, domains if self.domain_affine else ())
        y, state = flax_options.batch_norm(
            self,
            x,
            feature,
            params,
            BatchNormState(mean.value, var.value, jnp.zeros(domains, jnp.int32) if count is None else count.value),
            evaluate=evaluate,
            only_shapes=self.is_initializing(),
            mask=mask,
            domain=domain,
            dtype=result_dtype(self, x, params),
        )
        if not evaluate and not self.is_initializing():
            mean.value, var.value = state.mean, state.var
            if count is not None:
                count.value = state.num_batches_tracked
        return y

    @property
    def _renorm_limits(self) -> flax_options.Limits | None:
        """The limits of batch renormalization; None if the layer does not renormalize."""
        return None


class BatchRenorm(BatchNorm):
    """Batch renormalization: in training too, outputs are close to those of evaluation, however small the batches.

    Formula: that of `jaxbn.batch_renorm_train`; in evaluation that of `BatchNorm`.

    Variables: those of `BatchNorm`, and batch_stats `num_batches_tracked`, int32 [], with any `momentum`.

    All fields of `BatchNorm`, and:

    Attributes:
      limits: keyword only, required. `(r_max, d_max)`, or a function that returns them for the number of
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

    @property
    def _renorm_limits(self) -> flax_options.Limits:
        return self.limits
