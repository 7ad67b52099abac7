"""What tests need of the versions of JAX and Flax that they run with."""

import importlib.metadata

import jax
import pytest
from jax._src import monitoring


def version(text):
    return tuple(map(int, text.split(".")[:3]))


def is_older(package, text):
    return version(importlib.metadata.version(package)) < version(text)


def needs(reason, **packages):
    """Skips a test that needs these versions of packages, or newer, where one of them is older."""
    older = [f"{package} {text}" for package, text in packages.items() if is_older(package, text)]
    return pytest.mark.skipif(bool(older), reason=f"needs {' and '.join(older)}: {reason}")


EXACT_SUMS = needs("older sums along one axis are less exact on CPU", jax="0.10.2")

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
    unregister_duration_listener = jax.monitoring.unregister_event_duration_listener
else:  # before JAX 0.8
    from jax.experimental import enable_x64 as enable_x64

    unregister_duration_listener = monitoring._unregister_event_duration_listener_by_callback


def nnx_list(modules):
    """Modules as NNX keeps several: before Flax 0.12 in a list."""
    from flax import nnx

    return nnx.List(modules) if hasattr(nnx, "List") else list(modules)
