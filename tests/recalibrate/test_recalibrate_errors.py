"""What recalibration refuses, in whole messages."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recalibration import DATA, STATE, fresh, measure_layerwise

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.recalibrate import recalibrate, recalibrate_linen, recalibrate_nnx


def once(items):
    yield from items


class Exhausted:
    def __init__(self):
        self.items = iter(DATA)

    def __iter__(self):
        return self.items


@pytest.mark.parametrize(
    ("measure", "states", "batches", "options", "error", "message"),
    [
        (
            None,
            STATE,
            [],
            {},
            ValueError,
            "batches: expected at least 1 batch, got none; an iterator can be iterated only once",
        ),
        (
            None,
            STATE,
            once(DATA),
            {},
            TypeError,
            "batches: expected an iterable that can be iterated several times, got generator, an iterator; pass a list "
            "or a data loader, or method='batchwise', which takes one pass",
        ),
        (
            measure_layerwise,
            fresh(),
            Exhausted(),
            {},
            ValueError,
            "batches: expected 4 batches in each sweep, got 0 in sweep 2; pass an iterable that gives all of them each "
            "time, or method='batchwise', which takes one pass",
        ),
        (
            None,
            STATE,
            DATA[0],
            {},
            TypeError,
            "batches: expected an iterable of batches, got one array of shape (8, 3); if it is one batch put it into "
            "a list: [x]",
        ),
        (
            None,
            STATE,
            {"x": DATA[0]},
            {},
            TypeError,
            "batches: expected an iterable of batches, got one dict; if it is one batch put it into a list: [batch]",
        ),
        (
            None,
            STATE,
            [{"x": DATA[0], "name": "a"}],
            {},
            TypeError,
            "batches: expected arrays in each batch, got str; leave out of the batches what the model does not take",
        ),
        (
            None,
            STATE,
            DATA,
            {"method": "both"},
            ValueError,
            "method: expected 'layerwise' or 'batchwise', got 'both'",
        ),
        (
            None,
            STATE,
            DATA,
            {"correction": -1},
            ValueError,
            "correction: expected a finite number of at least 0, got -1; 1 stores the unbiased variance (PyTorch), 0 "
            "the biased one (Flax)",
        ),
        (
            None,
            {"a": STATE, "b": jnp.ones(3)},
            DATA,
            {},
            TypeError,
            "states: expected a jaxbn.BatchNormState or a tree of them, got ArrayImpl; see batch_norm_init",
        ),
        (
            None,
            {"a": STATE._asdict()},
            DATA,
            {},
            TypeError,
            "states: expected a jaxbn.BatchNormState or a tree of them, got ArrayImpl; make it of each restored "
            "dictionary: BatchNormState(**state)",
        ),
        (
            None,
            {},
            DATA,
            {},
            TypeError,
            "states: expected a jaxbn.BatchNormState or a tree of them, got an empty tree; see batch_norm_init",
        ),
        (
            lambda states, x: [jaxbn.moments(x)],
            {"a": STATE},
            DATA,
            {},
            TypeError,
            "measure: expected a tree like states with jaxbn.Moments in place of each, PyTreeDef({'a': *}), got "
            "PyTreeDef([*])",
        ),
        (
            lambda states, x: [jaxbn.moments(x[:, :2]), jaxbn.moments(x), jaxbn.moments(x[:, :1])],
            [STATE] * 3,
            DATA,
            {},
            ValueError,
            "measure: expected moments of the shapes of the states, got states[0] (2,) for (3,), states[2] (1,) for "
            "(3,); measure along the norm's feature axes",
        ),
        (
            None,
            {"a": STATE},
            [DATA[0] * np.nan],
            {},
            ValueError,
            "states['a']: expected finite statistics, got NaN or infinity; the batches or the weights have such "
            "values, or values so large that they overflow: mask or correct them. Nothing was changed",
        ),
    ],
)
def test_errors(measure, states, batches, options, error, message):
    def everywhere(states, x):
        return jax.tree.map(lambda _: jaxbn.moments(x), states, is_leaf=lambda v: isinstance(v, jaxbn.BatchNormState))

    with pytest.raises(error) as raised:
        recalibrate(measure or everywhere, states, batches, **options)
    assert str(raised.value) == message


class Own(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, 3)
        self.variable("batch_stats", "var", jnp.ones, 3)
        return x


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        (
            lambda: nn.Dense(3),
            None,
            ValueError,
            "variables: expected a collection batch_stats with mean and var of a BatchNorm, got none; pass all "
            "of the network, statistics included",
        ),
        (
            lambda: nn.Sequential([nn.BatchNorm(use_running_average=True)]),
            lambda apply, x: x,
            ValueError,
            "call: expected a call of one of the layers layers_0, got none; run the model on the batch",
        ),
        (
            lambda: nn.Sequential([Own()]),
            None,
            TypeError,
            "layers_0: expected Own.__call__ to call that of its base class, it does not; what a batch norm of its own "
            "normalizes cannot be seen: measure it yourself (jaxbn.moments)",
        ),
    ],
)
def test_linen_errors(make, call, error, message):
    model = make()
    variables = model.init(jax.random.key(0), DATA[0])
    with pytest.raises(error) as raised:
        recalibrate_linen(model, variables, DATA, call=call)
    assert str(raised.value) == message


def test_nnx_without_a_norm():
    with pytest.raises(
        ValueError, match=r"^model: expected an NNX module with a BatchNorm of Flax or jaxbn, got none; "
    ):
        recalibrate_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), DATA)
