"""Normalization for JAX: pure functions with PyTorch's semantics, and layers for Flax on top.

The functions need jax alone. Layers are in `jaxbn.linen` and `jaxbn.nnx`, which need flax.
"""

from jaxbn._batch_norm import batch_norm_eval as batch_norm_eval
from jaxbn._batch_norm import batch_norm_train as batch_norm_train
from jaxbn._batch_renorm import batch_renorm_limits as batch_renorm_limits
from jaxbn._batch_renorm import batch_renorm_train as batch_renorm_train
from jaxbn._data_moments import data_moments as data_moments
from jaxbn._domains import put_domain as put_domain
from jaxbn._domains import take_domain as take_domain
from jaxbn._fold import fold_batch_norm as fold_batch_norm
from jaxbn._instance_norm import instance_norm_eval as instance_norm_eval
from jaxbn._instance_norm import instance_norm_train as instance_norm_train
from jaxbn._moments import MOMENTS_NAME as MOMENTS_NAME
from jaxbn._moments import Moments as Moments
from jaxbn._moments import moments as moments
from jaxbn._sample_norms import group_norm as group_norm
from jaxbn._sample_norms import layer_norm as layer_norm
from jaxbn._sample_norms import rms_norm as rms_norm
from jaxbn._state import BatchNormParams as BatchNormParams
from jaxbn._state import BatchNormState as BatchNormState
from jaxbn._state import affine_init as affine_init
from jaxbn._state import batch_norm_init as batch_norm_init
from jaxbn._state import batch_norm_update as batch_norm_update
from jaxbn._state import sync_state as sync_state

__version__ = "0.1.0"
