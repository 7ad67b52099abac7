"""The four examples that one reads first: networks learn, and the ways agree."""

import importlib
import pathlib

import jax
import pytest

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
# Of the devices' results; only the order of summation differs.
TOLERANCE = 1e-6


@pytest.fixture
def example(monkeypatch, request):
    """A module of examples/, with JAX's defaults, as users have them."""
    monkeypatch.syspath_prepend(EXAMPLES)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield importlib.import_module(request.param)


@pytest.mark.parametrize("example", ["functions"], indirect=True)
def test_functions(example, capsys):
    assert example.main(epochs=3) > 0.75
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["epoch  1", "epoch  2", "epoch  3"]


@pytest.mark.parametrize("example", ["linen", "nnx"], indirect=True)
def test_layers(example):
    """Two stages of the network are enough to show it."""
    widths = (8, 16)
    options = {"widths": widths} if example.__name__ == "nnx" else {"model": example.ResNet(widths=widths)}
    accuracy, difference = example.main(epochs=3, **options)
    assert accuracy > 0.75
    assert difference < 1e-4


@pytest.mark.parametrize("example", ["devices"], indirect=True)
def test_devices(example):
    results = example.main(epochs=1)
    assert list(results) == ["one device", "eight, jit", "eight, shard_map"]
    assert max(difference for _, difference in results.values()) <= TOLERANCE
    assert min(accuracy for accuracy, _ in results.values()) > 0.5
