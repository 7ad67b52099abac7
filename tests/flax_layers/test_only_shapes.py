"""Where only shapes are used, one value per statistic is enough, and mapped axes need not be bound."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx

ONE = jnp.ones((1, 4))
# Of the layers for which one value per statistic is an error.
LAYERS = {
    "BatchNorm": {},
    "BatchRenorm": {"limits": (3.0, 5.0)},
    "GroupNorm": {"num_groups": 4},
    "InstanceNorm": {},
}
OPTIONS = [
    *((name, {}) for name in LAYERS),
    *((name, {"axis_name": "devices"}) for name in ("BatchNorm", "LayerNorm", "GroupNorm")),
    ("BatchNorm", {"momentum": None, "virtual_batch_size": 2}),
]
PER_CHANNEL = (
    "x: expected more than 1 value per channel to take batch statistics over, got shape (1, 4), 1 value for each of 4 "
    "channels, whose normalized value would always be 0; use a larger batch, or normalize by running statistics "
    "(batch_norm_eval; use_running_average=True in a layer)"
)


def network(name, options):
    rngs = nnx.Rngs(0)
    norm = getattr(jaxbn.nnx, name)(4, **LAYERS.get(name, {}), **options, rngs=rngs)
    return nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), norm)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_tabulate(name, options):
    model = network(name, options)
    before = jax.tree.map(jnp.copy, nnx.state(model))
    table = nnx.tabulate(model, ONE, console_kwargs={"width": 200})
    assert name in table
    assert table.count("[1,4]") >= 6
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    # The network itself is as strict as before.
    if name in LAYERS and not options:
        with pytest.raises(ValueError, match=r"^x: expected more than 1 value"):
            model(ONE)


@pytest.mark.slow
def test_tabulate_with_flops_and_domains():
    model = jaxbn.nnx.BatchNorm(4, num_domains=2, rngs=nnx.Rngs(0))
    assert "BatchNorm" in nnx.tabulate(model, ONE, domain=1, compute_flops=True, console_kwargs={"width": 200})


def test_a_step_is_as_strict_after_tabulating():
    model = network("BatchNorm", {})
    nnx.tabulate(model, ONE)
    for call in (model, nnx.jit(lambda x: model(x)), lambda x: nnx.eval_shape(lambda x: model(x), x)):
        with pytest.raises(ValueError, match="expected more than 1 value") as error:
            call(ONE)
        assert str(error.value) == PER_CHANNEL


@pytest.mark.parametrize("name", LAYERS)
def test_nnx_layers_in_a_linen_network(name):
    layer = nnx.bridge.to_linen(getattr(jaxbn.nnx, name), 4, **LAYERS[name])
    model = nn.Sequential([nn.Dense(4), layer])
    variables = model.init(jax.random.key(0), ONE)
    with pytest.raises(ValueError, match="expected more than 1 value"):
        model.apply(variables, ONE, mutable=["batch_stats"])


def test_linen_layers_in_an_nnx_network():
    class Net(nnx.Module):
        def __init__(self):
            self.linen = nnx.bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0))
            self.norm = jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(self.linen(x))

    model = nnx.bridge.lazy_init(Net(), ONE)
    assert model(jnp.arange(8.0).reshape(2, 4)).shape == (2, 4)
    with pytest.raises(ValueError, match="expected more than 1 value"):
        model(ONE)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "GroupNorm"])
def test_linen_tabulate(name):
    options = {"use_running_average": False} if name == "BatchNorm" else LAYERS.get(name, {})
    layer = getattr(jaxbn.linen, name)(**options, axis_name="devices")
    assert name in nn.tabulate(layer, jax.random.key(0), console_kwargs={"width": 200})(ONE)
