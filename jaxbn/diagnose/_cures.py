"""What most likely led to a finding, and what to do about it, by kind of finding and by kind of model."""

from __future__ import annotations

import math

# What differs: the functions, Flax's two interfaces, and statistics of which nothing more is known.
_LAYERS = {
    "long_memory": "momentum=0.9 or momentum=0.99 in this layer",
    "momentum": "momentum={decay:g}",
    "cumulative": "momentum=None in jaxbn's layer",
}
_WORDS: dict[str | None, dict[str, str]] = {
    "functions": {
        "recalibrate": "jaxbn.recalibrate.recalibrate",
        "dropped": "the new state was dropped after each step",
        "keep": "carry on the state that batch_norm_train returns",
        "long_memory": "momentum=0.1 or momentum=0.01",
        "momentum": "momentum={weight:g}",
        "cumulative": "momentum=None",
    },
    "linen": {
        **_LAYERS,
        "recalibrate": "jaxbn.recalibrate.recalibrate_linen",
        "dropped": "the new batch_stats were dropped after each step",
        "keep": "carry on what apply(..., mutable=['batch_stats']) returns",
        "as_in_training": "use_running_average=False or train=True",
        "evaluate": "pass use_running_average=True, or train=False if the model takes that",
    },
    "nnx": {
        **_LAYERS,
        "recalibrate": "jaxbn.recalibrate.recalibrate_nnx",
        "dropped": "the new statistics stayed in jax.jit, which carries no change of a model out",
        "keep": "train under nnx.jit, or return nnx.state(model) from jax.jit and hand it to nnx.update",
        "as_in_training": "no model.eval(), or use_running_average=False",
        "evaluate": "call model.eval() before evaluation",
    },
    None: {
        "recalibrate": "jaxbn.recalibrate",
        "dropped": "the new statistics were dropped after each step",
        "keep": "carry on what training returns (the functions' state, Linen's batch_stats; NNX: nnx.jit, not jax.jit)",
        "long_memory": "0.9 or 0.99 in the layers, 0.1 or 0.01 in the functions",
        "momentum": "a decay of {decay:g} (momentum={weight:g} in the functions and in PyTorch)",
        "cumulative": "momentum=None",
    },
}

CURES = {
    "not_finite": (
        "training diverged, or a batch with NaN or infinity entered; running statistics never forget those",
        "start again from an earlier checkpoint or fresh statistics; find the batch, lower the learning rate, "
        "or pass mask to hide padding",
    ),
    "not_finite_input": (
        "the data, or a layer before this one, overflowed or divided by zero",
        "look at the first layer with this finding and at what is before it; pass mask if it is padding",
    ),
    "negative_variance": (
        "variances computed as E[x^2] - E[x]^2, averaged weights that left the statistics out, or a damaged file",
        "measure the statistics again: {recalibrate}",
    ),
    "untouched": (
        "{dropped}, left out of the checkpoint, or there was no training",
        "{keep}, and save it with the parameters",
    ),
    "initial_weight": (
        "too few batches for this momentum",
        "measure the statistics again: {recalibrate}; in training {enough}",
    ),
    "short_memory": (
        "momentum the wrong way round: layers take the decay of the old, functions the weight of the new batch",
        "{long_memory}",
    ),
    "drift": (
        "statistics that are not of this network on these data: too few or too small batches, weights changed "
        "afterwards (averaged, fine-tuned, pruned), other data than in training, or other preprocessing",
        "measure the statistics again: {recalibrate}; for other data see statistics per domain",
    ),
    "parting": (
        "the statistics of this layer are the first that do not fit; layers behind it inherit the difference",
        "see the findings about this layer first",
    ),
    "dead_channels": (
        "inputs that are constant: units that a ReLU before this layer shut off, a zero kernel, or an empty image",
        "lower the learning rate or change the initialization; a channel that stays dead can be removed",
    ),
    "near_constant": (
        "a large offset beside the signal: data that are not centred, or a huge bias before this layer",
        "centre the data, leave out the bias before a norm, and keep float32 before this layer",
    ),
    "eps_dominates": (
        "inputs much smaller than sqrt(eps): data in small units, or weights that decayed towards 0",
        "scale the data, exempt kernels before norms from weight decay, or choose a smaller eps, "
        "in training and evaluation alike",
    ),
    "few_values": (
        "small batches, per device or virtual, without many positions",
        "larger batches, axis_name over devices, a larger virtual_batch_size, batch renormalization, or group norm",
    ),
    "replicas": (
        "each device kept statistics of its own: pmap or shard_map without axis_name",
        "pass axis_name in training, or call jaxbn.sync_state before evaluation and before saving",
    ),
    "zero_scale": (
        "a residual branch that begins at 0, or a scale that received no gradient, or was pruned",
        "nothing in a fresh network; after training see that the optimizer has this parameter",
    ),
    "huge_bias": (
        "training diverged, or the bias has a learning rate of its own",
        "lower the learning rate, or clip gradients; the channel is a constant to what follows",
    ),
    "train_mode": (
        "the network was called as in training: {as_in_training}",
        "{evaluate}",
    ),
    "depends_on_batch": (
        "something is normalized by the batch in evaluation, by a norm in training mode or otherwise",
        "evaluate with running statistics; see the findings about train_mode",
    ),
}


def advice(kind: str, model: str | None, enough: str = "") -> tuple[str, str]:
    """Cause and cure of a kind of finding; `enough` is what `enough_batches` said."""
    cause, cure = CURES[kind]
    words = _WORDS[model] | {"enough": enough}
    return cause.format(**words), cure.format(**words)


def enough_batches(model: str | None, decay: float, seen: int, weight: float, shortest: float) -> str:
    """How to come down to `weight` of the initial statistics: more batches, or a decay not below `shortest`."""
    ways = []
    if decay < 1 and weight > 0:
        ways.append(f"{math.ceil(math.log(weight) / math.log(decay))} batches or more")
    # The weight of a new batch that does it in as many batches, rounded up to one digit.
    new = 1 - weight ** (1 / seen)
    unit = 10.0 ** math.floor(math.log10(new))
    new = math.ceil(new / unit) * unit
    if 1 - new >= shortest:
        ways.append(_WORDS[model]["momentum"].format(decay=1 - new, weight=new))
    return ", or ".join([*ways, _WORDS[model]["cumulative"]])
