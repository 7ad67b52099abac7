"""Batch renormalization as an NNX module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from flax.typing import Initializer, PromoteDtypeFn
from jax.typing import DTypeLike

from jaxbn._kernel.devices import AxisName, Groups
from jaxbn._layers import flax_options
from jaxbn._norms.arguments import Axis
from jaxbn.nnx._batch_norm import NO_METADATA, BatchNorm


class BatchRenorm(BatchNorm):
    """Batch renormalization: in training too, outputs are close to those of evaluation, however small the batches.

    Formula: that of `jaxbn.batch_renorm_train`; in evaluation that of `BatchNorm`.

    Variables: those of `BatchNorm`, and `num_batches_tracked` (`nnx.BatchStat`, int32 []) with any `momentum`.

    All arguments of `BatchNorm`, and:

    Args:
      num_features: the number of channels C.
      limits: `(r_max, d_max)`, or a function that returns them for the number of batches tracked:
        `jaxbn.batch_renorm_limits`, or a partial of it, is the paper's schedule.
      rngs: random streams for the initializers.

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

    def __init__(
        self,
        num_features: int,
        *,
        limits: flax_options.Limits,
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
        super().__init__(
            num_features,
            use_running_average=use_running_average,
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            use_bias=use_bias,
            use_scale=use_scale,
            bias_init=bias_init,
            scale_init=scale_init,
            axis_name=axis_name,
            axis_index_groups=axis_index_groups,
            use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype,
            rngs=rngs,
            bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
            correction=correction,
            virtual_batch_size=virtual_batch_size,
            num_domains=num_domains,
            domain_affine=domain_affine,
            update_stats=update_stats,
        )
        self.limits = limits
        self._add_batch_counter()

    @property
    def _renorm_limits(self) -> flax_options.Limits:
        return self.limits
