"""Less memory, as docs/performance.md has it: reverse mode keeps convolutions' outputs and the library's moments."""

import jax
import jax.numpy as jnp
import numpy as np
from costs import saved

import jaxbn

CHANNELS = (3, 4, 5)
EPS = float(np.finfo(np.float32).eps)


def keep_convolutions(primitive, *_, **options):
    return primitive.name == "conv_general_dilated"


policy = jax.checkpoint_policies.save_from_both_policies(
    keep_convolutions, jax.checkpoint_policies.save_only_these_names(jaxbn.MOMENTS_NAME)
)


def draw():
    rng = np.random.default_rng(0)
    shapes = [(3, 3, *CHANNELS[k : k + 2]) for k in range(2)]
    kernels = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    norms = [jaxbn.batch_norm_init(c) for c in CHANNELS[1:]]
    x = jnp.asarray(rng.standard_normal((4, 8, 8, CHANNELS[0])), jnp.float32)
    return (kernels, [params for params, _ in norms]), [state for _, state in norms], x


def loss(params, states, x):
    kernels, norms = params
    new = []
    for kernel, norm, state in zip(kernels, norms, states, strict=True):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x, state = jaxbn.batch_norm_train(x, norm, state)
        new.append(state)
        x = jax.nn.relu(x)
    return jnp.sum(x * jnp.cos(x)), new


def test_numbers_are_the_same_and_statistics_enter_once():
    arguments = draw()
    plain = jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
    less = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy), has_aux=True))(*arguments)

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=64 * EPS * np.abs(a).max())

    jax.tree.map(compare, plain, less)
    assert [int(state.num_batches_tracked) for state in less[0][1]] == [1, 1]


def test_no_output_of_a_norm_or_an_activation_is_kept():
    params, states, x = draw()

    def large(function):
        kept = saved(lambda params: function(params, states, x)[0], params)
        return sorted(shape for _, shape in kept if len(shape) == 4 and shape[1] == 8)

    of_convolutions = [(4, 8, 8, c) for c in CHANNELS[1:]]
    assert large(jax.checkpoint(loss, policy=policy)) == sorted([*of_convolutions, x.shape])
    assert len(large(loss)) > 3
