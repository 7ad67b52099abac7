"""Weights from PyTorch and Keras, and back to PyTorch: names, layouts, running statistics.

Needs neither of them: a state dict is a mapping of names to arrays or tensors, or a `.safetensors` file.
docs/porting.md says what else has to agree for a ported network to compute the same.
"""

from jaxbn.interop._load import LoadReport as LoadReport
from jaxbn.interop._load import load_keras as load_keras
from jaxbn.interop._load import load_torch as load_torch
from jaxbn.interop._load import to_torch as to_torch
from jaxbn.interop._torch_batch_norm import batch_norm_from_torch as batch_norm_from_torch
from jaxbn.interop._torch_batch_norm import batch_norm_to_torch as batch_norm_to_torch
