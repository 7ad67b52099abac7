"""What tests of `jaxbn.recalibrate` have in common: data, and a network of two norms with its statistics."""

import jax
import numpy as np

import jaxbn

EPS = 1e-5
SIZES = (8, 4, 8, 8)
RNG = np.random.default_rng(0)
DATA = [RNG.standard_normal((n, 3)).astype(np.float32) * 2 + 1 for n in SIZES]
# Where the shapes of batches are not the matter: one compilation.
EVEN = [DATA[0], *DATA[2:]]
WEIGHTS = [RNG.standard_normal((3, 3)).astype(np.float32) for _ in range(3)]


def close(actual, expected, rtol=2e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=rtol)


def oracle(method, batches=None, correction=(0, 0)):
    """Means and variances of the inputs of two norms, in float64: x @ W0, norm, relu(.) @ W1, norm."""
    batches = [np.asarray(x, np.float64) @ WEIGHTS[0] for x in batches or DATA]
    results = []
    for weights, ddof in zip((WEIGHTS[1], None), correction, strict=True):
        x = np.concatenate(batches)
        results.append((x.mean(0), x.var(0, ddof=ddof)))
        if weights is not None:
            means = [results[0] if method == "layerwise" else (b.mean(0), b.var(0)) for b in batches]
            batches = [
                np.maximum((b - mean) / np.sqrt(var + EPS), 0) @ weights
                for b, (mean, var) in zip(batches, means, strict=True)
            ]
    return results


def measure_layerwise(states, x):
    x = x @ WEIGHTS[0]
    first = jaxbn.moments(x)
    x, _ = jaxbn.batch_norm_eval(x, None, states["a"])
    return {"a": first, "b": jaxbn.moments(jax.nn.relu(x) @ WEIGHTS[1])}


def measure_batchwise(states, x):
    x = x @ WEIGHTS[0]
    first = jaxbn.moments(x)
    x, _ = jaxbn.batch_norm_train(x, None, None)
    return {"a": first, "b": jaxbn.moments(jax.nn.relu(x) @ WEIGHTS[1])}


def fresh():
    return {name: jaxbn.batch_norm_init(3)[1] for name in "ab"}


STATE = fresh()["a"]
