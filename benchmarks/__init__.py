"""Measurements of the norms beside Flax's and PyTorch's: `python -m benchmarks --help` lists them."""
