"""Largest error of batch norm's output in training, for jaxbn and others.

Errors are differences from float64 NumPy. PyTorch is compared where it is
installed.
"""

import argparse
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxbn

SHAPE = (8192, 16)
CASES = [(0, 1), (1e1, 1), (1e2, 1), (1e3, 0.1), (1e4, 1), (1e5, 1), (1e6, 1)]


def expected(x):
    x = x.astype(np.float64)
    return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


def ours(x):
    return jax.jit(jaxbn.batch_norm_train)(x, None, None)[0]


def flax(use_fast_variance):
    def norm(x):
        layer = nn.BatchNorm(use_running_average=False, use_fast_variance=use_fast_variance)
        return jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x)[0])(x)

    return norm


def pytorch(x):
    import torch

    return torch.nn.functional.batch_norm(torch.from_numpy(np.array(x)), None, None, training=True).numpy()


def run(_: argparse.Namespace) -> None:
    implementations = {"jaxbn": ours, "Flax default": flax(True), "Flax two-pass": flax(False)}
    if importlib.util.find_spec("torch"):
        implementations["PyTorch"] = pytorch
    table = Table(
        "mean", "std", *implementations, "limit: 4 eps max|y|", title=f"largest output error, float32 {SHAPE}"
    )
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    for mean, std in CASES:
        x = (mean + std * noise).astype(np.float32)
        y = expected(x)
        errors = [
            np.abs(np.asarray(norm(jnp.asarray(x))).astype(np.float64) - y).max() for norm in implementations.values()
        ]
        limit = 4 * np.finfo(np.float32).eps * np.abs(y).max()
        table.add_row(f"{mean:g}", f"{std:g}", *(f"{e:.1e}" for e in errors), f"{limit:.1e}")
    Console(width=110).print(table)
