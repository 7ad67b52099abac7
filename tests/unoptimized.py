"""Compiling without optimization, which takes less than half of the time."""

import jax


def is_known(option, value):
    """Whether XLA has the option; which it has depends on its version."""
    try:
        jax.jit(lambda x: x, compiler_options={option: value}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
OPTIONS = {option: value for option, value in OPTIONS.items() if is_known(option, value)}

# The same for a process of its own.
ENVIRONMENT = {"XLA_FLAGS": " ".join(f"--{option}={str(value).lower()}" for option, value in OPTIONS.items())}
