"""Folds the batch norms of a trained network into the layers beside them, for evaluation.

Needs flax. docs/folding.md shows how to use it.
"""

from jaxbn._extras import needs_flax
from jaxbn._statistics.fold_batch_norm import fold_batch_norm as fold_batch_norm

with needs_flax("jaxbn.fold"):
    from jaxbn.fold._linen import apply_folded as apply_folded
    from jaxbn.fold._linen import fold_linen as fold_linen
    from jaxbn.fold._linen import propose_linen as propose_linen
    from jaxbn.fold._nnx import Identity as Identity
    from jaxbn.fold._nnx import fold_nnx as fold_nnx
    from jaxbn.fold._nnx import propose_nnx as propose_nnx
    from jaxbn.fold._pairs import Pairs as Pairs
