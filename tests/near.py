"""How near results must be to what is expected, in units of precision."""

import jax
import numpy as np

EPS32 = float(np.finfo(np.float32).eps)


def assert_near(actual, expected, units=4, *, eps=EPS32, least=1.0):
    """Both are trees of one structure, and their arrays have the same shapes.

    An array may differ from what is expected by `units * eps` times the largest finite value expected, or times `least`
    if that is larger. NaN and infinity are expected where they are.
    """

    def compare(path, a, b):
        a, b = (np.asarray(v).astype(complex if np.iscomplexobj(v) else float) for v in (a, b))
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, f"{name}: expected shape {b.shape}, got {a.shape}"
        largest = np.max(np.abs(b), initial=least, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=units * eps * largest, err_msg=name)

    jax.tree.map_with_path(compare, actual, expected)
