"""The three functions that diagnose: a Linen model, an NNX model, or statistics alone."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from jaxbn._extras import needs_flax
from jaxbn.diagnose._evidence import make_norms
from jaxbn.diagnose._find import find_layers
from jaxbn.diagnose._report import Report
from jaxbn.diagnose._rules import judge, not_checked, ranked
from jaxbn.diagnose._thresholds import Thresholds

if TYPE_CHECKING:
    import flax.linen as nn
    from flax import nnx

_Model = TypeVar("_Model", bound="nnx.Module")


def diagnose_linen(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: object,
    *,
    call: Callable[[Callable[..., Any], Any], object] | None = None,
    steps: int | None = None,
    train_batch_size: int | None = None,
    thresholds: Thresholds = Thresholds(),
    progress: bool = False,
) -> Report:
    """Compares a Linen model as it evaluates with the model in which each norm normalizes by its batch.

    Formula, per channel, with m, v the moments of all batches together (b) and the running statistics (r), and
    eps added to the variances: `shift = |m_b - m_r| / sqrt(v_r)`, `ratio = v_b / v_r`,
    `own**2 = mean((sqrt(ratio) - 1)**2 + shift**2)` over channels. The moments are measured while all layers
    normalize by the batch, so that what is wrong with one layer is not blamed on the next.

    Args:
      model: the module; its `BatchNorm` layers may be Flax's or jaxbn's.
      variables: all that `model.init` returned, with parameters and `batch_stats` as they are now; not changed.
      batches: an array, or a list (any iterable) of batches, each what `call` takes, with examples first;
        a batch that is a tuple must be in a list.
      call: `call(apply, batch)` evaluates the model on a batch, where `apply` is `model.apply` with the variables
        given; by default `apply(batch)`. For a model that takes `train`: `call=lambda apply, x: apply(x, train=False)`.
        It returns the output. It is compiled by jax.jit, but not again if the same function is passed again.
      steps: how many batches the running statistics have seen, for layers without `num_batches_tracked`. It is used
        for layers with a 0 there, too, if their statistics are not the initial ones.
      train_batch_size: how many examples share a statistic in training (on each device, if devices do
        not share); by default as many as a batch has here.
      thresholds: from where on something is a finding.
      progress: show a progress bar (tqdm), if there is a terminal.

    Returns:
      A `Report`. Layers that `nn.scan` or `nn.vmap` stacks along first axes, and domains, are layers of their own, by
      names such as `norm[1, 2]`.

    Raises:
      ValueError: `variables` has no `batch_stats`, or `nn.scan` broadcasts them; there are no batches, no norm
        layer is called, or `steps` is negative.
      TypeError: a subclass of `BatchNorm` does not call its base class; or there is no `call`, and the model fails
        on batches that are tuples, lists or dictionaries.
      ImportError: Flax is not installed, or tqdm for `progress`.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167; Wu & Johnson (2021), arXiv:2105.07576.

    Example:
      >>> import jax
      >>> from jaxbn.diagnose import diagnose_linen
      >>> from jaxbn.linen import BatchNorm
      >>> x = jax.random.normal(jax.random.key(0), (64, 4)) + 3
      >>> model = BatchNorm(use_running_average=True)
      >>> report = diagnose_linen(model, model.init(jax.random.key(0), x), x)
      >>> [(f.severity, f.kind) for f in report.findings]
      [('error', 'untouched'), ('error', 'parting')]
    """
    with needs_flax("jaxbn.diagnose.diagnose_linen"):
        from jaxbn.diagnose._examine import examine
        from jaxbn.diagnose._measure import linen_network

    _check_steps(steps)
    network = linen_network(model, variables, call)
    return examine(
        network, batches, steps=steps, train_batch_size=train_batch_size, thresholds=thresholds, progress=progress
    )


def diagnose_nnx(
    model: _Model,
    batches: object,
    *,
    call: Callable[[_Model, Any], object] | None = None,
    steps: int | None = None,
    train_batch_size: int | None = None,
    thresholds: Thresholds = Thresholds(),
    progress: bool = False,
) -> Report:
    """Diagnoses an NNX model as `diagnose_linen` does a Linen model; call `model.eval()` first, as for evaluation.

    Formula: that of `diagnose_linen`.

    Args:
      model: the module; its `BatchNorm` layers may be Flax's or jaxbn's. Batches run through copies of it.
      batches: as in `diagnose_linen`.
      call: `call(model, batch)` evaluates the model on a batch, where `model` is a copy; by default `model(batch)`.
        It returns the output. It is compiled by jax.jit, but not again if the same function is passed again.
      steps, train_batch_size, thresholds, progress: as in `diagnose_linen`.

    Returns:
      A `Report`.

    Raises:
      ValueError, TypeError, ImportError: as `diagnose_linen`.

    Source: that of `diagnose_linen`.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxbn.diagnose import diagnose_nnx
      >>> from jaxbn.nnx import BatchNorm
      >>> model = BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (64, 4)) + 3
      >>> for _ in range(50):
      ...     y = model(x)
      >>> model.eval()
      >>> print(diagnose_nnx(model, x, steps=50).summary())
      1 norm layer: no findings; outputs in train and eval mode differ by 0.017
    """
    with needs_flax("jaxbn.diagnose.diagnose_nnx"):
        from jaxbn.diagnose._examine import examine
        from jaxbn.diagnose._measure import nnx_network

    _check_steps(steps)
    network = nnx_network(model, call)
    return examine(
        network, batches, steps=steps, train_batch_size=train_batch_size, thresholds=thresholds, progress=progress
    )


def diagnose_statistics(
    tree: object,
    *,
    eps: float = 1e-5,
    decay: float | None = None,
    cumulative: bool = False,
    steps: int | None = None,
    replica_axis: int | None = None,
    thresholds: Thresholds = Thresholds(),
) -> Report:
    """Judges running statistics and parameters as they are stored, without a model or data.

    Formula: the weight of the initial mean 0 and variance 1 in a state that has seen k batches is `decay**k`.
    Replicas disagree by `max |mean_i - mean| / sqrt(var + eps)`, where mean and var are averages over replicas, and
    by the corresponding differences of standard deviations, scales and biases.

    Args:
      tree: any tree of arrays of JAX, NumPy or PyTorch: Linen's variables, an NNX state, jaxbn's states, a whole
        training state, PyTorch's state_dict, Keras' weights by name. Layers are found by the names `mean` and
        `var` (Flax, jaxbn), `running_mean` and `running_var` (PyTorch) or `moving_mean` and `moving_variance` (Keras,
        with or without `:0`), shape [C], with scale, bias and `num_batches_tracked` beside them if there are any.
        Layers that are stacked along first axes (models, loops, domains) are judged one by one, by names such as
        `norm[1, 2]`, if `num_batches_tracked` has these axes: [M, D] for a mean [M, D, C]. With one number for the
        whole stack, or none, nothing tells axes of layers from feature axes, and all values are channels of one layer:
        split the tree, or give the model to `diagnose_linen` or `diagnose_nnx`, which know.
      eps: what the network adds to variances; checkpoints do not say it.
      decay: of the running statistics: Flax's momentum, or 1 minus PyTorch's. Checkpoints do not say it; without it
        nobody can tell whether the statistics have seen enough batches.
      cumulative: whether they are averages over all batches instead (momentum None).
      steps: how many batches the statistics have seen, for layers without `num_batches_tracked`. It is used for layers
        with a 0 there, too, if their statistics are not the initial ones: converters write 0 for an unknown count.
        It is not used for stacked layers, which may be domains, each with batches of its own.
      replica_axis: the axis of devices, if statistics have one more axis than their layers: 0 for what
        pmap gives. Replicas are compared, and their mean is judged.
      thresholds: from where on something is a finding.

    Returns:
      A `Report` without drift, as nothing is known about the data; its `not_checked` says what was not looked for.

    Raises:
      ValueError: there are no running statistics in `tree`, or they have no such axis; the axes of
        `num_batches_tracked` are not their first ones; `decay` is not between 0 and 1, or `steps` is negative.

    Source: Ioffe & Szegedy (2015), arXiv:1502.03167, algorithm 2; Wu & Johnson (2021), arXiv:2105.07576.

    Example:
      >>> import jaxbn
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> _, state = jaxbn.batch_norm_init(8)
      >>> report = diagnose_statistics({"stem": state}, steps=1000)
      >>> [(f.severity, f.kind, f.layer) for f in report.findings]
      [('note', 'untouched', 'stem')]
    """
    _check_steps(steps)
    if decay is not None and not 0 <= decay <= 1:
        raise ValueError(
            f"decay: expected the weight of the old statistics, between 0 and 1, got {decay}; "
            "it is Flax's momentum, and 0.9 where PyTorch's is 0.1"
        )
    norms = [
        norm
        for path, interface, arrays in find_layers(tree)
        for norm in make_norms(
            path,
            arrays,
            interface=interface,
            eps=eps,
            decay=decay,
            cumulative=cumulative,
            steps=steps,
            replica_axis=replica_axis,
        )
    ]
    findings = ranked(judge(norms, thresholds), norms)
    return Report([norm.report() for norm in norms], findings, not_checked=not_checked(norms, alone=True))


def _check_steps(steps: int | None) -> None:
    if steps is not None and (not isinstance(steps, numbers.Integral) or steps < 0):
        raise ValueError(f"steps: expected how many batches were seen, a whole number or None, got {steps!r}")
