"""The limits beyond which something is a finding."""

from __future__ import annotations

import dataclasses

from jaxbn._statistics.drift import FEW_VALUES, NOISE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The limits beyond which something is a finding; for the argument `thresholds` of `jaxbn.diagnose`'s functions.

    Attributes:
      initial_weight: a larger weight of the initial mean 0 and variance 1 in the running statistics is a
        warning. A hundredth of a variance of 1 is negligible where variances are around 1.
      initial_weight_error: a larger weight is an error: less than half of the statistics comes from data.
      short_memory: a smaller decay is a warning. 0.5 averages over three batches, which is rarely intended.
        0.1 in a layer that takes the decay is usually PyTorch's 0.1, which means a decay of 0.9.
      difference: for `drift` and `parting`. A larger root mean square difference between the layer's outputs for the
        same input in training and in evaluation, in units of its normalized output, is a warning. A quarter of a
        standard deviation is more than the sampling noise of 24 independent examples; see `noise`.
      difference_error: a larger difference is an error: it is as large as the output itself.
      noise: a difference is a finding only if it exceeds the one expected from sampling alone so many times.
        The mean of n values is off by `1 / sqrt(n)` standard deviations, and the standard deviation by
        `1 / sqrt(2 n)` of itself; together `sqrt(1.5 / n)`. n counts examples and not their positions,
        which are correlated.
      few_values: fewer values per statistic are a warning: with 16 the variance is off by a third
        (`sqrt(2 / n)`). Channels of which all batches together have fewer are judged by their running variance.
      dead: for `dead_channels`. A channel with a variance below this fraction of eps is constant.
      constant: for `near_constant`. A standard deviation below this fraction of the mean is a warning: half precision,
        with 11 bits, cannot tell such values apart.
      eps_share: for `eps_dominates`. Variances below eps are a note, or a warning if this share of the channels has
        them.
      replicas: replicas that differ by more standard deviations are a warning. Rounding explains 1e-6.
      replicas_error: replicas that differ by more standard deviations are an error.
      huge_bias: a larger |bias|, in units of the median |scale| (1 if that is less), is a warning. Normalized
        values beyond 50 standard deviations do not occur, so what follows sees a constant.
      composition: for `depends_on_batch`. A larger difference between the outputs of the same examples beside others
        and beside copies of the first, in batches of the same size, relative to the root mean square output, is an
        error. There is none if the examples do not depend on each other, in whatever precision the network computes.

    Example:
      >>> from jaxbn.diagnose import Thresholds
      >>> Thresholds(difference=0.5).few_values
      16
    """

    initial_weight: float = 0.01
    initial_weight_error: float = 0.5
    short_memory: float = 0.5
    difference: float = 0.25
    difference_error: float = 1.0
    noise: float = NOISE
    few_values: int = FEW_VALUES
    dead: float = 1e-6
    constant: float = 5e-4
    eps_share: float = 0.5
    replicas: float = 1e-3
    replicas_error: float = 0.5
    huge_bias: float = 50.0
    composition: float = 1e-3
