"""Weights that PyTorch stores in parts: by the definition, in float64, and live where torch is installed."""

import flax.linen as nn
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import assert_same_bits, draw, shapes_of

from jaxbn.interop import load_torch, to_torch

WAYS = [("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")]
SPECTRAL = [
    ("weight_orig", "weight_u", "weight_v"),
    ("parametrizations.weight.original", "parametrizations.weight.0._u", "parametrizations.weight.0._v"),
]


class Net(nn.Module):
    transposed: bool = False

    @nn.compact
    def __call__(self, x):
        if self.transposed:
            x = nn.ConvTranspose(4, (2, 2), (2, 2), padding="VALID", transpose_kernel=True, name="conv")(x)
        else:
            x = nn.Conv(4, (2, 2), padding="VALID", name="conv")(x)
        return nn.Dense(5, use_bias=False, name="fc")(x)


IMAGES = jnp.zeros((1, 3, 3, 4))


def loaded(weights, net=None, **options):
    """The weights that the network has, as those of PyTorch."""
    rest = {"conv.bias": draw(4), "conv.weight": draw(4, 4, 2, 2), "fc.weight": draw(5, 4)}
    own = {name.partition(".")[0] for name in weights}
    source = weights | {name: v for name, v in rest.items() if name.partition(".")[0] not in own or "bias" in name}
    variables, report = load_torch(source, shapes_of(net or Net(), IMAGES), **options)
    assert report.left_over == ()
    return to_torch(variables, report.used)


def norm(v, axes):
    return np.sqrt((np.float64(v) ** 2).sum(axes, keepdims=True))


@pytest.mark.parametrize("ends", WAYS)
@pytest.mark.parametrize("dim", [0, 1, 3, None])
def test_weight_norm(ends, dim):
    v = draw(4, 4, 2, 2)
    axes = tuple(i for i in range(4) if i != dim)
    g = draw(*(n if i == dim else 1 for i, n in enumerate(v.shape)), seed=1) if dim is not None else draw(seed=1)
    weights = loaded({f"conv.{ends[0]}": np.asarray(g), f"conv.{ends[1]}": v})
    np.testing.assert_array_equal(weights["conv.weight"], (v * (np.float64(g) / norm(v, axes))).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_dtype_of_the_checkpoint(dtype):
    g, v = draw(5, 1, dtype=dtype), draw(5, 4, dtype=dtype, seed=1)
    weights = {"fc.weight_g": g, "fc.weight_v": v}
    expected = (np.float64(v) * (np.float64(g) / norm(v, 1))).astype(dtype)
    assert_same_bits({"w": loaded(weights, cast=True)["fc.weight"]}, {"w": expected.astype(np.float32)})
    with pytest.raises(
        ValueError, match=r"fc/kernel: expected 'fc.weight' of dtype float32, got \w*float16; pass cast"
    ):
        loaded(weights)


def power(matrix, steps=30):
    u = np.ones(len(matrix))
    for _ in range(steps):
        v = matrix.T @ u / np.linalg.norm(matrix.T @ u)
        u = matrix @ v / np.linalg.norm(matrix @ v)
    return np.float32(u), np.float32(v)


@pytest.mark.parametrize("ends", SPECTRAL)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4, 2, 2), (5, 4)])
def test_spectral_norm(ends, dim, shape):
    """With four inputs and four outputs only the vectors show which axis has the rows."""
    weight, name = draw(*shape), "conv" if len(shape) == 4 else "fc"
    matrix = np.float64(np.moveaxis(weight, dim, 0).reshape(shape[dim], -1))
    u, v = power(matrix)
    weights = loaded({f"{name}.{end}": x for end, x in zip(ends, (weight, u, v), strict=True)}, Net(dim == 1))
    np.testing.assert_allclose(weights[f"{name}.weight"], weight / (np.float64(u) @ matrix @ v), rtol=1e-6)


def test_pruned():
    weight, mask = draw(5, 4), np.float32(draw(5, 4, seed=1) > 0)
    weights = loaded({"fc.weight_orig": weight, "fc.weight_mask": mask})
    np.testing.assert_array_equal(weights["fc.weight"], np.where(mask > 0, weight, 0))


def test_a_target_with_the_parts_gets_the_parts():
    """Names for the parts are names as all others."""
    target = {"params": {"fc": {"direction": jnp.zeros((5, 4)), "magnitude": jnp.zeros((5, 1))}}}
    weights = {"fc.weight_g": draw(5, 1), "fc.weight_v": draw(5, 4)}
    names = {"fc/direction": "fc.weight_v", "fc/magnitude": "fc.weight_g"}
    filled, _ = load_torch(weights, target, names)
    assert_same_bits(dict(sorted(to_torch(filled, names).items())), weights)


@pytest.mark.parametrize(
    ("weights", "lines"),
    [
        (
            {"fc.weight_g": draw(4, 1), "fc.weight_v": draw(5, 4)},
            [
                "fc/kernel: expected fc.weight_g, fc.weight_v to determine a weight, got parts that do not: g has "
                "shape (4, 1), which is not that of a norm of v, (5, 4)"
            ],
        ),
        (
            {"fc.weight_orig": draw(5, 4), "fc.weight_u": draw(3), "fc.weight_v": draw(4)},
            [
                "fc/kernel: expected fc.weight_orig, fc.weight_u, fc.weight_v to determine a weight, got parts that do "
                "not: vectors have shapes (3,) and (4,), which do not fit the weight, (5, 4)"
            ],
        ),
        (
            {"conv.weight_orig": draw(4, 4, 2, 2), "conv.weight_u": draw(4, seed=1), "conv.weight_v": draw(16, seed=2)},
            [
                "conv/kernel: expected conv.weight_orig, conv.weight_u, conv.weight_v to determine a weight, got parts "
                "that do not: its vectors do not show along which axis of the weight its rows are"
            ],
        ),
    ],
)
def test_parts_that_do_not_fit(weights, lines):
    cure = (
        "; save the checkpoint after torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
        "remove_spectral_norm"
    )
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        loaded(weights)
    assert str(error.value).split("\n  ")[1:] == [line + cure for line in lines]


@pytest.mark.parametrize(
    "names",
    [
        ("fc.weight_v",),
        ("fc.parametrizations.weight.original", "fc.parametrizations.weight.0.base"),
        # Two parametrizations, one after the other.
        (
            "fc.parametrizations.weight.original0",
            "fc.parametrizations.weight.original1",
            "fc.parametrizations.weight.1._u",
        ),
    ],
)
def test_parts_that_are_not_known(names):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        loaded({name: draw(5, 4) for name in names})
    assert str(error.value).split("\n  ")[1:] == [
        "fc/kernel: expected 'fc.weight' in the source, got no such name",
        *(
            f"{name}: expected a leaf of the target to take it, got none; it is of a weight that is computed from "
            "several entries, not all of which are known; save the checkpoint after torch.nn.utils.parametrize."
            "remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove"
            for name in names
        ),
    ]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("way", ["weight_norm", "spectral_norm", "old_weight_norm", "old_spectral_norm", "prune"])
@pytest.mark.parametrize("transposed", [False, True])
def test_installed_torch(way, transposed):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import parametrizations, prune

    torch.manual_seed(0)
    conv = torch.nn.ConvTranspose2d(4, 4, 2, 2) if transposed else torch.nn.Conv2d(4, 4, 2)
    net = torch.nn.ModuleDict({"conv": conv, "fc": torch.nn.Linear(4, 5, bias=False)})
    wrap = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old_weight_norm": torch.nn.utils.weight_norm,
        "old_spectral_norm": torch.nn.utils.spectral_norm,
        "prune": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    }[way]
    for layer in net.values():
        wrap(layer)
    for _ in range(20):
        net["fc"](net["conv"](torch.randn(2, 4, 3, 3)).moveaxis(1, -1))
    net.eval()
    x = torch.randn(2, 4, 3, 3)
    expected = net["fc"](net["conv"](x).moveaxis(1, -1)).detach().numpy()
    model = Net(transposed)
    variables, report = load_torch(net.state_dict(), shapes_of(model, IMAGES))
    np.testing.assert_allclose(model.apply(variables, jnp.moveaxis(x.numpy(), 1, -1)), expected, rtol=1e-4, atol=1e-5)
    assert report.used["fc/kernel"] == "fc.weight"
