"""Reads the files in which training frameworks save arrays."""

from __future__ import annotations

import io
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._arrays import read_safetensors
from jaxbn._extras import need
from jaxbn.diagnose._find import NAMES

_Tree = Any


class _CheckpointError(ValueError):
    """Says what is wrong with a file, unlike the errors of the library that reads it."""


def load(path: str | pathlib.Path) -> _Tree:
    """Reads a checkpoint: a file with one of the endings in `READERS`, or a folder of Orbax."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"path: expected a checkpoint, got {path}, which does not exist")
    reader = _read_orbax if path.is_dir() else READERS.get(path.suffix)
    if reader is None:
        raise ValueError(
            f"path: expected {', '.join(READERS)} or a folder of Orbax, got {path.name}; for other files load the "
            "tree yourself and call jaxbn.diagnose.diagnose_statistics"
        )
    expected = "a folder of Orbax" if path.is_dir() else path.suffix
    try:
        return reader(path)
    except (_CheckpointError, ImportError):
        raise
    # Each format has errors of its own for a damaged file; their first line says enough.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"path: expected a checkpoint, got {path}, which cannot be read: {reason}; it is damaged, or something "
            f"else than {expected}"
        ) from error


def _read_npz(path: pathlib.Path) -> _Tree:
    if not zipfile.is_zipfile(path):
        raise _CheckpointError(
            f"path: expected a file that numpy.savez wrote, got {path}; it is damaged, or something else"
        )
    with np.load(path, allow_pickle=False) as file:
        try:
            return dict(file)
        except ValueError as error:
            raise _CheckpointError(
                f"path: expected named arrays, got {path} with Python objects in it; save a flat dictionary: "
                "numpy.savez(path, **flax.traverse_util.flatten_dict(variables, sep='/'))"
            ) from error


def _read_msgpack(path: pathlib.Path) -> _Tree:
    return need("flax.serialization", "to read .msgpack").msgpack_restore(path.read_bytes())


def _read_torch(path: pathlib.Path) -> _Tree:
    torch = need("torch", f"to read {path.suffix}", "torch")
    expression = f"torch.load({str(path)!r}, map_location='cpu')"
    try:
        tree = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise _CheckpointError(f"path: expected a state dict, got {path}, {_torch_cure(str(path), error)}") from error
    while isinstance(tree, Mapping):
        inner = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
        inside = [key for key, value in inner.items() if _has_statistics(value)]
        if not inside or _has_statistics({key: value for key, value in tree.items() if key not in inner}):
            break
        if len(inside) > 1:
            raise _CheckpointError(
                f"path: expected one state dict, got {path} with {', '.join(map(repr, inside))}; in Python: "
                f"jaxbn.diagnose.diagnose_statistics({expression}[{inside[0]!r}])"
            )
        tree, expression = tree[inside[0]], f"{expression}[{inside[0]!r}]"
    return tree


def _torch_cure(path: str, error: Exception) -> str:
    """What a file is instead of a state dict, and what to do. (PyTorch advises to run what is in it.)"""
    in_python = "in Python: jaxbn.diagnose.diagnose_statistics(torch."
    if "TorchScript" in str(error):
        return f"which is a TorchScript archive; {in_python}jit.load({path!r}).state_dict())"
    if refused := re.search(r"GLOBAL (\S+) was not an allowed global", str(error)):
        return (
            f"which has a {refused[1]} in it; save model.state_dict(), or if you trust the file, {in_python}load("
            f"{path!r}, map_location='cpu', weights_only=False)), with .state_dict() if it is a module"
        )
    return "which torch.save has not written, or which is damaged"


def _has_statistics(tree: Mapping[object, object]) -> bool:
    names = {*_names(tree)}
    pairs = [(f".{mean}", f".{var}") for mean, var, *_ in NAMES]
    return any(name.endswith(mean) and name.removesuffix(mean) + var in names for name in names for mean, var in pairs)


def _names(tree: object, outer: str = "") -> Iterator[str]:
    """The names of the leaves of mappings, each after a dot."""
    if not isinstance(tree, Mapping):
        yield outer
        return
    for key, value in tree.items():
        yield from _names(value, f"{outer}.{key}")


# Keras 3 numbers the variables of a layer. Its group has the name of its class.
_KERAS_NORM = re.compile(r"(?P<layer>(.*/)?(sync_)?batch_normalization(_\d+)?)/vars/(?P<number>\d+)")
# By how many there are. A third one is the scale or the bias, and the file does not say which.
_KERAS_VARIABLES = {
    4: ("gamma", "beta", "moving_mean", "moving_variance"),
    3: ("gamma_or_beta", "moving_mean", "moving_variance"),
    2: ("moving_mean", "moving_variance"),
}


def _read_keras(path: pathlib.Path) -> _Tree:
    h5py = need("h5py", f"to read {path.suffix}", "h5py")
    source: object = path
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            source = io.BytesIO(archive.read("model.weights.h5"))
    arrays: dict[str, np.ndarray] = {}
    numbered: dict[str, dict[int, np.ndarray]] = {}
    with h5py.File(source) as file:

        def visit(name: str, item: Any) -> None:
            if not isinstance(item, h5py.Dataset):
                return
            if match := _KERAS_NORM.fullmatch(name):
                numbered.setdefault(_keras_path(file, match["layer"]), {})[int(match["number"])] = item[()]
            else:
                arrays[name.removeprefix("model_weights/")] = item[()]

        file.visititems(visit)
    for layer, values in numbered.items():
        if len(values) not in _KERAS_VARIABLES:
            raise _CheckpointError(
                f"path: expected 2 to 4 variables of {layer}, got {len(values)} in {path}; in Python: "
                "jaxbn.diagnose.diagnose_statistics({w.path: w.numpy() for w in "
                f"keras.saving.load_model({str(path)!r}).weights}})"
            )
        for name, (_, value) in zip(_KERAS_VARIABLES[len(values)], sorted(values.items()), strict=True):
            arrays[f"{layer}/{name}"] = value
    return arrays


def _keras_path(file: Any, group: str) -> str:
    """The names of the layers that lead to a group, where newer files have them, or else those of their classes."""
    parts = group.split("/")
    names = []
    for count, part in enumerate(parts, 1):
        own = file.get("/".join((*parts[:count], "vars")))
        names.append(part if own is None else str(own.attrs.get("name", part)))
    return "/".join(name for name, part in zip(names, parts, strict=True) if part != "layers")


def _read_orbax(path: pathlib.Path) -> _Tree:
    ocp = need("orbax.checkpoint", "to read a folder of Orbax")
    item = _orbax_item(path)
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = checkpointer.metadata(item.absolute()).item_metadata.tree
    # As NumPy arrays, since the devices that saved them may not exist on this machine.
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return checkpointer.restore(item.absolute(), args=ocp.args.PyTreeRestore(restore_args=as_numpy))


def _orbax_item(path: pathlib.Path) -> pathlib.Path:
    """The folder of a tree: this one, or the only item of a manager's step, or of the newest of its steps."""
    folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir()}
    items = {name: p for name, p in folders.items() if (p / "_METADATA").is_file()}
    if (path / "_METADATA").is_file():
        return path
    # A step is a number, after the manager's prefix if it has one.
    steps = {name: re.fullmatch(r"(?:[^.]*_)?(\d+)", name) for name in folders if name.isdigit() or name not in items}
    if numbered := {int(match[1]): name for name, match in steps.items() if match}:
        return _orbax_item(folders[numbered[max(numbered)]])
    if len(items) == 1 or "default" in items:
        # An item without a name is saved under "default".
        return items.get("default", next(iter(items.values())))
    if items:
        raise _CheckpointError(
            f"path: expected the folder of one item, got {path}, which has the items {', '.join(items)}; give "
            f"{next(iter(items.values()))}"
        )
    raise _CheckpointError(f"path: expected a folder that Orbax saved, got {path}, which has no file _METADATA")


READERS = {
    ".npz": _read_npz,
    ".safetensors": lambda path: read_safetensors(path, "its arrays"),
    **dict.fromkeys((".pt", ".pth", ".ckpt", ".bin", ".tar"), _read_torch),
    **dict.fromkeys((".keras", ".h5", ".hdf5"), _read_keras),
    ".msgpack": _read_msgpack,
}
