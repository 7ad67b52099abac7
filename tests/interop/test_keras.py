"""Weights of Keras, held to what its layers are defined to compute."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from weights import SmallNNX, draw, leaves, shapes_of, small_shapes, torch_conv, torch_conv_transpose

from jaxbn.interop import (
    LoadReport,
    load_keras,
    load_torch,
)


def test_keras_names():
    weights = {
        "conv/kernel:0": draw(1, 1, 4, 2),
        "conv/bias:0": draw(2),
        "bn/gamma:0": draw(2, seed=1),
        "bn/beta:0": draw(2, seed=2),
        "bn/moving_mean:0": draw(2, seed=3),
        "bn/moving_variance:0": draw(2, seed=4),
        "head/kernel:0": draw(2, 3),
        "head/bias:0": draw(3),
    }
    for target in (small_shapes(), SmallNNX()):
        filled, report = load_keras(weights, target)
        assert report == LoadReport(report.used, {}, (), (), {})
        found = leaves(filled)
        for path, name in report.used.items():
            key = next(key for key in found if key.endswith("".join(f"['{part}']" for part in path.split("/"))))
            np.testing.assert_array_equal(found[key], weights[f"{name}:0"])
    with pytest.raises(ValueError, match="bn/bias: expected 'bn/bias' or 'bn/beta' in the source, got no such name"):
        load_keras({k: v for k, v in weights.items() if "beta" not in k}, small_shapes())


@pytest.mark.parametrize("name", ["depthwise_kernel", "kernel"])
def test_keras_depthwise(name):
    x, kernel = draw(2, 5, 5, 3), draw(3, 3, 3, 2, seed=1)
    # Output channel k * multiplier + m is the m-th filter of input channel k.
    weight = np.moveaxis(kernel, (2, 3), (0, 1)).reshape(6, 1, 3, 3)
    expected = torch_conv(*map(np.float64, (np.moveaxis(x, -1, 1), weight)), groups=3)
    layer = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3, use_bias=False)
    variables, _ = load_keras(
        {f"dw/{name}": kernel},
        shapes_of(layer, jnp.asarray(x)),
        {"": "dw"},
        kinds={"": "depthwise"} if name == "kernel" else None,
    )
    np.testing.assert_allclose(layer.apply(variables, x), np.moveaxis(expected, 1, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("load", "layer", "weights", "message"),
    [
        (
            load_keras,
            nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False),
            {"c/kernel": draw(3, 3, 3, 2)},
            "expected 'c/kernel' with shape (3, 3, 1, 6), got (3, 3, 3, 2); "
            "pass kinds={'': 'depthwise'} if the layer is a depthwise convolution",
        ),
        (
            load_torch,
            nn.Dense(5, use_bias=False),
            {"c.weight": draw(3, 5)},
            "expected 'c.weight' with shape (5, 3), got (3, 5); "
            "pass kinds={'': 'as_is'} if its axes are in Flax's order",
        ),
    ],
)
def test_kernels_that_lie_otherwise(load, layer, weights, message):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(weights, shapes_of(layer, jnp.zeros((1, 4, 4, 3))), {"": "c"})
    assert str(error.value) == f"{load.__name__}: 1 problem, nothing was loaded\n  kernel: {message}"
    kind = message.split("': '")[1].split("'")[0]
    load(weights, shapes_of(layer, jnp.zeros((1, 4, 4, 3))), {"": "c"}, kinds={"": kind})


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_keras_conv_transpose(transpose_kernel):
    x, kernel = draw(2, 4, 4, 3), draw(3, 2, 3, 3, seed=1)  # [*window, out, in]
    expected = torch_conv_transpose(*map(np.float64, (np.moveaxis(x, -1, 1), np.moveaxis(kernel, (3, 2), (0, 1)))), 2)
    layer = nn.ConvTranspose(3, (3, 2), (2, 2), padding="VALID", use_bias=False, transpose_kernel=transpose_kernel)
    variables, _ = load_keras(
        {"up/kernel": kernel},
        shapes_of(layer, jnp.asarray(x)),
        {"": "up"},
        kinds=None if transpose_kernel else {"": "conv_transpose"},
    )
    np.testing.assert_allclose(layer.apply(variables, x), np.moveaxis(expected, 1, -1), atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_separable_convolution(axes):
    """One layer of Keras with two kernels is two modules of the same name."""
    window = (3, 2)[:axes]
    x, depthwise = draw(2, *(4, 5)[:axes], 3), draw(*window, 3, 2, seed=1)
    pointwise, bias = draw(*(1,) * axes, 6, 5, seed=2), draw(5, seed=3)
    weight = np.moveaxis(depthwise, (-2, -1), (0, 1)).reshape(6, 1, *window)
    expected = np.moveaxis(torch_conv(*map(np.float64, (np.moveaxis(x, -1, 1), weight)), groups=3), 1, -1)
    expected = expected @ pointwise.reshape(6, 5) + bias

    class Separable(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, window, padding="VALID", feature_group_count=3, use_bias=False, name="depth")(x)
            return nn.Conv(5, (1,) * axes, name="point")(x)

    weights = {"sep/depthwise_kernel": depthwise, "sep/pointwise_kernel": pointwise, "sep/bias": bias}
    shapes = shapes_of(Separable(), jnp.asarray(x))
    for names in ({"depth": "sep", "point": "sep"}, lambda path: "sep"):
        variables, report = load_keras(weights, shapes, names)
        np.testing.assert_allclose(Separable().apply(variables, x), expected, rtol=1e-4, atol=1e-5)
        assert report.used["point/kernel"] == "sep/pointwise_kernel"
    one = {"params": {name: {"kernel": jnp.zeros((1, 1, 1, 1))} for name in ("depth", "point")}}
    kernels = {f"sep/{name}_kernel": draw(1, 1, 1, 1, seed=i) for i, name in enumerate(("depthwise", "pointwise"))}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_keras(kernels, one, {"depth": "sep", "point": "sep"})
    assert str(error.value) == (
        "load_keras: 2 problems, nothing was loaded\n"
        "  depth/kernel, point/kernel: expected a name for each, got 'sep/depthwise_kernel' for all\n"
        "  sep/pointwise_kernel: expected a leaf of the target to take it, got none"
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_slope_of_all_channels(shape):
    layer, alpha = nn.PReLU(), np.asarray(draw(*shape))
    variables, _ = load_keras({"p/alpha": alpha}, shapes_of(layer, jnp.zeros((1, 2))), {"": "p"})
    assert variables["params"]["negative_slope"] == alpha.reshape(())
