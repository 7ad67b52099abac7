"""What docs/norms.md and the README say of other libraries is true of those that are installed."""

import inspect
import itertools
import os
import pathlib
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.linen

ROOT = pathlib.Path(__file__).parents[2]
SHAPE = 4, 5, 6  # N, W, C
X = 2 + 3 * np.random.default_rng(0).standard_normal(SHAPE, np.float32)
PARAMS = jaxbn.affine_init(SHAPE[-1])
STATE = jaxbn.batch_norm_init(SHAPE[-1])[1]
LIMITS = {"r_max": 1.1, "d_max": 0.2}
FUNCTIONS = {
    "batch_norm_*": lambda eps: jaxbn.batch_norm_train(X, PARAMS, STATE, eps=eps)[0],
    "layer_norm": lambda eps: jaxbn.layer_norm(X, PARAMS, eps=eps),
    "rms_norm": lambda eps: jaxbn.rms_norm(X, PARAMS, eps=eps),
    "group_norm": lambda eps: jaxbn.group_norm(X, PARAMS, 3, eps=eps),
    "instance_norm_*": lambda eps: jaxbn.instance_norm_train(X, PARAMS, None, eps=eps)[0],
    "batch_renorm_train": lambda eps: jaxbn.batch_renorm_train(X, PARAMS, STATE, eps=eps, **LIMITS)[0],
}
# What the arguments in docs/norms.md stand for.
ARGUMENTS = {"(shape)": (6,), "(groups, C)": (3, 6), "(groups=32)": (3,), "(num_groups=32)": (3,), "(axis)": (-1,)}
ARGUMENTS |= {"(groups=-1)": (-1,), "(renorm=True)": ()}


def table(text, after):
    """Returns the rows of the next table as dicts, by the names of its columns."""
    lines = itertools.dropwhile(lambda line: line[:1] != "|", text.partition(after)[2].splitlines())
    lines = itertools.takewhile(lambda line: line[:1] == "|", lines)
    names, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [dict(zip(names, row, strict=True)) for row in rows]


ROWS = {row["here"].strip("`"): row for row in table((ROOT / "docs" / "norms.md").read_text(), "## The same in other")}


def cell(name, column):
    """Returns the layer's name and arguments, and its default of epsilon, as the documentation states them."""
    found = re.match(r"(?:only here: )?`(\w+)(\([^)]*\))?`.*: (?:None, which is )?([\d.e-]+)$", ROWS[name][column])
    return found[1], ARGUMENTS.get(found[2], ()), float(found[3])


def options(layer):
    return inspect.signature(layer).parameters


@pytest.mark.parametrize("name", FUNCTIONS)
def test_flax(name):
    layer, arguments, eps = cell(name, "Flax, and the layers here")
    only_here = ROWS[name]["Flax, and the layers here"].startswith("only here")
    assert hasattr(flax.linen, layer) is not only_here
    extra = {"use_running_average": False} if "Batch" in layer else {}
    if name == "batch_renorm_train":
        extra["limits"] = tuple(LIMITS.values())
    for module in [jaxbn.linen] if only_here else [flax.linen, jaxbn.linen]:
        made = getattr(module, layer)(*arguments, **extra)
        variables = made.init(jax.random.key(0), X)
        y, _ = made.apply(variables, X, mutable=["batch_stats"])
        assert made.epsilon == eps
        np.testing.assert_allclose(y, FUNCTIONS[name](eps), atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch(name):
    torch = pytest.importorskip("torch")
    if ROWS[name]["PyTorch"] == "none":
        assert not [layer for layer in dir(torch.nn) if "renorm" in layer.lower()]
        return
    layer, arguments, eps = cell(name, "PyTorch")
    first = layer.startswith(("Batch", "Group", "Instance"))  # channels are on axis 1
    made = getattr(torch.nn, layer)(*(arguments or (SHAPE[-1],)))
    assert made.eps == (None if "None" in ROWS[name]["PyTorch"] else eps)
    y = made(torch.from_numpy(np.moveaxis(X, -1, 1).copy() if first else X)).detach().numpy()
    np.testing.assert_allclose(np.moveaxis(y, 1, -1) if first else y, FUNCTIONS[name](eps), atol=1e-4)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_keras(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "jax"))
    keras = pytest.importorskip("keras")
    layer, arguments, eps = cell(name, "Keras 3")
    limits = {"rmax": LIMITS["r_max"], "rmin": 1 / LIMITS["r_max"], "dmax": LIMITS["d_max"]}
    extra = {"renorm": True, "renorm_clipping": limits} if name == "batch_renorm_train" else {}
    training = {"training": True} if layer == "BatchNormalization" else {}
    made = getattr(keras.layers, layer)(*arguments, **extra)
    assert made.epsilon == eps
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        y = np.asarray(made(X, **training))
    # Keras limits by a standard deviation of 1 in place of sqrt(1 + eps) before the first step.
    np.testing.assert_allclose(y, FUNCTIONS[name](eps), atol=1e-4 if name != "batch_renorm_train" else 2 * eps)


def test_virtual_batches_are_only_here():
    assert ROWS["virtual_batch_size"]["PyTorch"] == "none"
    assert "virtual_batch_size" not in options(flax.linen.BatchNorm)
    assert "virtual_batch_size" in options(jaxbn.linen.BatchNorm)
    keras = pytest.importorskip("keras")
    assert "virtual_batch_size" not in options(keras.layers.BatchNormalization)


README = {row[""]: row for row in table((ROOT / "README.md").read_text(), "gradient of the scale 4.0")}


def equinox_norm(x, mode="batch"):
    eqx = pytest.importorskip("equinox")
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(x.shape[1], "batch", mode=mode)
    return norm, *jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)


def flax_norm(x, **more):
    norm = flax.linen.BatchNorm(use_running_average=False, **more)
    return norm.init_with_output(jax.random.key(0), x)[0]


def torch_norm(x):
    torch = pytest.importorskip("torch")
    return torch.nn.BatchNorm1d(x.shape[1])(torch.from_numpy(np.array(x))).detach().numpy()


@pytest.mark.parametrize("library", ["jaxbn", "Flax 0.12", "Equinox 0.13", "PyTorch 2.13"])
def test_exact_far_from_zero(library):
    far = 10_000 + jax.random.normal(jax.random.key(0), (4096, 1))
    error = {
        "jaxbn": lambda: jaxbn.batch_norm_train(far, None, None)[0],
        "Flax 0.12": lambda: flax_norm(far),
        "Equinox 0.13": lambda: equinox_norm(far)[1],
        "PyTorch 2.13": lambda: torch_norm(far),
    }[library]().std() - 1
    assert (abs(error) < 0.01) == (README["exact far from zero"][library] == "yes")


def test_equinox():
    """What docs/equinox.md says of its layer."""
    equinox = pytest.importorskip("equinox")
    with pytest.warns(UserWarning, match="defaults to 'ema'"):
        equinox.nn.BatchNorm(1, "batch")
    norm, _, state = equinox_norm(jnp.array([[1.0], [3.0]]))
    assert "batch" in jax.tree.leaves(norm)
    assert norm.momentum == 0.99
    # After 100 batches with a variance of 1: divided by 1 - 0.99**100, the initial variance too.
    state = state.set(norm.batch_counter, jnp.array(100))
    state = state.set(norm.batch_state_index, (jnp.zeros(1), jnp.ones(1)))
    y, _ = equinox.nn.inference_mode(norm)(jnp.ones(1), state)
    np.testing.assert_allclose(1 / y**2 - 1, 0.58, atol=0.01)


@pytest.mark.parametrize("library", ["Flax 0.12", "Equinox 0.13", "PyTorch 2.13"])
def test_masks(library):
    call = {
        "Flax 0.12": lambda: flax.linen.BatchNorm.__call__,
        "Equinox 0.13": lambda: pytest.importorskip("equinox").nn.BatchNorm.__call__,
        "PyTorch 2.13": lambda: pytest.importorskip("torch").nn.functional.batch_norm,
    }[library]()
    assert ("mask" in options(call)) == README["masks"][library].startswith("yes")


@pytest.mark.parametrize("library", ["Flax 0.12", "Equinox 0.13", "PyTorch 2.13"])
def test_running_variance(library):
    """Unbiased, and with equal weights for all batches."""
    x = jnp.array([[1.0], [3.0]])  # variance 1, unbiased 2
    if library == "Flax 0.12":
        norm = flax.linen.BatchNorm(use_running_average=False)
        _, updates = norm.apply(norm.init(jax.random.key(0), x), x, mutable=["batch_stats"])
        variance = (updates["batch_stats"]["var"] - 0.99) / 0.01
    elif library == "Equinox 0.13":
        norm, _, state = equinox_norm(x)
        variance = (state.get(norm.batch_state_index)[1] - 0.99) / 0.01
    else:
        norm = pytest.importorskip("torch").nn.BatchNorm1d(1, momentum=None)
        norm(pytest.importorskip("torch").tensor(np.array(x)))
        variance = norm.running_var.numpy()
    claimed = README["unbiased running variance, cumulative average"][library]
    np.testing.assert_allclose(variance, 2 if claimed == "yes" else 1, atol=1e-4)
