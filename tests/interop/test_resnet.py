"""Whole networks against PyTorch: what it once returned, and what it returns where it is installed."""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make_torch_resnet import CLASSES, NETWORKS, PATH, build, make_input, randomize, read, record
from weights import (
    assert_same_bits,
)

from jaxbn.interop import (
    load_torch,
    to_torch,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from _resnet import LinenResNet, NNXResNet, torch_name

# Both sides round to float32 in their own order, through up to twenty layers.
LOGITS_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        arrays = dict(file)
    return {name: read(arrays, name) for name in NETWORKS}


@functools.cache
def linen_forward(name):
    model = LinenResNet(*NETWORKS[name], CLASSES)

    @jax.jit
    def forward(variables, x):
        logits = model.apply(variables, x, train=False)
        train_logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, train_logits, {**variables, **updates}

    return model, forward


def nnx_shapes(name):
    return nnx.eval_shape(lambda: NNXResNet(*NETWORKS[name], CLASSES, nnx.Rngs(0)))


@functools.cache
def nnx_forward(name):
    @jax.jit
    def forward(graph, state, x):
        model = nnx.merge(graph, state)
        model.eval()
        logits = model(x)
        model.train()
        return logits, model(x), nnx.state(model)

    return forward


def images(x):
    return jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32) / 255


def check_linen(name, weights, expected):
    model, forward = linen_forward(name)
    x = images(expected["x"])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables, report = load_torch(weights, shapes, torch_name)
    logits, train_logits, trained = forward(variables, x)
    check_results(expected, report, logits, train_logits, to_torch(trained, torch_name))
    return to_torch(variables, torch_name, counters=report.counters)


def check_nnx(name, weights, expected):
    model, report = load_torch(weights, nnx_shapes(name))
    logits, train_logits, trained = nnx_forward(name)(*nnx.split(model), images(expected["x"]))
    back = to_torch(model, counters=report.counters)
    nnx.update(model, trained)
    check_results(expected, report, logits, train_logits, to_torch(model))
    return back


CHECKS = {"linen": check_linen, "nnx": check_nnx}


def check_results(expected, report, logits, train_logits, trained):
    counters = {name for name in expected["state_dict"] if name.endswith("tracked")}
    assert set(report.counters) == counters
    assert not report.missing
    assert not report.left_over
    assert not report.kept
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(train_logits, expected["train_logits"], rtol=0, atol=LOGITS_TOLERANCE)
    for name, value in expected["trained"].items():
        if name not in counters:
            np.testing.assert_allclose(trained[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flax"), [("basic", "linen"), ("bottleneck", "nnx")])
def test_resnet_on_record(golden, name, flax):
    back = CHECKS[flax](name, golden[name]["state_dict"], golden[name])
    assert_same_bits(dict(sorted(back.items())), dict(sorted(golden[name]["state_dict"].items())))


@pytest.mark.parametrize("flax", CHECKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_resnet_of_installed_torch(name, flax):
    torch = pytest.importorskip("torch")
    model = randomize(build(NETWORKS[name]), seed=7)
    weights = {key: v.clone() for key, v in model.state_dict().items()}
    expected = record(model, make_input())
    back = CHECKS[flax](name, weights, read({f"{name}/{k}": v for k, v in expected.items()}, name))
    model.load_state_dict({key: torch.from_numpy(v) for key, v in back.items()}, strict=True)
    assert all((v == weights[key]).all() for key, v in model.state_dict().items())
