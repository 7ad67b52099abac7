"""Batches and models of other kinds, in recalibration and the other tools that run a model."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from recalibration import DATA, EPS, EVEN, STATE, WEIGHTS, close
from versions import needs

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose_linen, diagnose_nnx
from jaxbn.fold import fold_linen
from jaxbn.recalibrate import recalibrate, recalibrate_linen, recalibrate_nnx


def test_random_keys_in_a_batch():
    """They are no numbers, and go to the model as they are."""
    batches = [{"key": jax.random.key(i), "x": x} for i, x in enumerate(EVEN)]

    def noisy(run, batch):
        return run(batch["x"] + jax.random.normal(batch["key"], batch["x"].shape))

    mean = np.concatenate(
        [x + np.asarray(jax.random.normal(b["key"], x.shape)) for b, x in zip(batches, EVEN, strict=True)]
    )
    mean = mean.astype(np.float64).mean(0)
    close(recalibrate(lambda _, batch: noisy(jaxbn.moments, batch), STATE, batches).mean, mean)
    net = nn.BatchNorm(use_running_average=True)
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0]), batches, call=noisy)
    close(variables["batch_stats"]["mean"], mean)
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    recalibrate_nnx(model, batches, call=noisy)
    close(model.mean[...], mean)


def test_diagnosis_finds_nothing_after_recalibration():
    """Though a few batches would not be enough for statistics that are averaged with this decay."""
    net = nn.Sequential(
        [nn.Dense(3), jaxbn.linen.BatchRenorm(limits=(1.0, 0.0), momentum=0.9, use_running_average=True)]
    )
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0]), EVEN)
    report = diagnose_linen(net, variables, EVEN, steps=len(EVEN))
    assert not {"initial_weight", "drift"} & {finding.kind for finding in report.findings}


class TakesTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


def test_one_call_serves_both_tools():
    net, call = TakesTrain(), lambda apply, x: apply(x, train=False)
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0], train=False), EVEN, call=call)
    report = diagnose_linen(net, variables, EVEN, call=call)
    assert report.ok
    np.testing.assert_allclose(report.layers[0].shift, 0, atol=1e-6)


LABELLED = (DATA[0], np.arange(len(DATA[0])))


@pytest.mark.parametrize("tool", [recalibrate_linen, diagnose_linen, recalibrate_nnx, diagnose_nnx])
@pytest.mark.parametrize(
    ("batch", "got", "part"),
    [
        (LABELLED, "a tuple of 2", "0"),
        (list(LABELLED), "a list of 2", "0"),
        (dict(zip(("x", "label"), LABELLED, strict=True)), "a dict of 2", "'x'"),
    ],
)
def test_batches_that_the_model_does_not_take(tool, batch, got, part):
    if tool in (recalibrate_linen, diagnose_linen):
        net = nn.Sequential([nn.Conv(3, (1,)), nn.BatchNorm(use_running_average=True)])
        arguments, name = (net, net.init(jax.random.key(0), DATA[0])), "apply"
    else:
        net = nnx.Sequential(nnx.Conv(3, 3, (1,), rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        arguments, name = (net,), "model"
    with pytest.raises(TypeError) as raised:
        tool(*arguments, [batch])
    assert str(raised.value) == (
        f"batches: expected what the model takes, got {got}, for which it raised AttributeError: "
        f"'{type(batch).__name__}' object has no attribute 'ndim'; say what to give it: "
        f"call=lambda {name}, batch: {name}(batch[{part}])"
    )


@pytest.mark.parametrize(
    ("tool", "argument"), [(recalibrate_linen, "batches"), (diagnose_linen, "batches"), (fold_linen, "batch")]
)
@pytest.mark.parametrize(
    ("batch", "got", "given"),
    [(DATA[0], "one batch alone", "batch"), ((DATA[0], np.arange(4)), "a tuple of 2", "batch[0]")],
    ids=["array", "tuple"],
)
def test_a_model_that_takes_train(tool, argument, batch, got, given):
    variables = TakesTrain().init(jax.random.key(0), DATA[0], train=False)
    with pytest.raises(TypeError) as raised:
        tool(TakesTrain(), variables, batch if argument == "batch" else [batch])
    assert str(raised.value) == (
        f"{argument}: expected what the model takes, got {got}, for which it raised TypeError: TakesTrain.__call__() "
        "missing 1 required positional argument: 'train'; say what to give it: "
        f"call=lambda apply, batch: apply({given}, train=False)"
    )


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, pair):
        return nn.BatchNorm(use_running_average=True, name="norm")(pair[0] + pair[1])


def test_a_model_may_take_tuples():
    batches = [(x, x) for x in EVEN]
    variables = TwoInputs().init(jax.random.key(0), batches[0])
    new = recalibrate_linen(TwoInputs(), variables, batches)
    close(new["batch_stats"]["norm"]["mean"], 2 * np.concatenate(EVEN).astype(np.float64).mean(0))


class Repeated(nn.Module):
    """One layer, run again and again."""

    carried: bool

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.BatchNorm(use_running_average=True, name="norm")(x), None

        axes = {"variable_carry": "batch_stats"} if self.carried else {"variable_broadcast": ["params", "batch_stats"]}
        axes = {"variable_broadcast": "params"} | axes
        return nn.scan(Block, length=3, split_rngs={"params": False}, **axes)(name="blocks")(x, None)[0]


def test_linen_scan_that_broadcasts_statistics():
    net, x = Repeated(carried=False), DATA[0]
    variables = net.init(jax.random.key(0), x)
    net.apply(variables, x)
    for tool in (recalibrate_linen, diagnose_linen):
        with pytest.raises(ValueError, match=r"^model: ") as raised:
            tool(net, variables, [x])
        assert str(raised.value) == (
            "model: expected batch_stats that can change in nn.scan, got a variable_broadcast with 'batch_stats' in "
            "it; pass this function the same network with variable_carry='batch_stats' in its place, which takes the "
            "same variables"
        )
    # The cure is one.
    new = recalibrate_linen(Repeated(carried=True), variables, [x], method="batchwise")
    inputs = [x.astype(np.float64)]
    for _ in range(2):
        inputs.append(inputs[-1] + (inputs[-1] - inputs[-1].mean(0)) / np.sqrt(inputs[-1].var(0) + EPS))
    close(new["batch_stats"]["blocks"]["norm"]["var"], np.concatenate(inputs).var(0))


class ByReference(nnx.Module):
    def __init__(self):
        self.first = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.second = jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))

    def __call__(self, x):
        # What only references allow: JAX's own transformations.
        x = jax.checkpoint(self.first)(x) @ WEIGHTS[0]
        return jax.lax.scan(lambda carry, part: (carry, self.second(part)), None, x[None])[1][0]


@needs("nnx.var_defaults", flax="0.12.3")
def test_nnx_variables_that_are_references():
    with nnx.var_defaults(ref=True):
        model = ByReference()
        recalibrate_nnx(model, EVEN)
    x = np.concatenate(EVEN).astype(np.float64)
    for norm in (model.first, model.second):
        close(norm.mean[...], x.mean(0))
        close(norm.var[...], x.var(0))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS) @ WEIGHTS[0]
    assert int(model.second.num_batches_tracked[...]) == 3
    # Outside of the context the model is what it was, and nothing but copies of it is run.
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    findings = diagnose_nnx(model, np.concatenate(EVEN)).findings
    assert {f.kind for f in findings} == {"train_mode", "depends_on_batch"}
    with pytest.raises(ValueError, match="expected finite statistics"):
        recalibrate_nnx(model, [EVEN[0] * np.nan])
    after = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
