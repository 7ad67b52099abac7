"""Reads the files in which training frameworks save arrays."""

from __future__ import annotations

import pathlib
import zipfile
from typing import Any

import jax
import numpy as np

from jaxbn._extras import need

# Files that only other libraries read: how to get the arrays.
_TORCH = "torch.load({path}, map_location='cpu')"
_KERAS = "{{w.path: w.numpy() for w in keras.models.load_model({path}).weights}}"
_ELSEWHERE = {".pt": _TORCH, ".pth": _TORCH, ".ckpt": _TORCH, ".keras": _KERAS, ".h5": _KERAS}


def load(path: str | pathlib.Path) -> Any:
    """Reads a checkpoint: .npz, .safetensors, Flax's .msgpack, or an Orbax folder."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a checkpoint, got {path}, which does not exist")
    try:
        return _read(path)
    except (OSError, ValueError, ImportError):
        raise
    # Each format has errors of its own for a damaged file.
    except Exception as error:
        raise ValueError(f"path: expected a checkpoint, got {path}, which cannot be read: {error}") from error


def _read(path: pathlib.Path) -> Any:
    if path.is_dir():
        return _load_orbax(path)
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise ValueError(
                f"path: expected a file that numpy.savez wrote, got {path}; it is damaged, or something else"
            )
        with np.load(path, allow_pickle=False) as file:
            try:
                return dict(file)
            except ValueError as error:
                raise ValueError(
                    f"path: expected named arrays, got {path} with Python objects in it; save a flat dictionary: "
                    "numpy.savez(path, **flax.traverse_util.flatten_dict(variables, sep='/'))"
                ) from error
    if path.suffix == ".safetensors":
        # By safetensors.flax, since NumPy alone has no bfloat16.
        return need("safetensors.flax", "to read .safetensors").load_file(path)
    if path.suffix == ".msgpack":
        return need("flax.serialization", "to read .msgpack").msgpack_restore(path.read_bytes())
    if path.suffix in _ELSEWHERE:
        tree = _ELSEWHERE[path.suffix].format(path=repr(str(path)))
        cure = f"in Python: jaxbn.diagnose.diagnose_statistics({tree})"
    else:
        cure = "for other files load the tree yourself and call jaxbn.diagnose.diagnose_statistics"
    raise ValueError(f"path: expected .npz, .safetensors, .msgpack or a folder of Orbax, got {path.name}; {cure}")


def _load_orbax(path: pathlib.Path) -> Any:
    ocp = need("orbax.checkpoint", "to read a folder of Orbax")
    steps = sorted((p.name for p in path.iterdir() if p.name.isdigit()), key=int)
    if steps:
        raise ValueError(
            f"path: expected the folder of one step, got {path}, which has the steps {', '.join(steps)}; "
            f"give {path / steps[-1]}"
        )
    # Orbax's checkpoint manager saves an item without a name under "default".
    folder = path / "default" if (path / "default").is_dir() else path
    if not (folder / "_METADATA").is_file():
        items = sorted(p.name for p in path.iterdir() if (p / "_METADATA").is_file())
        if items:
            raise ValueError(
                f"path: expected the folder of one item, got {path}, which has the items {', '.join(items)}; give "
                f"{path / items[0]}"
            )
        raise ValueError(f"path: expected a folder that Orbax saved, got {path}, which has no file _METADATA")
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = checkpointer.metadata(folder.absolute()).item_metadata.tree
    # As NumPy arrays, since the devices that saved them may not exist on this machine.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
