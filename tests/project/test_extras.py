"""What is missing is named, with what to install."""

import importlib
import subprocess
import sys

import pytest

import jaxbn.fold
import jaxbn.fold._linen
import jaxbn.linen
import jaxbn.nnx


def import_without_flax(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "flax", None)
    for name in list(sys.modules):
        if name.startswith(("flax.", "jaxbn._observe.")) or (name + ".").startswith(f"jaxbn.{module}."):
            monkeypatch.delitem(sys.modules, name)
    return importlib.import_module(f"jaxbn.{module}")


@pytest.mark.parametrize("module", ["linen", "nnx", "fold"])
def test_flax_is_missing(module, monkeypatch):
    with pytest.raises(ModuleNotFoundError) as error:
        import_without_flax(monkeypatch, module)
    assert str(error.value) == f"flax: needed for jaxbn.{module}; pip install 'jaxbn[flax]'"
    assert error.value.name == "flax"


@pytest.mark.parametrize("module", ["interop", "recalibrate", "diagnose"])
def test_modules_that_do_without_flax(module, monkeypatch):
    monkeypatch.setattr(jaxbn, module, getattr(jaxbn, module, None), raising=False)
    import_without_flax(monkeypatch, module)


@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("recalibrate", "recalibrate_linen", (None, {}, [])),
        ("recalibrate", "recalibrate_nnx", (None, [])),
        ("diagnose", "diagnose_linen", (None, {}, [])),
        ("diagnose", "diagnose_nnx", (None, [])),
    ],
)
def test_flax_is_missing_when_a_function_needs_it(module, function, arguments, monkeypatch):
    monkeypatch.setattr(jaxbn, module, getattr(jaxbn, module, None), raising=False)
    tool = getattr(import_without_flax(monkeypatch, module), function)
    with pytest.raises(ModuleNotFoundError) as error:
        tool(*arguments)
    assert str(error.value) == f"flax: needed for jaxbn.{module}.{function}; pip install 'jaxbn[flax]'"


OLD = """
import {package}
{package}.__version__ = "{installed}"
try:
    import {module}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("package", "installed", "oldest", "module"),
    [
        ("jax", "0.7.1", "0.7.2", "jaxbn"),
        ("flax", "0.11.1", "0.11.2", "jaxbn.linen"),
        ("flax", "0.9", "0.11.2", "jaxbn.recalibrate._flax_step"),
    ],
)
def test_a_version_is_too_old(package, installed, oldest, module):
    code = OLD.format(package=package, installed=installed, module=module)
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == (
        f"{package}: expected version {oldest} or newer, got {installed}; pip install --upgrade {package}\n"
    )


def test_another_package_is_missing(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="orbax"), jaxbn._extras.needs_flax("jaxbn.linen"):
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")


@pytest.mark.parametrize(
    ("names", "layer", "functions"),
    [
        ("BatchNorm BatchNorm1d SyncBatchNorm batch_norm", "BatchNorm", "batch_norm_train and jaxbn.batch_norm_eval"),
        ("BatchRenorm batch_renorm", "BatchRenorm", "batch_renorm_train"),
        ("LayerNorm", "LayerNorm", "layer_norm"),
        ("RMSNorm RmsNorm", "RMSNorm", "rms_norm"),
        ("GroupNorm", "GroupNorm", "group_norm"),
        (
            "InstanceNorm InstanceNorm2d instance_norm",
            "InstanceNorm",
            "instance_norm_train and jaxbn.instance_norm_eval",
        ),
    ],
)
def test_layers_that_are_elsewhere(names, layer, functions):
    for name in names.split():
        assert not hasattr(jaxbn, name)
        with pytest.raises(AttributeError) as error:
            getattr(jaxbn, name)
        assert str(error.value) == (
            f"module 'jaxbn' has no attribute {name!r}; the layers are jaxbn.linen.{layer} and jaxbn.nnx.{layer}, and "
            f"without Flax there is jaxbn.{functions}"
        )
        assert all(hasattr(jaxbn, function) for function in functions.replace(" and jaxbn.", " ").split())
    assert hasattr(jaxbn.linen, layer)


def test_a_name_that_is_nowhere():
    with pytest.raises(AttributeError) as error:
        jaxbn.norm  # noqa: B018
    assert str(error.value) == "module 'jaxbn' has no attribute 'norm'"
