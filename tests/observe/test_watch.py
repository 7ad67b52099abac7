"""What `watch_nnx` changes in a copy of an NNX model, and what it leaves."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn.nnx
from jaxbn._observe.watch import watch_nnx

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


# Compiled once for the model as it is, and once for each watch.
@nnx.jit
def run_compiled(layer, x):
    return layer(x)


def adding(number):
    return lambda name, module, cls, run, args, kwargs: run(*args, **kwargs) + number


def test_what_is_compiled_for_one_watch_is_not_used_in_another():
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    expected = run_compiled(layer, X)
    for number in (1, 2):
        watched = nnx.clone(layer)
        with watch_nnx({"layer": watched}, adding(number)):
            np.testing.assert_array_equal(run_compiled(watched, X), expected + number)
        np.testing.assert_array_equal(watched(X), layer(X))
    np.testing.assert_array_equal(run_compiled(layer, X), expected)


def test_original_and_copy():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.relu)
    copy, seen, original = nnx.clone(model), [], nnx.Linear.__call__

    def handler(name, module, cls, run, args, kwargs):
        seen.append((name, cls, module is copy.layers[0], args, kwargs))
        return run(*args, **kwargs)

    with watch_nnx({"first": copy.layers[0]}, handler):
        model(X)
        assert seen == []
        copy(X)
    assert seen == [("first", nnx.Linear, True, (X,), {})]
    assert type(model.layers[0]) is nnx.Linear
    assert type(copy.layers[0]) is nnx.Linear
    assert nnx.Linear.__call__ is original


class Doubling:
    def __call__(self, x):
        return super().__call__(2 * x)


class Doubled(Doubling, jaxbn.nnx.BatchNorm):
    pass


class DoubledTwice(Doubled):
    def __call__(self, x):
        return super().__call__(2 * x)


class NoPytree(nnx.BatchNorm, pytree=False):
    pass


@pytest.mark.parametrize(
    ("cls", "kinds", "factor"),
    [
        (nnx.BatchNorm, [nnx.BatchNorm], 1),
        (jaxbn.nnx.BatchRenorm, [jaxbn.nnx.BatchNorm], 1),
        (Doubled, [Doubled, jaxbn.nnx.BatchNorm], 2),
        (DoubledTwice, [DoubledTwice, jaxbn.nnx.BatchNorm], 4),
        (NoPytree, [nnx.BatchNorm], 1),
    ],
)
def test_calls_by_super_are_watched_within(cls, kinds, factor):
    options = {"limits": (3.0, 5.0)} if cls is jaxbn.nnx.BatchRenorm else {}
    layer, seen = cls(3, rngs=nnx.Rngs(0), **options), []

    def handler(name, module, of, run, args, kwargs):
        seen.append((of, args[0]))
        return run(*args, **kwargs)

    with watch_nnx({"": layer}, handler, within=(nnx.BatchNorm, jaxbn.nnx.BatchNorm)):
        graphdef, state = nnx.split(layer)
        nnx.merge(graphdef, state)(jnp.asarray(X))
    assert [kind for kind, _ in seen] == kinds
    np.testing.assert_array_equal(seen[-1][1], factor * X)


def test_what_tabulate_leaves_in_classes_is_no_call_of_their_own():
    class Derived(jaxbn.nnx.BatchNorm):
        pass

    model = Derived(3, rngs=nnx.Rngs(0))
    nnx.tabulate(nnx.Sequential(model), jnp.ones((4, 3)))
    found = []

    def handler(name, module, cls, run, args, kwargs):
        found.append(name)
        return run(*args, **kwargs)

    with watch_nnx({"norm": model}, handler):
        model(jnp.arange(12.0).reshape(4, 3))
    model(jnp.arange(12.0).reshape(4, 3))
    assert found == ["norm"]
