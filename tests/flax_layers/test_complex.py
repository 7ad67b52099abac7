"""Complex x: Flax's layers normalize it, and options that they do not have are errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import is_older

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C = 4
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 5, C)) + 1j * RNG.normal(size=(6, 5, C)) + 2j, jnp.complex64)
MASK = RNG.random(X.shape) < 0.7
# Flax's NNX layer stores the real part of the mean.
DROPS = pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
DROPS_IMAGINARY = pytest.mark.filterwarnings("ignore:Casting complex values to real discards the imaginary part")
LAYERS = {"BatchNorm": {}, "LayerNorm": {}, "RMSNorm": {}, "GroupNorm": {"num_groups": 2}, "InstanceNorm": {}}


@pytest.fixture(autouse=True)
def promotion():
    """Flax's layers multiply complex numbers by real ones."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def of_linen(library, name, evaluate=False, **options):
    """The output for X, and the statistics after it."""
    options |= LAYERS[name] | ({"momentum": 0.9, "use_running_average": evaluate} if name == "BatchNorm" else {})
    layer = getattr(library, name)(**options)
    variables = layer.init(jax.random.key(0), X)
    return layer.apply(variables, X, mask=MASK, mutable=["batch_stats"])


def of_nnx(library, name, evaluate=False, **options):
    layer = getattr(library, name)(C, **LAYERS[name], **options, rngs=nnx.Rngs(0))
    if evaluate:
        layer.eval()
    return layer(X, mask=MASK), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))


@DROPS_IMAGINARY
@DROPS
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("evaluate", [False, True], ids=["train", "evaluate"])
@pytest.mark.parametrize("run", [of_linen, of_nnx])
def test_every_layer_is_flax(run, name, evaluate):
    if evaluate and name != "BatchNorm":
        return
    if run is of_nnx and not hasattr(nnx, name):
        pytest.skip(f"needs flax 0.12.0: nnx.{name}")
    ours, theirs = (
        run(library, name, evaluate) for library in ((jaxbn.linen, nn) if run is of_linen else (jaxbn.nnx, nnx))
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert ours[0].dtype == jnp.complex64


@DROPS_IMAGINARY
@DROPS
def test_running_means():
    expected = 0.1 * np.asarray(X, np.complex128).mean((0, 1), where=MASK)
    of_flax = of_linen(jaxbn.linen, "BatchNorm")[1]["batch_stats"]["mean"]
    np.testing.assert_allclose(of_flax, expected, atol=1e-6)
    real = of_nnx(jaxbn.nnx, "BatchNorm", momentum=0.9)[1]["mean"]
    # Before Flax 0.12 its NNX layer stores the mean as it is.
    np.testing.assert_allclose(real, expected if is_older("flax", "0.12.0") else expected.real, atol=1e-6)


@pytest.mark.parametrize("run", [of_linen, of_nnx])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"correction": 1}, "correction"),
        ({"virtual_batch_size": 2}, "virtual_batch_size"),
        ({"num_domains": 2, "correction": 1}, "correction, num_domains"),
    ],
)
def test_options_that_flax_has_not(run, options, names):
    with pytest.raises(TypeError) as caught:
        run(jaxbn.linen if run is of_linen else jaxbn.nnx, "BatchNorm", **options)
    assert str(caught.value) == (
        f"x: expected an array of real numbers with {names}, got complex64; complex x is normalized by Flax's layer, "
        "which has no such option: leave it out, or normalize x.real and x.imag"
    )


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: jaxbn.nnx.BatchRenorm(C, limits=(1, 0), rngs=nnx.Rngs(0))(X), "limits"),
        (lambda: jaxbn.nnx.BatchNorm(C, momentum=None, rngs=nnx.Rngs(0))(X), "momentum=None"),
        (lambda: jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))(X, domain=1), "domain"),
    ],
)
def test_what_else_flax_has_not(call, name):
    with pytest.raises(TypeError, match=f"^x: expected an array of real numbers with {name}, got complex64; "):
        call()


def test_functions():
    refusal = (
        "x: expected a floating-point array, got complex64; normalize x.real and x.imag, or take a layer of Flax's "
        "names from jaxbn.linen or jaxbn.nnx, which all take complex x"
    )
    for call in (lambda: jaxbn.layer_norm(X, None), lambda: jaxbn.moments(X)):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == refusal
