"""How far statistics differ from those of some data, and how far they may by chance.

All of it is float64 NumPy on the host: what judges the kernel's results must not depend on the kernel.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# With fewer values, the variance is off by more than a third.
FEW_VALUES = 16
# A difference counts if it is more than this many times the difference that is expected from sampling alone.
NOISE = 2.0


def are_initial(mean: npt.ArrayLike, var: npt.ArrayLike) -> bool:
    """Whether running statistics have the values with which every layer begins."""
    return bool((np.asarray(mean) == 0).all() and (np.asarray(var) == 1).all())


def sampling_noise(n: float) -> float:
    """The difference expected from sampling n values: means are off by `1 / sqrt(n)`, deviations by `1 / sqrt(2 n)`."""
    return math.sqrt(1.5 / n)


def few_values(n: float) -> str:
    """Returns the phrase that says how far statistics of n values are off."""
    if n <= 1:
        return "1 value per statistic, which has no variance"
    return f"{n:g} values per statistic: the variance is off by {math.sqrt(2 / n):.0%}"


@dataclasses.dataclass(frozen=True)
class Drift:
    """How the moments of a batch differ from the running statistics, per channel; float64 [C].

    Formula, with m, v the mean and variance of the batch (b) and of the running statistics (r), and eps
    added to both variances, as the layer does:
    `shift = |m_b - m_r| / sqrt(v_r)`; `ratio = v_b / v_r`;
    `divergence = (v_b / v_r + v_r / v_b - 2 + (m_b - m_r)**2 * (1 / v_b + 1 / v_r)) / 2`, the symmetric
    Kullback-Leibler divergence of two Gaussians;
    `difference = sqrt((sqrt(ratio) - 1)**2 + shift**2)`, the root mean square difference between the same input
    normalized by the batch and by the running statistics, if eps is small beside v_b.

    Source: Kullback & Leibler (1951), On information and sufficiency, equation 2.6.
    """

    shift: Array
    ratio: Array
    divergence: Array
    difference: Array

    @property
    def total(self) -> float:
        """The root mean square difference over all channels."""
        return math.sqrt(float(np.mean(self.difference**2)))


def compare(running: tuple[Array, Array], batch: tuple[Array, Array], eps: float) -> Drift:
    """Compares mean and variance of running statistics with those of a batch."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        v_b, v_r = batch[1] + eps, running[1] + eps
        d = batch[0] - running[0]
        shift, ratio = np.abs(d) / np.sqrt(v_r), v_b / v_r
        divergence = (ratio + 1 / ratio - 2 + d * d * (1 / v_b + 1 / v_r)) / 2
        # The output normalized by the batch has the variance batch[1] / v_b, a little less than 1.
        difference = np.sqrt((np.sqrt(ratio) - 1) ** 2 * batch[1] / v_b + shift**2)
    return Drift(shift, ratio, divergence, difference)
