"""Running statistics measured anew, with the weights as they are.

After weights were averaged (SWA, EMA), fine-tuned, pruned or taken from a larger network, or when the data
come from another domain, the running statistics are those of another network. They can be measured:
of each batch norm layer the mean and variance of its inputs, over all values of all batches.

What enters a layer depends on the layers before it, so it has to be said how those normalize meanwhile:

- `method="layerwise"`, the default, by their recalibrated running statistics, as in evaluation. The result
  is exact: in the network as it will be evaluated, each layer's input has the stored mean and variance,
  however the data are cut into batches. It goes through the data once for each layer that has others before
  it, and stops when nothing changes: layers side by side cost no more than one. The data must be the same each
  time (shuffled will do; with random augmentation the result is as exact as one pass over them).
- `method="batchwise"`, by the moments of each batch, in one pass, as fvcore's precise batch norm. What enters
  deeper layers then depends a little on the batches: take large ones. The first layer's statistics are exact,
  and with a single batch all of them.

Either way mean and variance are those of all values together. torch.optim.swa_utils.update_bn, which is
batchwise too, takes the means over batches of their means and of their variances instead: with batches of one
size the mean is the same, but the variance lacks what the batches' means differ by. Of two batches with means
0 and 3 and variance 1 it remembers a variance of 1, where that of all values is 1 + 1.5**2.

A layer that is called several times has the statistics of all its inputs; layerwise these depend on
themselves, and it is an error if they do not settle. `virtual_batch_size` does not matter here.

Counts weigh: batches and masks may be of any sizes. A batch of another shape costs one more compilation.
Under jax.jit batches may be sharded over devices, and the result is that of one device. No gradient is kept.
"""

from jaxbn.recalibrate._api import recalibrate as recalibrate
from jaxbn.recalibrate._api import recalibrate_linen as recalibrate_linen
from jaxbn.recalibrate._api import recalibrate_nnx as recalibrate_nnx
