"""The norms as NNX modules."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn._kernel.inputs import as_inexact_array, sizes
from jaxbn._layers import flax_options
from jaxbn._norms.state import BatchNormParams, BatchNormState


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
      virtual_batch_size: how many examples share a statistic in training, as in
        `jaxbn.batch_norm_train`.
      num_domains: statistics for each of so many domains, of which every call names one by `domain`:
        mean and var are [D, C] then. See `jaxbn.take_domain`.
      domain_affine: whether scale and bias are [D, C] too, rather than shared.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer does not offer; `replace_batch_norms` sets it later.
      rngs: random streams for the initializers.
      **options: all other arguments of `flax.nnx.BatchNorm`, with its defaults and meanings:
        `use_running_average`, `axis`, `epsilon`, `dtype`, `param_dtype`, `use_bias`, `use_scale`,
        `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`, and those that newer versions add.
        Three of them differ: `axis_name` may be several, and counts weigh, so that masks may differ;
        `use_fast_variance` has no effect, since variances are computed in a way that is both fast and
        exact; `promote_dtype` only decides the dtype of the result, since statistics are always
        float32 at least, in evaluation too.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_norm_train`, of which one differs from Flax's layer: a
        training batch with one value per channel is an error, not a variance of 0. Or `momentum` was set
        to None in a layer without `num_batches_tracked`.

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
        for number in flax_options.domains(num_domains):
            for name in ("mean", "var", *(("scale", "bias") if domain_affine else ())):
                variable = getattr(self, name)
                if variable is not None:
                    setattr(self, name, _of_each_domain(variable, number))
        if momentum is None:
            self._count_batches()

    def _count_batches(self) -> None:
        """Adds the counter, at 0 and of mean's kind, where there is none."""
        if not hasattr(self, "num_batches_tracked"):
            zero = jnp.zeros(self.mean.shape[:-1], jnp.int32)
            self.num_batches_tracked = nnx.BatchStat(zero, hijax=self.mean.hijax, ref=self.mean.ref)

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
          use_running_average: True evaluates, False trains; takes precedence over the attribute.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.
          domain: with `num_domains`, which domain x is from; may be traced.

        Returns:
          The normalized array, of the shape of `x`.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "use_running_average: expected True to evaluate or False to train, got None; "
                "pass it to the call or the constructor, or use model.train() and model.eval()"
            )
        x, shape = flax_options.check(self, x)
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
            mask=mask,
            domain=domain,
            dtype=_result_dtype(self, x, (mean, var), params),
        )
        if not evaluate:
            self.var[...] = state.var
            if state.mean.dtype == mean.dtype:
                self.mean[...] = state.mean
            else:
                # After the first complex x.
                self.mean.set_value(state.mean)
            if count is not None:
                count[...] = state.num_batches_tracked
        return y


class BatchRenorm(BatchNorm):
    """Batch renormalization: batch norm that trains on small batches as it will be evaluated.

    Formula: that of `jaxbn.batch_renorm_train`; in evaluation that of `BatchNorm`.

    Variables: those of `BatchNorm`, and `num_batches_tracked` (`nnx.BatchStat`, int32 []) always.

    Args:
      num_features: the number of channels C.
      limits: `(r_max, d_max)`, or a function that gives them for the number of batches tracked:
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
        self._count_batches()


class LayerNorm(nnx.LayerNorm):
    """Layer normalization; drop-in for `flax.nnx.LayerNorm`.

    Formula: that of `jaxbn.layer_norm` over `reduction_axes`, with scale and bias along `feature_axes`.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.LayerNorm`, with its defaults and meanings. Three have less to do:
    `use_fast_variance` has no effect, since variances are computed in a way that is both fast and exact;
    `promote_dtype` only decides the dtype of the result, since statistics are always float32 at least;
    over devices along `axis_name` counts weigh, so masks may differ.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.layer_norm`.

    Source: Ba, Kiros & Hinton (2016), arXiv:1607.06450; interface: flax.nnx.LayerNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import LayerNorm
      >>> LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.layer_axes(self, x), mask, self.num_features)


class RMSNorm(nnx.RMSNorm):
    """RMS normalization; drop-in for `flax.nnx.RMSNorm`.

    Formula: that of `jaxbn.rms_norm` over `reduction_axes`, with scale along `feature_axes`.

    Variables: `scale` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.RMSNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.rms_norm`.

    Source: Zhang & Sennrich (2019), arXiv:1910.07467; interface: flax.nnx.RMSNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import RMSNorm
      >>> RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[20.0, -20.0]])).round(3).tolist()
      [[1.0, -1.0]]
    """

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.layer_axes(self, x, about_zero=True), mask, self.num_features)


class GroupNorm(nnx.GroupNorm):
    """Group normalization; drop-in for `flax.nnx.GroupNorm`.

    Formula: that of `jaxbn.group_norm`, channels last, with examples along the axes that are not
    `reduction_axes`: the first one by default.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.GroupNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.group_norm`, of which one differs from Flax's layer: one value
        per group is an error, not a variance of 0.

    Source: Wu & He (2018), arXiv:1803.08494; interface: flax.nnx.GroupNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import GroupNorm
      >>> GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        axes = flax_options.group_axes(self, x, self.num_groups)
        return _sample_norm(self, x, axes, mask, self.num_groups * self.group_size)


class InstanceNorm(nnx.InstanceNorm):
    """Instance normalization; drop-in for `flax.nnx.InstanceNorm`.

    Formula: that of `jaxbn.instance_norm_train` without a state, with channels along `feature_axes` and
    examples along the first axis. Tracked statistics are `BatchNorm(virtual_batch_size=1)`.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.InstanceNorm`; see `LayerNorm`. Devices along `axis_name` have parts of
    each example.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.instance_norm_train`, of which one differs from Flax's layer: one
        value per channel of an example is an error, not a variance of 0.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), arXiv:1607.08022; interface: flax.nnx.InstanceNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
      >>> InstanceNorm(1, rngs=nnx.Rngs(0))(x)[..., 0].round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = as_inexact_array(x)
        return _sample_norm(self, x, flax_options.instance_axes(self, x), mask, self.num_features)


def _of_each_domain(variable: Any, number: int) -> Any:
    """Such a variable for `number` domains, which begin alike; their axis is the first, and is not sharded."""
    metadata = variable.get_metadata()
    # It has been called.
    metadata.pop("on_create_value", None)
    sharding = metadata.get("out_sharding")
    if isinstance(sharding, jax.NamedSharding):
        metadata["out_sharding"] = sharding.update(spec=(None, *sharding.spec))
    elif sharding:
        metadata["out_sharding"] = (None, *sharding)
    value = variable.get_raw_value()[...]
    return variable.var_type(jnp.broadcast_to(value, (number, *value.shape)), **metadata)


def _sample_norm(
    layer: Any, x: jax.Array, axes: flax_options.SampleAxes, mask: jax.Array | None, num_features: int
) -> jax.Array:
    shape = sizes(x, axes.feature)
    if math.prod(shape) != num_features:
        raise ValueError(
            f"x: expected {num_features} features along axes {axes.feature}, got {shape} in x with shape {x.shape}; "
            "give the layer that num_features, or the axes along which scale and bias vary"
        )
    # RMSNorm has no bias.
    variables = layer.scale, getattr(layer, "bias", None)
    params = BatchNormParams(*(None if v is None else v[...].reshape(shape) for v in variables))
    return flax_options.sample_norm(layer, x, params, axes, mask=mask, dtype=_result_dtype(layer, x, (), params))


def _result_dtype(layer: Any, x: jax.Array, statistics: tuple[jax.Array, ...], params: BatchNormParams) -> Any:
    """The dtype that Flax's layer gives y, which hands all these arrays to its promotion at once."""
    if layer.dtype is not None:
        return layer.dtype
    affine = params if hasattr(layer, "bias") else params[:1]
    kinds = tuple(
        None if v is None else jax.ShapeDtypeStruct(v.shape, v.dtype, weak_type=jax.typeof(v).weak_type)
        for v in (x, *statistics, *affine)
    )
    promoted = _promoted(layer.promote_dtype, kinds)
    own = (promoted[0], *promoted[1 + len(statistics) :])
    return jnp.result_type(*(v.dtype for v in own if v is not None))


@functools.lru_cache(maxsize=1024)
def _promoted(promote_dtype: Any, kinds: tuple[jax.ShapeDtypeStruct | None, ...]) -> Any:
    # Tracing takes longer than a small layer does outside of jit.
    return jax.eval_shape(functools.partial(promote_dtype, dtype=None), kinds)
