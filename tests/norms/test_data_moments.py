"""Statistics of a data set: those of all values in float64, however they come in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from versions import EXACT_SUMS

import jaxbn
from jaxbn._statistics.batch_stream import MomentsAccumulator


def assert_moments(m, values, rtol=1e-6):
    """`values` [N, C] are all values."""
    values = np.asarray(values, np.float64)
    assert (m.mean.dtype, m.var.dtype, m.count.dtype) == (np.float64,) * 3
    std = values.std(0)
    np.testing.assert_array_equal(m.count, np.full(std.shape, len(values)))
    np.testing.assert_allclose(m.mean, values.mean(0), rtol=0, atol=rtol * std.max())
    np.testing.assert_allclose(np.sqrt(m.var), std, rtol=rtol, atol=0)


def images(number=7, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, 4, 5, 3)).astype(np.uint8)


def test_8_bit_images_in_uneven_batches():
    x = images()
    m = jaxbn.data_moments([x[:3], x[3:6], x[6:]], scale=1 / 255)
    # Integers are measured as they are, and the factor applied in float64.
    assert_moments(m, x.reshape(-1, 3) / 255)


def test_channels_first():
    x = np.moveaxis(images(), -1, 1)
    assert_moments(jaxbn.data_moments([x[:3], x[3:]], axis=1, scale=1), np.moveaxis(x, 1, -1).reshape(-1, 3))


def test_several_feature_axes():
    x = images()
    m = jaxbn.data_moments([x[:3], x[3:]], axis=[-1, 1], scale=1)
    assert m.mean.shape == (4, 3)
    np.testing.assert_allclose(m.mean, x.mean((0, 2), np.float64))


def test_far_from_zero():
    x = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32) * 0.01 + np.float32(1000)
    assert_moments(jaxbn.data_moments([x[:20], x[20:]]), x)


def test_half_precision_is_measured_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 2)), jnp.bfloat16)
    assert_moments(jaxbn.data_moments([x]), np.asarray(x).astype(np.float64))


def test_masks_of_batches():
    x = np.random.default_rng(0).standard_normal((3, 6, 4, 2)).astype(np.float32)
    keep = np.random.default_rng(1).random((3, 6, 4)) < 0.5
    x[~keep] = np.nan
    data = ({"image": a, "valid": b} for a, b in zip(x, keep, strict=True))
    m = jaxbn.data_moments(data, select=lambda batch: batch["image"], mask=lambda batch: batch["valid"])
    assert_moments(m, x[keep])


def test_transform_is_compiled_once_per_shape():
    x, traced = images(), []

    def transform(x):
        traced.append(x.shape)
        return jnp.log1p(x.astype(jnp.float32))

    m = jaxbn.data_moments([x[:2], x[2:4], x[4:6], x[6:]], transform=transform)
    assert_moments(m, np.log1p(x.reshape(-1, 3).astype(np.float64)))
    assert [shape[0] for shape in traced] == [2, 1]


@EXACT_SUMS
def test_more_values_than_float32_can_count():
    x = np.random.default_rng(0).integers(0, 2, (2**20 + 1, 1)).astype(np.uint8)
    m = jaxbn.data_moments((x for _ in range(21)), scale=1)
    assert m.count.tolist() == [21 * (2**20 + 1)]
    assert int(np.float32(m.count[0])) != int(m.count[0])
    np.testing.assert_allclose([m.mean[0], m.var[0]], [x.mean(), x.var()], rtol=1e-7)


def test_one_batch_of_more_values_than_float32_can_count():
    n = 2**24 + 12345
    x = np.zeros((n, 1), np.uint8)
    x[::2] = 1
    for options in (
        {"mask": lambda x: np.ones((n, 1), bool), "scale": 1},
        {"mask": lambda x: np.ones((1, 1), bool), "scale": 1},
        {"transform": lambda x: x.astype(jnp.float32)},
    ):
        m = jaxbn.data_moments([x], **options)
        assert m.count.tolist() == [n]
        np.testing.assert_allclose([m.mean[0], m.var[0]], [0.5, 0.25], rtol=1e-6)


def test_a_long_stream_of_large_batches():
    """A thousand batches of 64 images of 224 x 224, of which only the moments are made."""
    rng = np.random.default_rng(0)
    each = 224 * 224 * 64
    mean, var = rng.standard_normal((1000, 2)).astype(np.float32), rng.random((1000, 2)).astype(np.float32)
    pool = MomentsAccumulator()
    for a, b in zip(mean, var, strict=True):
        pool.add(jaxbn.Moments(jnp.asarray(a), jnp.asarray(b), jnp.full(2, float(each))))
    pool.add(jaxbn.Moments(jnp.zeros(2), jnp.zeros(2), jnp.ones(2)))
    n = 1000 * each + 1
    expected = mean.sum(0, np.float64) * each / n
    second = ((var.astype(np.float64) + mean.astype(np.float64) ** 2) * each).sum(0) / n
    m = pool.moments
    assert m.count.tolist() == [n, n]
    np.testing.assert_allclose(m.mean, expected, rtol=1e-13)
    np.testing.assert_allclose(m.var, second - expected**2, rtol=1e-13)


def test_the_mean_keeps_both_of_its_numbers():
    pool = MomentsAccumulator()
    pool.add(jaxbn.Moments(jnp.ones(1) * 1e6, jnp.ones(1), jnp.ones(1), jnp.ones(1) * 1e-3))
    assert pool.moments.mean.tolist() == [1e6 + float(np.float32(1e-3))]


def test_the_result_merges_with_others():
    x = np.random.default_rng(0).standard_normal((10, 2)).astype(np.float32)
    m = jaxbn.data_moments([x[:4]]).merge(jaxbn.moments(jnp.asarray(x[4:])))
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-5)


def test_sharded_batches():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.random.default_rng(0).standard_normal((2, 16, 3)).astype(np.float32)
    sharded = [jax.device_put(a, NamedSharding(mesh, PartitionSpec("data"))) for a in x]
    assert_moments(jaxbn.data_moments(sharded), x.reshape(-1, 3))


def test_torch_data_loader():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((10, 3, 4, 4)).astype(np.float32)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(x), torch.arange(10)), batch_size=4
    )
    m = jaxbn.data_moments(loader, axis=1, select=lambda batch: batch[0])
    assert_moments(m, np.moveaxis(x, 1, -1).reshape(-1, 3))


def test_tensors_that_numpy_does_not_take_as_they_are():
    """Neither bfloat16, nor what has a gradient."""
    torch = pytest.importorskip("torch")
    x = torch.arange(12.0, requires_grad=True).reshape(4, 3)
    for batch in (x, x.bfloat16()):
        assert_moments(jaxbn.data_moments([batch]), np.arange(12.0, dtype=np.float32).reshape(4, 3))


def test_progress_changes_nothing():
    x = np.ones((4, 2), np.float32)
    assert jaxbn.data_moments([x], progress=True).count.tolist() == [4, 4]


def test_without_tqdm(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError) as error:
        jaxbn.data_moments([np.ones((4, 2), np.float32)], progress=True)
    assert str(error.value) == "tqdm: needed for progress=True; pip install 'jaxbn[tools]'"


X = np.ones((4, 2), np.float32)
SELECT = "name the array by select, such as select=lambda batch: batch[0]"


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        ([], {}, ValueError, "batches: expected at least 1 batch, got none; an iterator can be gone through only once"),
        (
            [X[:0]],
            {},
            ValueError,
            "batches: expected values that count, got none; batches are empty or masks hide everything",
        ),
        (
            [X],
            {"mask": lambda x: np.zeros((4, 1), bool)},
            ValueError,
            "batches: expected values that count, got none; batches are empty or masks hide everything",
        ),
        (
            X,
            {},
            TypeError,
            "batches: expected an iterable of batches, got one array of shape (4, 2); if it is one batch put it into "
            "a list: [x]",
        ),
        (3, {}, TypeError, "batches: expected an iterable of batches, got int"),
        (
            [X.astype(np.uint8)],
            {},
            TypeError,
            "batches: expected floating-point values in each batch, got uint8; say what integers mean: scale=1 / 255 "
            "for 8-bit images in [0, 1], scale=1 to take them as they are, or a transform that returns floating point",
        ),
        (
            [X],
            {"transform": lambda x: x > 0},
            TypeError,
            "batches: expected floating-point values from transform, got bool; say what integers mean: scale=1 / 255 "
            "for 8-bit images in [0, 1], scale=1 to take them as they are, or a transform that returns floating point",
        ),
        (
            [X],
            {"transform": lambda x: x, "scale": 2},
            ValueError,
            "scale, transform: expected one of them, got both; let transform do what scale does",
        ),
        ([(X, X)], {}, TypeError, f"batches: expected an array in batch 0, got tuple; {SELECT}"),
        ([{"id": "a"}], {}, TypeError, f"batches: expected arrays in each batch, got str; {SELECT}"),
        (
            [np.array(["a"])],
            {},
            TypeError,
            f"batches: expected arrays of numbers in each batch, got dtype <U1; {SELECT}",
        ),
        (
            [X, np.ones((4, 3), np.float32)],
            {},
            ValueError,
            "batches: expected moments of shape (2,), as before, got (3,); all batches need the same channels, along "
            "the same axis",
        ),
    ],
)
def test_errors(batches, options, error, message):
    with pytest.raises(error) as raised:
        jaxbn.data_moments(batches, **options)
    assert str(raised.value) == message
