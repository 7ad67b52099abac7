"""What is compiled for GPUs and TPUs, on CPU."""

import jax
import pytest
from jax.interpreters import mlir

from jaxbn._kernel.platforms import FORMS


@pytest.fixture(name="platform", params=["cuda", "tpu"], scope="module", autouse=True)
def each_platform(request):
    # Programs that were lowered before are in JAX's caches.
    jax.clear_caches()
    for primitive, forms in FORMS.items():
        mlir.register_lowering(primitive, mlir.lower_fun(forms.get(request.param, forms["default"])), platform="cpu")
    yield request.param
    for primitive, forms in FORMS.items():
        mlir.register_lowering(primitive, mlir.lower_fun(forms.get("cpu", forms["default"])), platform="cpu")
    jax.clear_caches()
