"""Batch norm in float64 NumPy, written from the paper's formulas. Features are on the last axis."""

import numpy as np


def moments(x, mask=None):
    """Mean, biased variance and count per channel of `x` [..., C]; `mask` has the shape of `x`."""
    x = np.asarray(x).astype(np.float64)
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    rows = tuple(range(x.ndim - 1))
    count = mask.sum(rows)
    x = np.where(mask, x, 0)
    mean = x.sum(rows) / np.maximum(count, 1)
    var = (np.where(mask, x - mean, 0) ** 2).sum(rows) / np.maximum(count, 1)
    return mean, var, count


def normalize(x, mean, var, scale=1.0, bias=0.0, eps=1e-5):
    x, mean, var, scale, bias = (np.asarray(v).astype(np.float64) for v in (x, mean, var, scale, bias))
    return (x - mean) / np.sqrt(var + eps) * scale + bias


def train(x, scale=1.0, bias=0.0, eps=1e-5, mask=None):
    mean, var, _ = moments(x, mask)
    return normalize(x, mean, var, scale, bias, eps)


def gradients(x, dy, scale=1.0, eps=1e-5, mask=None):
    """Gradients of sum(dy * train(x)) with respect to x, scale and bias."""
    x, dy, scale = (np.asarray(v).astype(np.float64) for v in (x, dy, scale))
    mask = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    mean, var, count = moments(x, mask)
    rows = tuple(range(x.ndim - 1))
    rstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean) * rstd
    dbias, dscale = dy.sum(rows), (dy * xhat).sum(rows)
    # Where nothing is masked these two sums are dbias and dscale: every y depends on both moments,
    # but only the values that count enter them.
    dx = scale * rstd * (dy - mask * (dbias + xhat * dscale) / np.maximum(count, 1))
    return dx, dscale, dbias


def update(mean, var, batches, momentum=0.1, correction=1):
    """Running mean and variance after `batches`, PyTorch's way."""
    mean, var = np.asarray(mean).astype(np.float64), np.asarray(var).astype(np.float64)
    for k, x in enumerate(batches, start=1):
        weight = 1 / k if momentum is None else momentum
        m, v, n = moments(x)
        mean = (1 - weight) * mean + weight * m
        var = (1 - weight) * var + weight * v * n / (n - correction)
    return mean, var
