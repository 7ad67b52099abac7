"""The norms as Flax Linen modules: variables in, function, variables out.

`from jaxbn.linen import BatchNorm` takes the place of `flax.linen.BatchNorm`, and so do LayerNorm,
RMSNorm, GroupNorm and InstanceNorm: the same fields, the same variables, the same checkpoints. Note
Flax's meaning of `momentum`: it is the *decay* of the running statistics, one minus what PyTorch and
`jaxbn.batch_norm_train` call momentum.
"""

from jaxbn._extras import needs_flax

with needs_flax("jaxbn.linen"):
    from jaxbn.linen._batch_norm import BatchNorm as BatchNorm
    from jaxbn.linen._batch_norm import BatchRenorm as BatchRenorm
    from jaxbn.linen._fixed import apply_fixed as apply_fixed
    from jaxbn.linen._sample_norms import GroupNorm as GroupNorm
    from jaxbn.linen._sample_norms import InstanceNorm as InstanceNorm
    from jaxbn.linen._sample_norms import LayerNorm as LayerNorm
    from jaxbn.linen._sample_norms import RMSNorm as RMSNorm
