"""Virtual batches as they are defined: each part of the batch by itself, in float64."""

import numpy as np
import oracle
from parallel import assert_near


def by_hand(batched, params, size, momentum=0.1):
    """Each part as a batch of its own; the state takes the mean over parts."""
    x, mask, weight = batched
    parts = [slice(k, k + size) for k in range(0, len(x), size)]
    full = np.ones(x.shape, bool) if mask is None else np.broadcast_to(np.asarray(mask)[..., None], x.shape)
    y, dx, dparams, means, variances = [], [], [], [], []
    for part in parts:
        y.append(oracle.train(x[part], *params, mask=full[part]))
        dy = np.asarray(weight[part]) * np.cos(y[-1])
        *gradients, dbias = oracle.gradients(x[part], dy, params.scale, mask=full[part])
        dx.append(gradients[0])
        dparams.append((gradients[1], dbias))
        mean, var, count = oracle.moments(x[part], full[part])
        means.append(np.where(count > 0, mean, np.nan))
        variances.append(np.where(count > 1, var * count / np.maximum(count - 1, 1), np.nan))
    state = ((1 - momentum) * old + momentum * np.nanmean(new, 0) for old, new in ((0, means), (1, variances)))
    return np.concatenate(y), np.concatenate(dx), tuple(map(sum, zip(*dparams, strict=True))), tuple(state)


def assert_is(result, expected, units=64):
    y, dx, dparams, state = result
    assert_near((y, dx, tuple(dparams), tuple(state[:2])), expected, units)
    assert state.num_batches_tracked == 1
