"""What the errors of a model say about the batch that it was given, and about norms that cannot be observed."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn.diagnose import diagnose_linen, diagnose_nnx
from jaxbn.fold import fold_linen
from jaxbn.recalibrate import recalibrate_linen, recalibrate_nnx

X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
LABELS = np.zeros(8, np.int32)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))


@pytest.mark.parametrize("tool", [diagnose_linen, recalibrate_linen, fold_linen, diagnose_nnx, recalibrate_nnx])
@pytest.mark.parametrize(
    ("batch", "got", "part"),
    [((LABELS, X), "a tuple of 2", "1"), ({"label": LABELS, "image": X}, "a dict of 2", "'image'")],
    ids=["tuple", "dict"],
)
def test_a_call_that_gives_the_model_labels(tool, batch, got, part):
    """The error stays the model's, since `call` may be right and the model wrong."""
    argument, options = "batch" if tool is fold_linen else "batches", {"call": lambda run, batch: run(batch)}
    batches = batch if tool is fold_linen else [batch]
    if tool in (diagnose_nnx, recalibrate_nnx):
        rngs = nnx.Rngs(0)
        arguments, name = (nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)),), "model"
    else:
        arguments, name = (Linen(), Linen().init(jax.random.key(0), X)), "apply"
    with pytest.raises(Exception) as raised:  # noqa: PT011  # Flax's
        tool(*arguments, batches, **options)
    note = (
        f"{argument}: got {got}; if `call` gives the model all of it, the labels too, take out what the model takes: "
        f"{name}(batch[{part}], ...)"
    )
    # JAX has one of its own.
    assert note in raised.value.__notes__


@pytest.mark.parametrize("tool", [diagnose_linen, recalibrate_linen, diagnose_nnx, recalibrate_nnx])
@pytest.mark.parametrize("kind", [tuple, list])
def test_a_batch_that_is_not_in_a_list(tool, kind):
    """Its arrays are taken as batches; the error stays the model's."""
    if tool in (diagnose_nnx, recalibrate_nnx):
        rngs = nnx.Rngs(0)
        arguments = (nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)),)
    else:
        arguments = Linen(), Linen().init(jax.random.key(0), X)

    def notes(batches):
        with pytest.raises(Exception) as raised:  # noqa: PT011  # Flax's and JAX's
            tool(*arguments, batches)
        return [note for note in getattr(raised.value, "__notes__", ()) if note.startswith("batches: ")]

    got = f"got a {kind.__name__} of 2 arrays, taken as 2 batches"
    assert notes(kind((X, LABELS))) == [f"batches: {got}; if it is one batch put it into a list: [batch]"]
    assert notes([X, X[:, :2]]) == []


class BridgedNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nnx.bridge.to_linen(jaxbn.nnx.BatchNorm, 3, use_running_average=True, name="norm")(x)


class BridgedDense(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nnx.bridge.to_linen(nnx.Linear, 3, 3)(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


def message(path, interface, inside, bridge):
    return (
        f"{path}: expected batch norms of flax.{interface}, got statistics of {inside} in {bridge}, where calls cannot "
        f"be seen; use jaxbn.{interface}.BatchNorm, or pass the module inside of the bridge by itself"
    )


@pytest.mark.parametrize("tool", [diagnose_linen, recalibrate_linen])
def test_norms_of_nnx_in_linen(tool):
    with pytest.raises(ValueError, match="bridge") as raised:
        tool(BridgedNorm(), BridgedNorm().init(jax.random.key(0), X), [X])
    assert str(raised.value) == message("norm", "linen", "BatchNorm", "nnx.bridge.to_linen")


@pytest.mark.parametrize("tool", [diagnose_nnx, recalibrate_nnx])
def test_norms_of_linen_in_nnx(tool):
    model = nnx.Sequential(nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(0)).lazy_init(X))
    with pytest.raises(ValueError, match="bridge") as raised:
        tool(model, [X])
    assert str(raised.value) == message("layers/0", "nnx", "Linen", "nnx.bridge.ToNNX")


def test_other_bridged_layers_do_not_matter():
    variables = recalibrate_linen(BridgedDense(), BridgedDense().init(jax.random.key(0), X), [X, X])
    assert float(np.abs(variables["batch_stats"]["norm"]["mean"]).max()) > 0
