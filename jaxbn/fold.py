"""Networks for evaluation without their batch norms: each is folded into the layer beside it.

Needs flax, for whole models. How to use it is in docs/folding.md.
"""

from jaxbn._extras import needs_flax
from jaxbn._fold import fold_batch_norm as fold_batch_norm

with needs_flax("jaxbn.fold"):
    from jaxbn._fold_flow import Pairs as Pairs
    from jaxbn._fold_linen import apply_folded as apply_folded
    from jaxbn._fold_linen import fold_linen as fold_linen
    from jaxbn._fold_linen import propose_linen as propose_linen
    from jaxbn._fold_nnx import Identity as Identity
    from jaxbn._fold_nnx import fold_nnx as fold_nnx
    from jaxbn._fold_nnx import propose_nnx as propose_nnx
