"""A model that trains where it was to evaluate, and whose layers share statistics over devices that are not there."""

import flax.linen as nn
import jax
import pytest
from diagnosis import C, X
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose_linen, diagnose_nnx
from jaxbn.fold import fold_linen
from jaxbn.recalibrate import recalibrate_nnx


class Linen(nn.Module):
    norm: type[nn.BatchNorm]

    @nn.compact
    def __call__(self, x, train=True):
        return self.norm(use_running_average=not train, axis_name="data", name="norm")(nn.Dense(C)(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm, jaxbn.linen.BatchNorm], ids=["flax", "jaxbn"])
def test_linen(norm):
    model = Linen(norm)
    variables = model.init(jax.random.key(0), X, train=False)
    found = {f.kind: f for f in diagnose_linen(model, variables, X).findings}
    assert set(found) == {"untouched", "train_mode", "depends_on_batch", "parting"}
    assert (found["train_mode"].layer, found["train_mode"].cure) == (
        "norm",
        "pass use_running_average=True, or train=False if the model takes that",
    )


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm], ids=["flax", "jaxbn"])
@pytest.mark.parametrize("groups", [None, [[0, 1]]])
def test_nnx(norm, groups):
    model = norm(C, axis_name="data", axis_index_groups=groups, rngs=nnx.Rngs(0))
    recalibrate_nnx(model, [X])
    found = {f.kind: f for f in diagnose_nnx(model, X).findings}
    assert set(found) == {"train_mode", "depends_on_batch"}
    assert found["train_mode"].cure == "call model.eval() before evaluation"
    assert (model.axis_name, model.axis_index_groups) == ("data", groups)


def test_axes_of_which_some_are_bound_are_an_error():
    model = jaxbn.nnx.BatchNorm(C, axis_name=("data", "model"), rngs=nnx.Rngs(0))

    def call(model, x):
        return jax.vmap(model, axis_name="data")(x[None])[0]

    with pytest.raises(ValueError, match=r"^axis_name: expected an axis that is bound here, got 'model' where"):
        diagnose_nnx(model, X, call=call)


def test_folding_says_that_the_norm_trains():
    model = Linen(jaxbn.linen.BatchNorm)
    variables = model.init(jax.random.key(0), X, train=False)
    with pytest.raises(ValueError, match=r"^axis_name: expected an axis that is bound") as raised:
        fold_linen(model, variables, X)
    note = (
        "norm: called in training; fold the model as it evaluates, with use_running_average=True, or train=False if "
        "the model takes that"
    )
    assert note in raised.value.__notes__
