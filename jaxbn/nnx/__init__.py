"""The norms as Flax NNX modules: variables in, function, variables out.

`from jaxbn.nnx import BatchNorm` takes the place of `flax.nnx.BatchNorm`, and so do LayerNorm, RMSNorm,
GroupNorm and InstanceNorm: the same arguments, the same variables, the same checkpoints. Note Flax's
meaning of `momentum`: it is the *decay* of the running statistics, one minus what PyTorch and
`jaxbn.batch_norm_train` call momentum.
"""

from jaxbn._extras import needs_flax

with needs_flax("jaxbn.nnx"):
    from jaxbn.nnx._batch_norm import BatchNorm as BatchNorm
    from jaxbn.nnx._batch_renorm import BatchRenorm as BatchRenorm
    from jaxbn.nnx._fixed import fix_statistics as fix_statistics
    from jaxbn.nnx._fixed import release_statistics as release_statistics
    from jaxbn.nnx._replace import replace_batch_norms as replace_batch_norms
    from jaxbn.nnx._sample_norms import GroupNorm as GroupNorm
    from jaxbn.nnx._sample_norms import InstanceNorm as InstanceNorm
    from jaxbn.nnx._sample_norms import LayerNorm as LayerNorm
    from jaxbn.nnx._sample_norms import RMSNorm as RMSNorm
