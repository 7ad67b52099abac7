"""Measures running statistics anew, without changing the weights.

When weights are averaged (SWA, EMA), fine-tuned, pruned or taken from a larger network, or when the data come from
another domain, the running statistics no longer describe the network's activations. These functions measure them: for
each batch norm layer, the mean and variance of its inputs over all values of all batches.

The inputs of a layer depend on how the layers before it normalize. There are two methods:

- `method="layerwise"`, the default: they normalize by their new running statistics, as in evaluation. The result is
  exact: when the network is evaluated, each layer's input has the stored mean and variance, however the data are cut
  into batches. A network of n norms, each behind the other, takes n passes over the data. Norms that do not depend on
  each other share a pass: if at most k are behind each other, k + 1 passes, the last of which shows that nothing
  changes. The data must be the same in each pass. Their order may differ; with random augmentation the result is as
  exact as one pass over them.
- `method="batchwise"`: they normalize by the moments of the batch. It takes one pass, as fvcore's precise batch norm
  does. The inputs of deeper layers then depend a little on the batches, so use large ones. The statistics of the first
  layer are exact, and with a single batch those of all layers. It is the better choice if n passes take too long (50 in
  a ResNet-50) and batches are as large as in training, or if the data cannot be had twice.

With both methods, mean and variance are those of all values together. torch.optim.swa_utils.update_bn, which is
batchwise, averages the means and the variances of the batches instead. With batches of one size the mean is the same,
but the variance lacks that of the batches' means: for two batches with means 0 and 3 and variance 1 it stores 1, and
the variance of all values is 1 + 1.5**2.

A layer that is called several times gets the statistics of all its inputs. Layerwise these depend on themselves, and it
is an error if they do not converge. `virtual_batch_size` has no effect here.

There is a warning if fewer than 16 values enter statistics and the old ones, unless they are the initial ones, fit
them as `jaxbn.diagnose` judges: the new ones are then probably worse than what they replace.

Batches and masks may have any sizes: moments are weighted by counts. A batch of another shape costs one more
compilation. Under jax.jit batches may be sharded over devices; the result is that of one device. No gradient is kept.

`recalibrate` and `recalibrate_linen` return new states or variables, and change none that are passed.
`recalibrate_nnx` sets the new statistics in the model and returns the model. This is the rule for all tools: Linen
variables and arrays are never changed; for NNX, tools that only set values or options change the model in place and
return it, and tools that change its structure (`jaxbn.fold.fold_nnx`) return a new model.
"""

from jaxbn.recalibrate._api import recalibrate as recalibrate
from jaxbn.recalibrate._api import recalibrate_linen as recalibrate_linen
from jaxbn.recalibrate._api import recalibrate_nnx as recalibrate_nnx
