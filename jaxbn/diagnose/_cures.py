"""The likely cause of each kind of finding and its cure, in the words of the interface in use."""

from __future__ import annotations

import math

from jaxbn.diagnose._evidence import Interface

# Words that differ between the functions, Flax's two interfaces, and statistics whose interface is unknown (None).
_LAYERS = {
    "long_memory": "momentum=0.9 or momentum=0.99 in this layer",
    "momentum": "momentum={decay:g}",
    "cumulative": "momentum=None in jaxbn's layer",
}
WORDS: dict[Interface | None, dict[str, str]] = {
    "functions": {
        "recalibrate": "jaxbn.recalibrate.recalibrate",
        "dropped": "the state that batch_norm_train returns was dropped after each step",
        "keep": "pass the state that batch_norm_train returns to the next step",
        "long_memory": "momentum=0.1 or momentum=0.01",
        "momentum": "momentum={weight:g}",
        "cumulative": "momentum=None",
    },
    "linen": {
        **_LAYERS,
        "recalibrate": "jaxbn.recalibrate.recalibrate_linen",
        "dropped": "the new batch_stats were dropped after each step",
        "keep": "pass the batch_stats that apply(..., mutable=['batch_stats']) returns to the next step",
        "as_in_training": "use_running_average=False or train=True",
        "evaluate": "pass use_running_average=True, or train=False if the model takes that",
    },
    "nnx": {
        **_LAYERS,
        "recalibrate": "jaxbn.recalibrate.recalibrate_nnx",
        "dropped": "the training step is compiled by jax.jit, which drops changes of the model",
        "keep": "compile the training step by nnx.jit, or return nnx.state(model) from jax.jit and call nnx.update",
        "as_in_training": "no model.eval(), or use_running_average=False",
        "evaluate": "call model.eval() before evaluation",
    },
    None: {
        "recalibrate": "jaxbn.recalibrate",
        "dropped": "the new statistics were dropped after each step",
        "keep": "pass what training returns to the next step (functions: state; Linen: batch_stats; NNX: use nnx.jit)",
        "long_memory": "0.9 or 0.99 in layers, 0.1 or 0.01 in functions",
        "momentum": "a decay of {decay:g} (momentum={weight:g} in the functions and in PyTorch)",
        "cumulative": "momentum=None",
    },
}

CURES = {
    "not_finite": (
        "training diverged, or one batch had NaN or infinity; running statistics keep those forever",
        "go back to an earlier checkpoint, or reset the statistics; then remove the batch, lower the learning rate, "
        "or hide padding by mask",
    ),
    "not_finite_input": (
        "the data, or a layer before this one, overflowed or divided by zero",
        "look at what comes before the first layer with this finding; hide padding by mask",
    ),
    "negative_variance": (
        "variances were computed as E[x^2] - E[x]^2, weights were averaged without the statistics, or the file is "
        "damaged",
        "measure the statistics again: {recalibrate}",
    ),
    "untouched": (
        "{dropped}; or the checkpoint was saved without them; or the network was not trained",
        "{keep}; save the statistics with the parameters",
    ),
    "untouched_alone": (
        "this layer was not called in training, or evaluates there (frozen), or no batch came to its domain; or the "
        "checkpoint that was restored has it by another name",
        "see that training calls it with use_running_average=False, and that its statistics are restored; or measure "
        "them: {recalibrate}",
    ),
    "zeroed": (
        "the statistics were not restored into the arrays that were made for them; or they are an average that begins "
        "at 0, and nothing entered it",
        "restore the statistics with the parameters, or measure them again: {recalibrate}",
    ),
    "initial_weight": (
        "too few batches for this momentum",
        "measure the statistics again: {recalibrate}; in training use {enough}",
    ),
    "short_memory": (
        "momentum the wrong way round: layers take the weight of the old statistics, functions that of the new batch",
        "use {long_memory}",
    ),
    "drift": (
        "the statistics are not those of this network on these data: weights changed afterwards (averaged, "
        "fine-tuned, pruned), other data or preprocessing than in training, or too few or too small batches",
        "for the data of training, measure the statistics again: {recalibrate}; for other data, keep statistics for "
        "each domain",
    ),
    "parting": (
        "this is the first layer whose statistics do not fit; later layers inherit the difference",
        "fix the other findings about this layer first",
    ),
    "dead_channels": (
        "the input is constant: units before this layer that ReLU has shut off, a kernel of zeros, or empty images",
        "lower the learning rate or change the initialization; remove channels that stay constant",
    ),
    "dead_or_zeroed": (
        "the input is 0: units before this layer that ReLU has shut off, or a kernel of zeros; or the statistics of "
        "this layer were not restored, where those of others were",
        "diagnose the model on batches, which tells the two apart; restore the statistics, or lower the learning rate",
    ),
    "near_constant": (
        "a large offset beside a small signal: data that are not centred, or a huge bias before this layer",
        "centre the data, leave out the bias before a norm, and keep float32 before this layer",
    ),
    "eps_dominates": (
        "the input is much smaller than sqrt(eps): data in small units, or weights that decayed towards 0",
        "scale the data, exclude the kernel before the norm from weight decay, or use a smaller eps in training and "
        "evaluation",
    ),
    "few_values": (
        "small batches (on each device, or virtual ones) with few positions",
        "use larger batches, axis_name over devices, a larger virtual_batch_size, batch renormalization, or group norm",
    ),
    "replicas": (
        "each device keeps its own statistics: pmap or shard_map without axis_name",
        "pass axis_name in training, or call jaxbn.sync_state before evaluation and before saving",
    ),
    "zero_scale": (
        "a residual branch that starts at 0, a scale that gets no gradient, or a scale that was pruned",
        "in a fresh network, nothing; after training, check that the optimizer updates this parameter",
    ),
    "huge_bias": (
        "training diverged, or the bias has a learning rate of its own",
        "lower the learning rate or clip gradients; later layers see this channel as a constant",
    ),
    "train_mode": ("the network was called as in training: {as_in_training}", "{evaluate}"),
    "depends_on_batch": (
        "something uses the other examples of the batch in evaluation: a norm in training mode, or other code",
        "fix train_mode first, if it was found; otherwise look for code that reduces over the batch axis",
    ),
}


def enough_batches(interface: Interface | None, decay: float, seen: int, weight: float, shortest: float) -> str:
    """How to bring the weight of the initial statistics down to `weight`: more batches, or a decay >= `shortest`."""
    ways = []
    if decay < 1 and weight > 0:
        ways.append(f"{math.ceil(math.log(weight) / math.log(decay))} batches or more")
    # The weight of a new batch that is enough in as many batches as were seen, rounded up to one digit.
    new = 1 - weight ** (1 / seen)
    unit = 10.0 ** math.floor(math.log10(new))
    new = math.ceil(new / unit) * unit
    if 1 - new >= shortest:
        ways.append(WORDS[interface]["momentum"].format(decay=1 - new, weight=new))
    return ", or ".join([*ways, WORDS[interface]["cumulative"]])
