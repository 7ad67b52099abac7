"""What is missing is named, with what to install."""

import importlib
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


def test_another_package_is_missing(monkeypatch):
    with pytest.raises(ModuleNotFoundError, match="orbax"), jaxbn._extras.needs_flax("jaxbn.linen"):
        raise ModuleNotFoundError("No module named 'orbax'", name="orbax")
