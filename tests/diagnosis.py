"""What tests of `jaxbn.diagnose` have in common: healthy statistics, small networks and data."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax import nnx
from versions import nnx_list

import jaxbn.linen
import jaxbn.nnx

C = 6
RNG = np.random.default_rng(0)
MEAN, VAR = RNG.normal(size=C), RNG.uniform(0.5, 2, C)


def kinds(report):
    return {f.kind for f in report.findings}


def statistics(**changes):
    """One healthy layer in Linen's variables, with some arrays changed."""
    arrays = {"mean": MEAN, "var": VAR, "scale": np.ones(C), "bias": np.zeros(C)} | changes
    params = {name: arrays[name] for name in ("scale", "bias")}
    return {"params": {"norm": params}, "batch_stats": {"norm": {"mean": arrays["mean"], "var": arrays["var"]}}}


def at(value, array, index=2):
    changed = np.array(array)
    changed[index] = value
    return changed


class LinenNet(nn.Module):
    norm: type[nn.Module] = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.5)(nn.Dense(C)(x)))
        return x


class NnxNet(nnx.Module):
    def __init__(self, norm=jaxbn.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.layers = nnx_list([nnx.Linear(C, C, rngs=rngs) for _ in range(2)])
        self.norms = nnx_list([norm(C, momentum=0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return x


X = np.asarray(RNG.normal(1, 2, (128, C)), np.float32)


class OnlyNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=True, momentum=0.5, name="norm")(x)


def of_data(x):
    """Variables that are right for `x`, of which only what is planted is wrong."""
    mean, var, _ = oracle.moments(np.where(np.isfinite(x), x, 0))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), statistics(mean=mean, var=var))
