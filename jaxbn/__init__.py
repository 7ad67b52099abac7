"""Normalization for JAX: pure functions with PyTorch's semantics, and layers for Flax on top.

The functions need jax alone. Layers are in `jaxbn.linen` and `jaxbn.nnx`, which need flax; the tools for trained
networks are in `jaxbn.interop`, `jaxbn.recalibrate`, `jaxbn.diagnose` and `jaxbn.fold`. These six are imported when
they are first used.
"""

import typing as _typing

from jaxbn._kernel.measure import MOMENTS_NAME as MOMENTS_NAME
from jaxbn._kernel.moments import Moments as Moments
from jaxbn._norms.batch_norm import batch_norm_eval as batch_norm_eval
from jaxbn._norms.batch_norm import batch_norm_train as batch_norm_train
from jaxbn._norms.batch_renorm import batch_renorm_limits as batch_renorm_limits
from jaxbn._norms.batch_renorm import batch_renorm_train as batch_renorm_train
from jaxbn._norms.domains import put_domain as put_domain
from jaxbn._norms.domains import take_domain as take_domain
from jaxbn._norms.instance_norm import instance_norm_eval as instance_norm_eval
from jaxbn._norms.instance_norm import instance_norm_train as instance_norm_train
from jaxbn._norms.moments import moments as moments
from jaxbn._norms.running_statistics import batch_norm_update as batch_norm_update
from jaxbn._norms.sample_norms import group_norm as group_norm
from jaxbn._norms.sample_norms import layer_norm as layer_norm
from jaxbn._norms.sample_norms import rms_norm as rms_norm
from jaxbn._norms.state import AffineParams as AffineParams
from jaxbn._norms.state import BatchNormParams as BatchNormParams
from jaxbn._norms.state import BatchNormState as BatchNormState
from jaxbn._norms.state import affine_init as affine_init
from jaxbn._norms.state import batch_norm_init as batch_norm_init
from jaxbn._norms.sync_state import sync_state as sync_state
from jaxbn._statistics.data_moments import data_moments as data_moments
from jaxbn._statistics.fold_batch_norm import fold_batch_norm as fold_batch_norm

if _typing.TYPE_CHECKING:
    from jaxbn import diagnose as diagnose
    from jaxbn import fold as fold
    from jaxbn import interop as interop
    from jaxbn import linen as linen
    from jaxbn import nnx as nnx
    from jaxbn import recalibrate as recalibrate

__version__ = "0.1.0"

if not _typing.TYPE_CHECKING:  # type checkers would take every name for one that exists
    _LAZY = ("diagnose", "fold", "interop", "linen", "nnx", "recalibrate")
    # For each layer, the functions here that compute the same.
    _NORMS = {
        "BatchNorm": "jaxbn.batch_norm_train and jaxbn.batch_norm_eval",
        "BatchRenorm": "jaxbn.batch_renorm_train",
        "GroupNorm": "jaxbn.group_norm",
        "InstanceNorm": "jaxbn.instance_norm_train and jaxbn.instance_norm_eval",
        "LayerNorm": "jaxbn.layer_norm",
        "RMSNorm": "jaxbn.rms_norm",
    }

    def __getattr__(name):
        import importlib

        if name in _LAZY:
            return importlib.import_module(f"jaxbn.{name}")
        cures = [
            f"; the layers are jaxbn.linen.{layer} and jaxbn.nnx.{layer}, and without Flax there is {functions}"
            for layer, functions in _NORMS.items()
            if layer.lower() in name.lower().replace("_", "")  # also SyncBatchNorm, BatchNorm2d and batch_norm
        ]
        raise AttributeError("".join([f"module 'jaxbn' has no attribute {name!r}", *cures]))

    def __dir__():
        return sorted({*globals(), *_LAZY})
