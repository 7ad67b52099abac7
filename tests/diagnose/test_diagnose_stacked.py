"""Layers that are stacked along first axes, by loops and mapped models, are judged one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diagnosis import C
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose_linen, diagnose_nnx, diagnose_statistics

M, D = 2, 3
RNG = np.random.default_rng(0)
MEAN, VAR = RNG.normal(1, 1, (M, D, C)), RNG.uniform(0.5, 2, (M, D, C))
COUNT = np.full((M, D), 300)
PATHS = [f"norm[{m}, {d}]" for m in range(M) for d in range(D)]


def stack(mean=MEAN, var=VAR, count=COUNT, **others):
    return {"norm": {"mean": mean, "var": var, "num_batches_tracked": count, **others}}


def changed(array, index, value):
    copy = np.array(array)
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("tree", "kind", "path"),
    [
        (stack(changed(MEAN, (1, 2), 0), changed(VAR, (1, 2), 1)), "untouched", "norm[1, 2]"),
        (stack(count=changed(COUNT, (0, 1), 2)), "initial_weight", "norm[0, 1]"),
        (stack(scale=changed(np.ones((M, D, C)), (1, 0), 0)), "zero_scale", "norm[1, 0]"),
        # One affine function for each model, and one for all.
        (stack(scale=changed(np.ones((M, C)), 1, 0)), "zero_scale", ["norm[1, 0]", "norm[1, 1]", "norm[1, 2]"]),
        (stack(scale=np.zeros(C)), "zero_scale", PATHS),
        (stack(MEAN[1], changed(VAR[1], (2, 3), -1), COUNT[1]), "negative_variance", "norm[2]"),
    ],
)
def test_a_fault_in_one_of_several_layers(tree, kind, path):
    report = diagnose_statistics(tree, decay=0.9)
    assert {(f.kind, f.layer) for f in report.findings} == {(kind, p) for p in np.atleast_1d(path)}


def test_each_layer_has_its_own_statistics_and_channels():
    state = jaxbn.BatchNormState(jnp.asarray(MEAN).at[1, 2, 3].set(jnp.nan), jnp.asarray(VAR), jnp.asarray(COUNT))
    report = diagnose_statistics({"norm": state}, decay=0.9)
    assert [layer.path for layer in report.layers] == PATHS
    np.testing.assert_allclose([layer.var for layer in report.layers], VAR.reshape(-1, C), rtol=1e-6)
    (found,) = report.findings
    assert (found.layer, found.evidence) == ("norm[1, 2]", f"mean is NaN or infinite in 1 of {C} channels (3)")


@pytest.mark.parametrize("count", [None, np.array(300), np.array([300])], ids=["none", "scalar", "one"])
def test_without_a_count_for_each_all_are_channels_of_one_layer(count):
    (layer,) = diagnose_statistics(stack(count=count), decay=0.9).layers
    assert (layer.path, layer.mean.size, layer.seen) == ("norm", M * D * C, None if count is None else 300)


def test_counts_along_other_axes_are_an_error():
    with pytest.raises(ValueError, match="norm: ") as raised:
        diagnose_statistics(stack(count=COUNT.T))
    assert str(raised.value) == (
        "norm: expected num_batches_tracked to be one number, or one for each of several layers along the first axes "
        "of mean, shape (2, 3, 6), got shape (3, 2); move the axes of layers to the front, or give one number"
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_replicas_of_stacked_layers(axis):
    """Devices disagree about one layer; their axis may be any before the channels."""
    spread = np.zeros((2, M, D, 1))
    spread[:, 1, 2] = [[-1], [1]]
    axis_from_0 = axis % 4
    tree = stack(*(np.moveaxis(v, 0, axis_from_0) for v in (MEAN + spread, np.stack([VAR, VAR]))))
    tree["norm"]["num_batches_tracked"] = np.moveaxis(np.stack([COUNT - 1, COUNT]), 0, axis_from_0)
    report = diagnose_statistics(tree, replica_axis=axis)
    assert [(layer.path, layer.seen) for layer in report.layers] == [(path, 300) for path in PATHS]
    (found,) = report.findings
    assert (found.kind, found.layer) == ("replicas", "norm[1, 2]")
    np.testing.assert_allclose(found.numbers["disagreement"], 1 / np.sqrt(VAR[1, 2].min() + 1e-5))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class Models(nn.Module):
    """A loop in each of several models."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        loop = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=D)
        return nn.vmap(loop, variable_axes=axes, split_rngs={"params": True}, in_axes=(0, None))(name="norms")(x, None)


class NnxModels(nnx.Module):
    def __init__(self):
        @nnx.vmap
        @nnx.vmap
        def make(rngs):
            return jaxbn.nnx.BatchNorm(C, use_running_average=True, rngs=rngs)

        self.norms = make(nnx.Rngs(params=jax.random.split(jax.random.key(0), (M, D))))

    def __call__(self, x):
        return nnx.vmap(nnx.vmap(lambda norm, x: norm(x)), in_axes=(0, 0))(self.norms, x)


def test_a_loop_in_each_of_several_models():
    """Flax's layers have no count, but the model tells which axes are those of layers."""
    x = np.asarray(RNG.normal(1, 2, (M, 32, C)), np.float32)
    # A loop's first layer standardizes, so the inputs of the others have mean 0 and variance 1.
    stats = {"mean": np.full((M, D, C), 1e-3, np.float32), "var": np.ones((M, D, C), np.float32)}
    stats["mean"][:, 0], stats["var"][:, 0] = x.mean(1), x.var(1)
    stats["mean"][1, 0] += 3
    variables = Models().init(jax.random.key(0), x)
    variables = {**variables, "batch_stats": {"norms": {"norm": stats}}}
    report = diagnose_linen(Models(), variables, x, steps=100, train_batch_size=64)
    assert [layer.path for layer in report.layers] == [f"norms/{path}" for path in PATHS]
    assert [layer.seen for layer in report.layers] == [100] * 6
    assert {(f.kind, f.layer) for f in report.errors} == {(kind, "norms/norm[1, 0]") for kind in ("drift", "parting")}
    mean, var, _ = oracle.moments(x[1])
    np.testing.assert_allclose(report.layers[D].shift, np.abs(mean - stats["mean"][1, 0]) / np.sqrt(var + 1e-5), 1e-4)


def test_mapped_models_of_mapped_layers():
    x = np.asarray(RNG.normal(1, 2, (M, D, 32, C)), np.float32)
    model = NnxModels()
    mean, var = x.mean(2), x.var(2)
    mean[1, 2] = 0
    var[1, 2] = 1
    model.norms.mean[...] = jnp.asarray(mean)
    model.norms.var[...] = jnp.asarray(var)
    report = diagnose_nnx(model, x)
    assert [layer.path for layer in report.layers] == [path.replace("norm", "norms") for path in PATHS]
    assert [(f.kind, f.layer) for f in report.errors] == [("untouched", "norms[1, 2]"), ("parting", "norms[1, 2]")]
