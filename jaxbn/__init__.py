"""Normalization for JAX: pure functions with PyTorch's semantics, and layers for Flax on top.

The functions need jax alone. Layers are in `jaxbn.linen` and `jaxbn.nnx`, which need flax.
"""

from jaxbn._batch_norm import batch_norm_eval as batch_norm_eval
from jaxbn._batch_norm import batch_norm_train as batch_norm_train
from jaxbn._moments import Moments as Moments
from jaxbn._moments import moments as moments
from jaxbn._state import BatchNormParams as BatchNormParams
from jaxbn._state import BatchNormState as BatchNormState
from jaxbn._state import batch_norm_init as batch_norm_init
from jaxbn._state import batch_norm_update as batch_norm_update
from jaxbn._state import sync_state as sync_state

__version__ = "0.1.0"
