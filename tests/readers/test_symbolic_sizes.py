"""Functions are exported for sizes that are not known: `jax.export` with symbolic shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxbn
import jaxbn.linen

C = 6
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH, HEIGHT, WIDTH = jax.export.symbolic_shape("batch, height, width")
AFFINE = jaxbn.BatchNormParams(jnp.linspace(0.5, 2, C), jnp.linspace(-1, 1, C))
STATE = jaxbn.BatchNormState(jnp.linspace(-1, 1, C), jnp.linspace(0.5, 2, C), jnp.int32(3))
SHAPES = [(BATCH, HEIGHT, WIDTH, C), (4, HEIGHT, WIDTH, C), (BATCH, 8, 8, C), (BATCH, 3, WIDTH, C), (BATCH, WIDTH, C)]

NORMS = {
    "batch": lambda x, mask: jaxbn.batch_norm_train(x, AFFINE, STATE, mask=mask),
    "batch, cumulative": lambda x, mask: jaxbn.batch_norm_train(x, AFFINE, STATE, mask=mask, momentum=None),
    "batch, evaluation": lambda x, mask: jaxbn.batch_norm_eval(x, AFFINE, STATE, mask=mask),
    "renorm": lambda x, mask: jaxbn.batch_renorm_train(x, AFFINE, STATE, r_max=3, d_max=5, mask=mask),
    "instance": lambda x, mask: jaxbn.instance_norm_train(x, AFFINE, STATE, mask=mask),
    "instance without state": lambda x, mask: jaxbn.instance_norm_train(x, AFFINE, None, mask=mask),
    "layer": lambda x, mask: jaxbn.layer_norm(x, AFFINE, mask=mask),
    "layer, examples": lambda x, mask: jaxbn.layer_norm(
        x, AFFINE, axis=tuple(range(1, x.ndim)), params_axis=-1, mask=mask
    ),
    "rms": lambda x, mask: jaxbn.rms_norm(x, AFFINE, mask=mask),
    "group": lambda x, mask: jaxbn.group_norm(x, AFFINE, 3, mask=mask),
    "moments": lambda x, mask: jaxbn.batch_norm_update(STATE, jaxbn.moments(x, mask=mask)),
}


def spec(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def draw(*shape):
    return 3 + jax.random.normal(jax.random.key(len(shape)), shape)


def with_gradient(norm):
    """All results of a norm, and the gradients of their squares."""

    def call(x, mask):
        def loss(x):
            results = norm(x, mask)
            return sum(jnp.sum(v.astype(jnp.float32) ** 2) for v in jax.tree.leaves(results)), results

        return jax.grad(loss, has_aux=True)(x)

    return call


def export(call, *specs, platforms=PLATFORMS):
    return jax.export.export(jax.jit(call), platforms=platforms)(*specs)


def assert_same(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max(initial=0)))


@pytest.mark.parametrize("name", NORMS)
def test_batch_and_image_size(name):
    """Values, gradients and running statistics."""
    exported = export(with_gradient(NORMS[name]), spec(SHAPES[0]), None)
    assert exported.platforms == PLATFORMS
    x = draw(2, 3, 5, C)
    assert_same(exported.call(x, None), with_gradient(NORMS[name])(x, None))


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "masked"), list(zip(SHAPES[1:], (True, False, True, False), strict=True)), ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_any_size(name, shape, masked):
    dtype = jnp.float32 if masked else jnp.bfloat16
    mask = spec((*shape[:-1], 1), jnp.bool_) if masked else None
    export(with_gradient(NORMS[name]), spec(shape, dtype), mask)


@pytest.mark.parametrize("shape", [(BATCH, 1, 1, 1), (1, HEIGHT, WIDTH, 1), (BATCH, HEIGHT, WIDTH)], ids=str)
def test_masks(shape):
    exported = export(with_gradient(NORMS["batch"]), spec(SHAPES[0]), spec(shape, jnp.bool_))
    x, sizes = draw(2, 3, 5, C), {BATCH: 2, HEIGHT: 3, WIDTH: 5}
    mask = draw(*(sizes.get(n, n) for n in shape)) > 3
    assert_same(exported.call(x, mask), with_gradient(NORMS["batch"])(x, mask))


@pytest.mark.parametrize("name", ["batch", "layer", "group"])
def test_gradient_of_an_export(name):
    """`vjp_order=1` exports the derivative beside the function."""

    def call(x, params):
        return {
            "batch": lambda: jaxbn.batch_norm_train(x, params, None)[0],
            "layer": lambda: jaxbn.layer_norm(x, params),
            "group": lambda: jaxbn.group_norm(x, params, 3),
        }[name]()

    exported = export(call, spec(SHAPES[0]), jax.tree.map(lambda v: spec(v.shape), AFFINE), platforms=("cpu",))
    x = draw(2, 3, 5, C)

    def loss(function):
        return lambda *arguments: jnp.sum(function(*arguments) ** 3)

    actual = jax.grad(loss(exported.call), (0, 1))(x, AFFINE)
    assert_same(actual, jax.grad(loss(call), (0, 1))(x, AFFINE))


def test_channels():
    channels = jax.export.symbolic_shape("channels")[0]
    three = 3 * channels
    params = jaxbn.BatchNormParams(spec((three,)), spec((three,)))
    exported = export(
        lambda x, params: (
            jaxbn.batch_norm_train(x, params, None)[0],
            jaxbn.group_norm(x, params, 3),
            jaxbn.layer_norm(x, params),
        ),
        spec((4, 5, three)),
        params,
    )
    x = np.asarray(draw(4, 5, C), np.float64)
    y, *_ = exported.call(x.astype(np.float32), AFFINE)
    np.testing.assert_allclose(y, oracle.train(x, *map(np.asarray, AFFINE)), atol=1e-5)


@pytest.mark.parametrize("name", ["BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
def test_layers(name):
    options = {"BatchNorm": {"use_running_average": False}, "GroupNorm": {"num_groups": 3}}.get(name, {})
    layer = getattr(jaxbn.linen, name)(**options)

    def call(x):
        return layer.init_with_output(jax.random.key(0), x)

    export(call, spec(SHAPES[0]))
    exported = export(lambda v, x: layer.apply(v, x, mutable="batch_stats"), call(draw(1, 2, 2, C))[1], spec(SHAPES[0]))
    x = draw(2, 3, 5, C)
    variables = layer.init(jax.random.key(0), x)
    assert_same(exported.call(variables, x), layer.apply(variables, x, mutable="batch_stats"))


@pytest.mark.slow
@pytest.mark.parametrize(("examples", "size"), [("2*n", 2), ("8*n", 4), ("n", 1)])
def test_virtual_batches_of_a_multiple(examples, size):
    """There may be one virtual batch, too."""
    number, width = jax.export.symbolic_shape(f"{examples}, width")

    def call(x):
        return jaxbn.batch_norm_train(x, AFFINE, STATE, virtual_batch_size=size)

    def on_devices(x):
        return jax.vmap(
            lambda x: jaxbn.batch_norm_train(x, AFFINE, STATE, virtual_batch_size=size, axis_name="devices")[1],
            axis_name="devices",
        )(x[None])

    exported = export(lambda x: (call(x), on_devices(x)), spec((number, width, C)))
    for n in (1, 3):
        x = draw(n * int(examples.removesuffix("n").rstrip("*") or 1), 5, C)
        (y, state), of_devices = exported.call(x)
        assert_same((y, state), call(x))
        assert_same([v[0] for v in of_devices], state)


def test_virtual_batches_that_may_be_cut():
    with pytest.raises(ValueError) as error:  # noqa: PT011
        export(lambda x: jaxbn.batch_norm_train(x, AFFINE, STATE, virtual_batch_size=4), spec((2 * BATCH, C)))
    assert str(error.value) == (
        "virtual_batch_size: expected a divisor of the number of examples, which is symbolic, got 4 for 2*batch "
        "examples, which may end within a virtual batch; export with a fixed number of examples, or with a multiple, "
        "as by jax.export.symbolic_shape('4*n')"
    )
