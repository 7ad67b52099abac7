"""Finds out why a batch-normalized network evaluates worse than it trained.

`diagnose_linen` and `diagnose_nnx` run a network on some batches, and compare the running statistics of each
norm layer with the moments of its inputs. They need Flax. `diagnose_statistics` judges stored statistics alone. So does

    python -m jaxbn.diagnose CHECKPOINT

which reads .npz, .safetensors, Flax's .msgpack and Orbax folders, and exits with 1 if there are errors.
docs/troubleshooting.md explains each kind of finding.

Nothing that is passed is changed: neither variables nor models.

Sources: Ioffe & Szegedy (2015), arXiv:1502.03167; Wu & Johnson (2021), Rethinking "Batch" in BatchNorm,
arXiv:2105.07576 (train-test inconsistency); Kullback & Leibler (1951).
"""

from jaxbn.diagnose._api import diagnose_linen as diagnose_linen
from jaxbn.diagnose._api import diagnose_nnx as diagnose_nnx
from jaxbn.diagnose._api import diagnose_statistics as diagnose_statistics
from jaxbn.diagnose._command import main as main
from jaxbn.diagnose._report import Report as Report
from jaxbn.diagnose._results import Finding as Finding
from jaxbn.diagnose._results import LayerReport as LayerReport
from jaxbn.diagnose._results import NotChecked as NotChecked
from jaxbn.diagnose._thresholds import Thresholds as Thresholds
