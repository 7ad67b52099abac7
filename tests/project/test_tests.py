"""The tests themselves: what they share is in helpers, and every deliberate fault is one of the library's lines."""

import ast
import pathlib

import pytest
from faults import FAULTS
from try_faults import paths

ROOT = pathlib.Path(__file__).parents[2]
MODULES = sorted((ROOT / "tests").rglob("test_*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_no_test_module_imports_another():
    found = {str(path.relative_to(ROOT)): [*imported(path)] for path in MODULES}
    names = {path.stem for path in MODULES}
    assert {path: own for path in found if (own := sorted(names.intersection(found[path])))} == {}


def test_no_two_test_modules_have_the_same_name():
    assert len({path.stem for path in MODULES}) == len(MODULES)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_line_of_the_library(fault):
    source = (ROOT / "jaxbn" / f"{fault.file}.py").read_text()
    ast.parse(fault.plant(source))
    assert len(paths(ROOT, fault.tests)) == len(fault.tests.split())


def test_names_of_faults_are_different():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
