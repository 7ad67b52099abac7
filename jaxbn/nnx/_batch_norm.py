"""Batch norm and batch renormalization as NNX modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._layers import flax_options
from jaxbn._norms.state import BatchNormParams, BatchNormState
from jaxbn._versions import get_raw_value, set_value, sharding_entry, variable_kind, variable_type
from jaxbn.nnx._result_dtype import result_dtype
from jaxbn.nnx._shapes import only_shapes


class BatchNorm(nnx.BatchNorm):
    """Batch normalization; drop-in for `flax.nnx.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; after
    `model.eval()` the running statistics take the place of the batch's.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), `mean`, `var` (`nnx.BatchStat`, float32),
    all of shape [C]. With `momentum=None` also `num_batches_tracked` (`nnx.BatchStat`, int32 []). The first
    training on complex x makes `mean` complex.

    Args:
      num_features: the number of channels C.
      correction: subtracted from the count for the stored variance: 0 as Flax, 1 for PyTorch's
        unbiased one.
      virtual_batch_size: how many examples share statistics in training, as in
        `jaxbn.batch_norm_train`.
      num_domains: the number of domains D with statistics of their own: mean and var are [D, C], and
        every call names a `domain`. See `jaxbn.take_domain`.
      domain_affine: whether scale and bias are [D, C] too, rather than shared.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer cannot; `replace_batch_norms` can set it later.
      rngs: random streams for the initializers.
      **options: all other arguments of `flax.nnx.BatchNorm`, with its defaults and meanings:
        `use_running_average`, `axis`, `epsilon`, `dtype`, `param_dtype`, `use_bias`, `use_scale`,
        `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`, and those that newer versions add.
        Three of them differ: `axis_name` may be several axes, and each value has equal weight, so masks may
        differ between devices; `use_fast_variance` has no effect, since variances are computed in a way that
        is both fast and exact; `promote_dtype` only decides the dtype of the result, since statistics are
        always float32 at least, in evaluation too.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_norm_train`, of which one differs from Flax's layer: a
        training batch with one value per channel is an error, not a variance of 0, except where only shapes
        are used: in `nnx.tabulate`, and in the initialization of a Linen network. Or `momentum` was set to None
        in a layer without `num_batches_tracked`.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167; interface: flax.nnx.BatchNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchNorm
      >>> layer = BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
      >>> y.round(3).tolist(), layer.mean[...].tolist()
      ([[-1.0, -1.0], [1.0, 1.0]], [0.20000000298023224, 2.0])
      >>> layer.eval()
      >>> layer(jnp.array([[0.2, 2.0]])).tolist()
      [[0.0, 0.0]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        correction: float = 0,
        virtual_batch_size: int | None = None,
        num_domains: int | None = None,
        domain_affine: bool = False,
        momentum: float | None = 0.99,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **options)
        self.momentum = momentum  # type: ignore[assignment]  # Flax has no None
        self.correction = correction
        self.virtual_batch_size = virtual_batch_size
        self.num_domains = num_domains
        self.domain_affine = domain_affine
        for number in flax_options.domain_axes(num_domains):
            for name in ("mean", "var", *(("scale", "bias") if domain_affine else ())):
                variable = getattr(self, name)
                if variable is not None:
                    setattr(self, name, _stack_domains(variable, number))
        if momentum is None:
            self._add_batch_counter()

    def _add_batch_counter(self) -> None:
        """Adds `num_batches_tracked`, at 0 and as the same kind of variable as `mean`, if there is none."""
        if not hasattr(self, "num_batches_tracked"):
            zero = jnp.zeros(self.mean.shape[:-1], jnp.int32)
            self.num_batches_tracked = nnx.BatchStat(zero, **variable_kind(self.mean))

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
          x: array of numbers. Integers and booleans are taken as floating-point numbers, as in Flax. If it is complex,
            the variance is the mean of `|x - mean|**2`.
          use_running_average: True evaluates, False trains; takes precedence over the attribute.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.
          domain: the domain that x is from, with `num_domains`; may be traced.

        Returns:
          The normalized array, of the shape of `x`.
        """
        mode = self.use_running_average if use_running_average is None else use_running_average
        if mode is None:
            raise ValueError(
                "use_running_average: expected True to evaluate or False to train, got None; "
                "pass it to the call or the constructor, or use model.train() and model.eval()"
            )
        evaluate = flax_options.check_mode(mode)
        limits = self._renorm_limits
        x, shape = flax_options.check_call(self, x, limits)
        if shape != (self.num_features,):
            raise ValueError(
                f"x: expected {self.num_features} features along axis {self.axis}, got {shape} in x with shape "
                f"{x.shape}; give the layer that num_features, or the axis that holds the channels"
            )
        mean, var = self.mean[...], self.var[...]
        params = BatchNormParams(*(None if v is None else v[...] for v in (self.scale, self.bias)))
        count = getattr(self, "num_batches_tracked", None)
        if count is None and self.momentum is None and not evaluate:
            raise ValueError(
                "momentum: expected the decay of the running statistics, since this layer has no num_batches_tracked, "
                "got None; construct it with momentum=None, or set that by jaxbn.nnx.replace_batch_norms(model, "
                "momentum=None)"
            )
        y, state = flax_options.batch_norm(
            self,
            x,
            params,
            BatchNormState(mean, var, jnp.zeros(mean.shape[:-1], jnp.int32) if count is None else count[...]),
            evaluate=evaluate,
            only_shapes=only_shapes(self),
            mask=mask,
            domain=domain,
            limits=limits,
            dtype=result_dtype(self, x, (mean, var), params),
        )
        if not evaluate:
            self.var[...] = state.var
            if state.mean.dtype == mean.dtype:
                self.mean[...] = state.mean
            else:
                # The first complex x has made it complex.
                set_value(self.mean, state.mean)
            if count is not None:
                count[...] = state.num_batches_tracked
        return y

    @property
    def _renorm_limits(self) -> flax_options.Limits | None:
        """The limits of batch renormalization; None if the layer does not renormalize."""
        return None


class BatchRenorm(BatchNorm):
    """Batch renormalization: in training too, outputs are close to those of evaluation, however small the batches.

    Formula: that of `jaxbn.batch_renorm_train`; in evaluation that of `BatchNorm`.

    Variables: those of `BatchNorm`, and `num_batches_tracked` (`nnx.BatchStat`, int32 []) with any `momentum`.

    Args:
      num_features: the number of channels C.
      limits: `(r_max, d_max)`, or a function that returns them for the number of batches tracked:
        `jaxbn.batch_renorm_limits`, or a partial of it, is the paper's schedule.
      rngs: random streams for the initializers.
      **options: all other arguments of `BatchNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_renorm_train`.

    Source: Ioffe (2017), arXiv:1702.03275.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> from flax import nnx
      >>> from jaxbn.nnx import BatchRenorm
      >>> layer = BatchRenorm(1, momentum=0.9, limits=jaxbn.batch_renorm_limits, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[1.0], [2.0]]))
      >>> y.round(3).ravel().tolist(), int(layer.num_batches_tracked[...])
      ([-1.0, 1.0], 1)
    """

    def __init__(self, num_features: int, *, limits: flax_options.Limits, rngs: nnx.Rngs, **options: Any):
        super().__init__(num_features, rngs=rngs, **options)
        self.limits = limits
        self._add_batch_counter()

    @property
    def _renorm_limits(self) -> flax_options.Limits:
        return self.limits


def _stack_domains(variable: Any, number: int) -> Any:
    """Returns the variable repeated for `number` domains, along a first axis that is not sharded."""
    metadata = variable.get_metadata() | variable_kind(variable)
    # This hook has run already.
    metadata.pop("on_create_value", None)
    name = sharding_entry(metadata)
    sharding = metadata.get(name)
    if isinstance(sharding, jax.NamedSharding):
        metadata[name] = sharding.update(spec=(None, *sharding.spec))
    elif sharding:
        metadata[name] = (None, *sharding)
    value = get_raw_value(variable)[...]
    return variable_type(variable)(jnp.broadcast_to(value, (number, *value.shape)), **metadata)
