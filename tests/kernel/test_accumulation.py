"""Microbatches, however a batch is cut and masked, leave the running statistics that the whole batch leaves."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn

EPS32 = float(np.finfo(np.float32).eps)
ROWS = 24
PARTS = 8
STATE = jaxbn.BatchNormState(jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, 2.0, 0.5]), jnp.array(3, jnp.int32))

# Where the batch is cut: into equal parts, and anywhere, which leaves some parts empty.
EQUAL = st.sampled_from([1, 2, 3, 4, 6, 8]).map(lambda parts: list(range(0, ROWS, ROWS // parts))[1:])
ANYWHERE = st.lists(st.integers(0, ROWS), max_size=PARTS - 1).map(sorted)


@jax.jit
def moments_of_all(batches, masks):
    def microbatch(carry, batch):
        return carry, jaxbn.moments(batch[0], mask=batch[1])

    return jax.lax.scan(microbatch, None, (batches, masks))[1].merge_axis(0)


def cut(rows, cuts, fill):
    """The parts, all filled up to one shape, for `jax.lax.scan`; and parts of nothing up to their number."""
    parts = np.full((PARTS, *rows.shape), fill, rows.dtype)
    for part, piece in zip(parts, np.split(rows, cuts), strict=False):
        part[: len(piece)] = piece
    return jnp.asarray(parts)


@settings(max_examples=50)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.one_of(EQUAL, ANYWHERE),
    fraction=st.sampled_from([1.0, 0.6, 0.05]),
    mean=st.sampled_from([0.0, -1e3, 1e6]),
    drift=st.sampled_from([0.0, 10.0]),
    momentum=st.sampled_from([0.1, 1.0, None]),
    correction=st.sampled_from([0, 1]),
)
def test_pooled_microbatches_are_the_whole_batch(seed, cuts, fraction, mean, drift, momentum, correction):
    rng = np.random.default_rng(seed)
    x = rng.normal(mean + drift * np.arange(ROWS)[:, None], 1, (ROWS, 3)).astype(np.float32)
    mask = rng.random(x.shape) < fraction
    x[~mask] = np.nan
    options = {"momentum": momentum, "correction": correction}

    pooled = moments_of_all(cut(x, cuts, np.nan), cut(mask, cuts, False))
    actual = jaxbn.batch_norm_update(STATE, pooled, **options)
    _, expected = jaxbn.batch_norm_train(jnp.asarray(x), None, STATE, mask=jnp.asarray(mask), **options)

    assert int(actual.num_batches_tracked) == int(expected.num_batches_tracked)
    for ours, theirs in zip(actual[:2], expected[:2], strict=True):
        # Both, since what was there and what entered may cancel.
        np.testing.assert_allclose(ours, theirs, rtol=8 * EPS32, atol=8 * EPS32)
