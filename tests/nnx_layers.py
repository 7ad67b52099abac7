"""What the tests of NNX layers share."""

from flax import nnx


def make(norm, **options):
    """The layer for x with shape (6, 5, 3)."""
    return norm(5 if options.get("axis") == 1 else 3, rngs=nnx.Rngs(0), **options)


def state_of(module):
    return nnx.to_pure_dict(nnx.clone(nnx.state(module)))
