"""Batch norm as an NNX module."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Initializer, PromoteDtypeFn
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, Groups
from jaxbn._kernel.inputs import sizes
from jaxbn._layers import flax_options
from jaxbn._norms.arguments import Axis
from jaxbn._norms.state import AffineParams, BatchNormState
from jaxbn._versions import get_raw_value, sharding_entry, variable_kind, variable_type
from jaxbn.nnx._result_dtype import result_dtype
from jaxbn.nnx._shapes import only_shapes
from jaxbn.nnx._signature import InitSignature

NO_METADATA: Mapping[str, Any] = MappingProxyType({})
_NEWER_DEFAULTS = {"promote_dtype": promote_dtype, "bias_metadata": NO_METADATA, "scale_metadata": NO_METADATA}


class BatchNorm(nnx.BatchNorm):
    """Batch normalization; drop-in for `flax.nnx.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; after
    `model.eval()` the running statistics take the place of the batch's.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), `mean`, `var` (`nnx.BatchStat`, float32),
    all of shape [C]. With `momentum=None` also `num_batches_tracked` (`nnx.BatchStat`, int32 []).

    Args:
      num_features: the number of channels C.
      use_running_average, epsilon, dtype, param_dtype, use_bias, use_scale: as in `flax.nnx.BatchNorm`.
      bias_init, scale_init, bias_metadata, scale_metadata, axis_index_groups: as in `flax.nnx.BatchNorm`.
      axis: the axis of the channels.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer cannot; `replace_batch_norms` can set it later.
      axis_name: the mapped axis, or axes, whose devices share statistics. Each value has equal weight, so masks may
        differ between devices.
      use_fast_variance: has no effect, since variances are computed in a way that is both fast and exact.
      promote_dtype: only decides the dtype of the result, since statistics are always float32 at least, in
        evaluation too.
      rngs: random streams for the initializers.
      correction: subtracted from the count for the stored variance: 0 as Flax, 1 for PyTorch's
        unbiased one.
      virtual_batch_size: how many examples share statistics in training, as in
        `jaxbn.batch_norm_train`.
      num_domains: the number of domains D with statistics of their own: mean and var are [D, C], and
        every call names a `domain`. See `jaxbn.take_domain`.
      domain_affine: whether scale and bias are [D, C] too, rather than shared.
      update_stats: whether the running statistics are updated in training. With False, here or in the call, a batch is
        normalized by its own moments and leaves no trace; `BatchRenorm` still renormalizes towards the statistics.
        `model.set_attributes(update_stats=False)` sets it in a model, and `nnx.view` in a view of one.

    `fix_statistics` sets two more attributes, `fixed_statistics` and `stop_affine_gradients`.

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

    __signature__: InitSignature = InitSignature()
    axis: Axis  # type: ignore[assignment]  # what Flax's layer, by its types, does not take
    momentum: float | None  # type: ignore[assignment]
    axis_name: AxisName | None  # type: ignore[assignment]

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axis = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros_init(),  # noqa: B008
        scale_init: Initializer = nnx.initializers.ones_init(),  # noqa: B008
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
        correction: float = 0,
        virtual_batch_size: int | None = None,
        num_domains: int | None = None,
        domain_affine: bool = False,
        update_stats: bool = True,
    ):
        # Flax before 0.12.1 has none of these, and raises an error.
        newer = {"promote_dtype": promote_dtype, "bias_metadata": bias_metadata, "scale_metadata": scale_metadata}
        options: dict[str, Any] = {name: v for name, v in newer.items() if v is not _NEWER_DEFAULTS[name]}
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            rngs=rngs,
            **options,
        )
        self.axis, self.momentum, self.axis_name = axis, momentum, axis_name
        self.correction = correction
        self.virtual_batch_size = virtual_batch_size
        self.num_domains = num_domains
        self.domain_affine = domain_affine
        self.update_stats = update_stats
        self.fixed_statistics = self.stop_affine_gradients = False
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
            self.num_batches_tracked: nnx.BatchStat[jax.Array] = nnx.BatchStat(zero, **variable_kind(self.mean))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        mask: jax.Array | None = None,
        domain: int | jax.Array | None = None,
        update_stats: bool | None = None,
    ) -> jax.Array:
        """Normalizes `x`; see the class.

        All arguments may be given by position, as `nnx.vmap` and `nnx.remat` of a layer need it.

        Args:
          x: array of numbers. Integers and booleans are taken as floating-point numbers, as in Flax. Complex x is
            normalized by Flax's layer, and the options that Flax's has not are errors.
          use_running_average: True evaluates, False trains; takes precedence over the attribute, but not over
            `fix_statistics`, after which the layer evaluates.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.
          domain: the domain that x is from, with `num_domains`; may be traced.
          update_stats: whether training updates the running statistics; takes precedence over the attribute.

        Returns:
          The normalized array, of the shape of `x`.
        """
        x = flax_options.as_number_array(x)
        mode = self.use_running_average if use_running_average is None else use_running_average
        if mode is None and not self.fixed_statistics:
            raise ValueError(
                "use_running_average: expected True to evaluate or False to train, got None; "
                "pass it to the call or the constructor, or use model.train() and model.eval()"
            )
        evaluate = mode is None or flax_options.check_mode(mode) or self.fixed_statistics
        update = flax_options.check_update_stats(self.update_stats if update_stats is None else update_stats)
        update = update and not evaluate
        if jnp.iscomplexobj(x):
            others = {
                "update_stats=False": not (evaluate or update),
                "stop_affine_gradients": self.stop_affine_gradients,
            }
            flax_options.check_complex(self, x, domain, **others)
            return super().__call__(x, evaluate, mask=mask)
        feature = flax_options.resolve_features(self, x)
        shape = sizes(x, feature)
        if shape != (self.num_features,):
            raise ValueError(
                f"x: expected {self.num_features} features along axis {self.axis}, got {shape} in x with shape "
                f"{x.shape}; give the layer that num_features, or the axis that holds the channels"
            )
        mean, var = self.mean[...], self.var[...]
        params = AffineParams(*(None if v is None else v[...] for v in (self.scale, self.bias)))
        if self.stop_affine_gradients:
            params = jax.lax.stop_gradient(params)
        count = getattr(self, "num_batches_tracked", None)
        if count is None and self.momentum is None and update:
            raise ValueError(
                "momentum: expected the decay of the running statistics, since this layer has no num_batches_tracked, "
                "got None; construct it with momentum=None, or set that by jaxbn.nnx.replace_batch_norms(model, "
                "momentum=None)"
            )
        y, state = flax_options.batch_norm(
            self,
            x,
            feature,
            params,
            BatchNormState(mean, var, jnp.zeros(mean.shape[:-1], jnp.int32) if count is None else count[...]),
            evaluate=evaluate,
            update=update,
            only_shapes=only_shapes(self),
            mask=mask,
            domain=domain,
            dtype=result_dtype(self, x, (mean, var), params),
        )
        if update:
            self.mean[...], self.var[...] = state.mean, state.var
            if count is not None:
                count[...] = state.num_batches_tracked
        return y

    def set_view(self, use_running_average: bool | None = None, update_stats: bool | None = None) -> None:
        """Sets attributes; `nnx.view` calls it."""
        for name, value in {"use_running_average": use_running_average, "update_stats": update_stats}.items():
            if value is not None:
                setattr(self, name, value)

    @property
    def _renorm_limits(self) -> flax_options.Limits | None:
        """The limits of batch renormalization; None if the layer does not renormalize."""
        return None


def _stack_domains(variable: nnx.Variable[jax.Array], number: int) -> nnx.Variable[jax.Array]:
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
    stacked = jnp.broadcast_to(value, (number, *value.shape))
    return variable_type(variable)(stacked, **metadata)
