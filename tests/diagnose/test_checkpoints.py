"""Checkpoints of each framework, read as it saves them; and what is said about those that cannot be read."""

import sys

import ml_dtypes
import numpy as np
import pytest
from diagnosis import MEAN, VAR, C, statistics
from golden.make_keras import NORMS, PATH, values
from weights import write_safetensors

from jaxbn import diagnose
from jaxbn.diagnose._checkpoints import load


def message(path, error=ValueError):
    with pytest.raises(error) as caught:
        load(path)
    return str(caught.value)


# PyTorch


def state_dict(torch, offset=0.0):
    named = {"weight": VAR, "bias": MEAN, "running_mean": MEAN + offset, "running_var": VAR}
    tensors = {f"layer1.0.bn.{name}": torch.tensor(np.float32(v)) for name, v in named.items()}
    return tensors | {"layer1.0.bn.num_batches_tracked": torch.tensor(100), "fc.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin", ".pth.tar"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda own, torch: own,
        lambda own, torch: {"state_dict": own, "epoch": 3, "mean": torch.ones(3)},
        lambda own, torch: {"model": own, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}},
        lambda own, torch: {"ema": {"module": own}, "model": {"fc.weight": torch.ones(2, 2)}},
    ],
)
def test_torch(ending, wrap, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"net{ending}"
    torch.save(wrap(state_dict(torch), torch), path)
    loaded = load(path)
    assert loaded.keys() == state_dict(torch).keys()
    assert all((v == loaded[name]).all() for name, v in state_dict(torch).items())
    assert diagnose.main([str(path), "--plain", "--decay", "0.9"]) == 0
    assert "layer1/0/bn" in capsys.readouterr().out


def test_two_state_dicts(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    torch.save({"run": {"model": state_dict(torch), "ema": state_dict(torch, 1.0)}}, path)
    text = message(path)
    cure = f"torch.load('{path}', map_location='cpu')['run']['model']"
    assert text == (
        f"path: expected one state dict, got {path} with 'model', 'ema'; in Python: "
        f"jaxbn.diagnose.diagnose_statistics({cure})"
    )
    assert diagnose.diagnose_statistics(eval(cure, {"torch": torch})).layers[0].path == "layer1/0/bn"


def test_bfloat16_statistics(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({name: v.bfloat16() for name, v in state_dict(torch).items()}, tmp_path / "net.pt")
    (layer,) = diagnose.diagnose_statistics(load(tmp_path / "net.pt")).layers
    np.testing.assert_array_equal(layer.var, VAR.astype(ml_dtypes.bfloat16).astype(np.float64))


@pytest.mark.filterwarnings("ignore:'torch.load' received:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_files_that_are_no_state_dicts(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    start = f"path: expected a state dict, got {path}, which "
    path.write_bytes(b"")
    assert message(path) == f"{start}torch.save has not written, or which is damaged"
    net = torch.nn.BatchNorm1d(C)
    torch.save(net, path)
    assert message(path) == (
        f"{start}has a torch.nn.modules.batchnorm.BatchNorm1d in it; save model.state_dict(), or if you trust the "
        f"file, in Python: jaxbn.diagnose.diagnose_statistics(torch.load('{path}', map_location='cpu', "
        "weights_only=False)), with .state_dict() if it is a module"
    )
    torch.jit.save(torch.jit.script(net), path)
    assert message(path) == (
        f"{start}is a TorchScript archive; in Python: "
        f"jaxbn.diagnose.diagnose_statistics(torch.jit.load('{path}').state_dict())"
    )


# Keras


def test_keras():
    pytest.importorskip("h5py")
    loaded = load(PATH)
    for number, (layer, names) in enumerate(NORMS.items()):
        for i, name in enumerate(names):
            if name is not None:
                np.testing.assert_array_equal(loaded[f"{layer}/{name}"], values(number, i))
    report = diagnose.diagnose_statistics(loaded)
    assert sorted(layer.path for layer in report.layers) == sorted(NORMS)


def test_keras_files_with_names(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "net.h5", "w") as file:
        for name, v in {"gamma": VAR, "beta": MEAN, "moving_mean": MEAN, "moving_variance": -VAR}.items():
            file[f"model_weights/bn/bn/{name}:0"] = v
    (layer,) = diagnose.diagnose_statistics(load(tmp_path / "net.h5")).layers
    assert layer.path == "bn/bn"
    np.testing.assert_array_equal(layer.var, -VAR)


def test_keras_layer_with_more_variables(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        for i in range(7):
            file[f"layers/batch_normalization_3/vars/{i}"] = VAR
    assert message(path) == (
        f"path: expected 2 to 4 variables of batch_normalization_3, got 7 in {path}; in Python: "
        "jaxbn.diagnose.diagnose_statistics({w.path: w.numpy() for w in "
        f"keras.saving.load_model('{path}').weights}})"
    )


# Packages that are missing, and damaged files


@pytest.mark.parametrize(
    ("name", "package", "cure"),
    [
        ("net.pt", "torch", "torch: needed to read .pt; pip install torch"),
        ("net.keras", "h5py", "h5py: needed to read .keras; pip install h5py"),
        ("net.h5", "h5py", "h5py: needed to read .h5; pip install h5py"),
        (
            "net.safetensors",
            "safetensors",
            "safetensors: needed to read .safetensors files; pip install 'jaxbn[tools]'",
        ),
    ],
)
def test_a_package_is_missing(name, package, cure, tmp_path, monkeypatch, capsys):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, package, None)
    assert diagnose.main([str(tmp_path / name)]) == 2
    assert capsys.readouterr().err == f"{cure}\n"


@pytest.mark.parametrize("name", ["net.safetensors", "net.msgpack", "net.h5", "net.keras"])
def test_damaged_files(name, tmp_path):
    if name in ("net.h5", "net.keras"):
        pytest.importorskip("h5py")
    path = tmp_path / name
    path.write_bytes(b"PK")
    text = message(path)
    assert text.startswith(f"path: expected a checkpoint, got {path}, which cannot be read: ")
    assert text.endswith(f"; it is damaged, or something else than {path.suffix}")
    assert "\n" not in text


# Flax, JAX and NumPy


def test_safetensors_keep_float64(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"norm.mean": MEAN, "norm.var": VAR + 1e-12}, tmp_path / "net.safetensors")
    np.testing.assert_array_equal(load(tmp_path / "net.safetensors")["norm.var"], VAR + 1e-12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("F64", np.float64),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("BOOL", np.bool_),
        ("I8", np.int8),
        ("U16", np.uint16),
        ("I64", np.int64),
        ("U64", np.uint64),
    ],
)
def test_dtypes_of_safetensors(name, dtype, tmp_path):
    pytest.importorskip("safetensors")
    array = np.array([0, 1]).astype(dtype)
    write_safetensors(tmp_path / "a.safetensors", {"a": (name, [2], array.tobytes())})
    loaded = load(tmp_path / "a.safetensors")["a"]
    assert (loaded.dtype, loaded.tobytes()) == (array.dtype, array.tobytes())


def test_a_dtype_that_numpy_does_not_have(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": ("F8_E8M0", [2], b"ab")})
    assert message(path) == (
        f"path: expected a checkpoint, got {path}, which cannot be read: its arrays: expected dtypes F64, F32, F16, "
        f"BF16, F8_E4M3, F8_E5M2, BOOL, I8, I16, I32, I64, U8, U16, U32, U64, got F8_E8M0 in {path}; it is damaged, or "
        "something else than .safetensors"
    )


def test_steps_of_a_checkpoint_manager(tmp_path):
    """The newest step by its number, with whatever name its only item has."""
    ocp = pytest.importorskip("orbax.checkpoint")
    for name, item, prefix in (("plain", None, None), ("named", "state_1", "my_model")):
        options = ocp.CheckpointManagerOptions(step_prefix=prefix)
        with ocp.CheckpointManager(tmp_path / name, options=options) as manager:
            for step in (9, 10):
                save = ocp.args.StandardSave(statistics(mean=MEAN + step))
                manager.save(step, args=ocp.args.Composite(**{item: save}) if item else save)
        loaded = load(tmp_path / name)
        np.testing.assert_array_equal(loaded["batch_stats"]["norm"]["mean"], MEAN + 10)
