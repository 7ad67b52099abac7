"""Every test runs with several CPU devices, and with everything JAX can be strict about."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Compiling is most of the time, and small programs are not faster compiled in parts.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

import hypothesis
import jax
import pytest
import unoptimized
from jax._src import compiler
from spending import pytest_addoption, pytest_configure  # noqa: F401
from versions import enable_x64

# Failed assertions of these modules show their values, as those of test modules do.
pytest.register_assert_rewrite("accuracy", "family", "near", "parallel", "virtual_batches")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The same examples in every run.
hypothesis.settings.register_profile("jaxbn", derandomize=True, deadline=None)
hypothesis.settings.load_profile("jaxbn")

# A program that was compiled once serves all workers of a run, and later runs: most of a first run is compiling.
CHECKOUT = pathlib.Path(__file__).parent.parent
CACHE = CHECKOUT / ".jax_cache"
# A checkout may be read-only; then each run compiles everything.
kept = str(CACHE) if os.access(CACHE if CACHE.exists() else CHECKOUT, os.W_OK) else None
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", kept))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# What optimization could change is tested in modules that are marked `optimized`.
compile_options = dict(unoptimized.OPTIONS)
get_compile_options = compiler.get_compile_options


def with_compile_options(*arguments, env_options_overrides, **more):
    """JAX has no public way to give options to every compilation."""
    # Without any, older versions pass None.
    overrides = compile_options | (env_options_overrides or {})
    return get_compile_options(*arguments, env_options_overrides=overrides, **more)


compiler.get_compile_options = with_compile_options


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiles a module's programs as it wants, and drops them behind it: all together take several gigabytes."""
    compile_options.clear()
    if not request.node.get_closest_marker("optimized"):
        compile_options.update(unoptimized.OPTIONS)
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    with enable_x64(True):
        yield
