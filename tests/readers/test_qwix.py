"""qwix quantizes networks with the library's layers as it does those with Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxbn.linen
import jaxbn.nnx

qwix = pytest.importorskip("qwix")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

C = 8
RULES = [qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=jnp.int8)]
OPTIONS = {"BatchNorm": {}, "LayerNorm": {}, "GroupNorm": {"num_groups": 4}, "RMSNorm": {}, "InstanceNorm": {}}
X = jax.random.normal(jax.random.key(0), (4, 8, 8, C))


@pytest.fixture(autouse=True)
def lax_rules():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def edge_provider():
    """As in docs/quantization.md."""
    provider = qwix.OdmlQatProvider(RULES)
    for name in ("linen.BatchNorm", "linen.LayerNorm", "linen.GroupNorm", "nnx.BatchNorm"):
        provider._ops[f"jaxbn.{name}.__call__"] = provider._ops[f"flax.{name}.__call__"]
    return provider


PROVIDERS = {
    "training": lambda: qwix.QtProvider(RULES),
    "after training": lambda: qwix.PtqProvider(RULES),
    "edge": edge_provider,
}


def cases(*edge):
    """All norms with each provider; with the last those of Flax that it has rules for."""
    return pytest.mark.parametrize(
        ("provider", "name"), [(p, name) for p in PROVIDERS for name in (edge if p == "edge" else OPTIONS)]
    )


class LinenNet(linen.Module):
    norms: object
    name_of_norm: str

    @linen.compact
    def __call__(self, x):
        options = {"use_running_average": False} if self.name_of_norm == "BatchNorm" else OPTIONS[self.name_of_norm]
        x = linen.Conv(C, (3, 3), use_bias=False)(x)
        x = linen.relu(getattr(self.norms, self.name_of_norm)(name="norm", **options)(x))
        return linen.Dense(5)(x.mean((1, 2)))


class NNXNet(nnx.Module):
    def __init__(self, norms, name):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(C, C, (3, 3), use_bias=False, rngs=rngs)
        self.norm = getattr(norms, name)(C, **OPTIONS[name], rngs=rngs)
        self.last = nnx.Linear(C, 5, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


def assert_near(actual, expected):
    """Values are rounded to 8 bits, and one that is near the middle may be rounded either way."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@cases("BatchNorm", "LayerNorm", "GroupNorm")
def test_linen(provider, name):
    def run(norms):
        model = qwix.quantize_model(LinenNet(norms, name), PROVIDERS[provider]())
        variables = model.init(jax.random.key(1), X)
        if provider == "after training":
            return model.apply(variables, X, mutable="batch_stats")

        def loss(params):
            y, updates = model.apply({**variables, "params": params}, X, mutable=True)
            return jnp.sum(y**2), (y, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    assert_near(run(jaxbn.linen), run(linen))


@cases("BatchNorm")
def test_nnx(provider, name):
    def run(norms):
        model = qwix.quantize_model(NNXNet(norms, name), PROVIDERS[provider](), X)
        if provider == "after training":
            return model(X)
        gradient, y = nnx.grad(lambda model: (jnp.sum((y := model(X)) ** 2), y), has_aux=True)(model)
        return y, nnx.to_pure_dict(gradient), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    assert_near(run(jaxbn.nnx), run(nnx))
