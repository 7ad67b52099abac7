"""The versions of JAX and Flax that tests run with."""

import importlib.metadata

import jax
import pytest


def installed(package):
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:3])


def needs(reason, **versions):
    """Skips a test where a package is older than the version given by its name, because of what that one lacks."""
    older = [
        f"{package} {version}"
        for package, version in versions.items()
        if installed(package) < tuple(map(int, version.split(".")))
    ]
    return pytest.mark.skipif(bool(older), reason=f"needs {' and '.join(older)}: {reason}")


if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # before JAX 0.8
    from jax.experimental import enable_x64 as enable_x64
