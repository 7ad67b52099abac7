"""Loads weights from PyTorch and Keras, and writes them back for PyTorch: names, layouts, running statistics.

Neither library needs to be installed: the source is a mapping of names to arrays or tensors, or a `.safetensors`
file. docs/porting.md lists what else must agree for a ported network to compute the same.
"""

from jaxbn.interop._load import LoadReport as LoadReport
from jaxbn.interop._load import load_keras as load_keras
from jaxbn.interop._load import load_torch as load_torch
from jaxbn.interop._save import to_torch as to_torch
from jaxbn.interop._torch_batch_norm import batch_norm_from_torch as batch_norm_from_torch
from jaxbn.interop._torch_batch_norm import batch_norm_to_torch as batch_norm_to_torch
