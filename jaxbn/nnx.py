"""Batch norm as a Flax NNX module: variables in, function, variables out.

`from jaxbn.nnx import BatchNorm` takes the place of `flax.nnx.BatchNorm`: the same arguments, the
same variables, the same checkpoints. Note Flax's meaning of `momentum`: it is the *decay* of the
running statistics, one minus what PyTorch and `jaxbn.batch_norm_train` call momentum.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbn import _layers
from jaxbn._state import BatchNormParams, BatchNormState


class BatchNorm(nnx.BatchNorm):
    """Batch normalization; drop-in for `flax.nnx.BatchNorm`.

    Formula: in training `y = (x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias` over all axes but
    `axis`, and each running statistic becomes `momentum * old + (1 - momentum) * new`; after
    `model.eval()` the running statistics take the place of the batch's.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), `mean`, `var` (`nnx.BatchStat`, float32),
    all of shape [C]. With `momentum=None` also `num_batches_tracked` (`nnx.BatchStat`, int32 []).

    Args:
      num_features: the number of channels C.
      correction: subtracted from the count for the stored variance: 0 as Flax, 1 for PyTorch's
        unbiased one.
      virtual_batch_size: how many examples share a statistic in training, as in
        `jaxbn.batch_norm_train`.
      momentum: the *decay* of the running statistics: PyTorch's 0.1 is 0.9 here. None averages over
        all batches seen, which Flax's layer does not offer.
      rngs: random streams for the initializers.
      **flax_options: all other arguments of `flax.nnx.BatchNorm`, with its defaults and meanings:
        `use_running_average`, `axis`, `epsilon`, `dtype`, `param_dtype`, `use_bias`, `use_scale`,
        `bias_init`, `scale_init`, `axis_name`, `axis_index_groups`, and those that newer versions add.
        Three of them differ: `axis_name` may be several, and counts weigh, so that masks may differ;
        `use_fast_variance` has no effect, since variances are computed in a way that is both fast and
        exact; `promote_dtype` only decides the dtype of the result, since statistics are always
        float32 at least, in evaluation too.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.batch_norm_train`, of which one differs from Flax's layer: a
        training batch with one value per channel is an error, not a variance of 0.

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
        momentum: float | None = 0.99,
        rngs: nnx.Rngs,
        **flax_options: Any,
    ):
        super().__init__(num_features, rngs=rngs, **flax_options)
        self.momentum = momentum  # type: ignore[assignment]  # Flax has no None
        self.correction = correction
        self.virtual_batch_size = virtual_batch_size
        if momentum is None:
            self.num_batches_tracked = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """Normalizes `x`; see the class.

        Args:
          x: floating-point array.
          use_running_average: True evaluates, False trains; takes precedence over the attribute.
          mask: True (or non-zero) counts; broadcastable to `x` as in NumPy.

        Returns:
          The normalized array, of the shape of `x`.
        """
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError(
                "use_running_average: expected True to evaluate or False to train, got None; "
                "pass it to the call or the constructor, or use model.train() and model.eval()"
            )
        x, shape = _layers.check(self, x)
        if shape != self.mean.shape:
            raise ValueError(
                f"x: expected {self.num_features} features along axis {self.axis}, got {shape} in x with shape "
                f"{x.shape}; give the layer that num_features, or the axis that holds the channels"
            )
        mean, var = self.mean[...], self.var[...]
        params = BatchNormParams(
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
        )
        tracked = self.num_batches_tracked[...] if self.momentum is None else jnp.zeros((), jnp.int32)
        promoted = jax.eval_shape(functools.partial(self.promote_dtype, dtype=self.dtype), (x, mean, var, *params))
        y, state = _layers.batch_norm(
            self,
            x,
            params,
            BatchNormState(mean, var, tracked),
            evaluate=evaluate,
            mask=mask,
            dtype=self.dtype or jnp.result_type(*(v.dtype for v in (promoted[0], *promoted[3:]) if v is not None)),
        )
        if not evaluate:
            self.mean[...], self.var[...] = state.mean, state.var
            if self.momentum is None:
                self.num_batches_tracked[...] = state.num_batches_tracked
        return y
