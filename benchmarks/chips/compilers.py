"""The chips that programs are compiled for, and what their compilers need on a machine without them."""

from __future__ import annotations

import importlib.util
import os

# XLA's GpuTargetConfigProto of an H100 SXM, which XLA would otherwise get from the driver.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
CHIPS = ("h100", "v5e")
# Of TPU devices along each side of a square.
_SIDES = {4: 2, 16: 4, 64: 8, 256: 16}


def environment(chip: str) -> dict[str, str]:
    """The environment of a process that compiles for `chip`; JAX reads it when it is imported."""
    common = os.environ | {"JAX_PLATFORMS": "cpu"}
    if chip == "h100":
        flags = f"--xla_gpu_cuda_data_dir={_folder('nvidia.cuda_nvcc')} --xla_gpu_autotune_level=0"
        return common | {"CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
    _folder("libtpu")
    return common | {
        # libtpu must not ask a metadata server which TPU there is, nor lock out other processes.
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }


def devices(chip: str, number: int, slices: int = 1) -> list:
    """The devices of one host of GPUs, or of squares of TPUs that only a slower network joins."""
    from jax.experimental import topologies

    if chip == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100, topology=f"1x1x{number}").devices
    # The smallest square has four.
    side = _SIDES[max(number // slices, 4)]
    joined = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{side}x{side}", **joined).devices[:number]


def _folder(package: str) -> str:
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise SystemExit(
            f"{package}: not installed, and the compiler is in it; see python -m benchmarks programs --help"
        )
    return next(iter(found.submodule_search_locations))
