"""Imports between the library's folders run one way, without circles; public names are where they are documented."""

import ast
import graphlib
import importlib
import pathlib
import subprocess
import sys

import pytest

import jaxbn

ROOT = pathlib.Path(jaxbn.__file__).parent
# From the lowest. A package imports from lower floors alone, not from its neighbours on the same floor.
FLOORS = (
    ("_versions",),
    ("_extras", "_messages", "_paths", "_serialized"),
    ("_arrays",),
    ("_kernel",),
    ("_norms",),
    ("_layers", "_statistics"),
    ("linen", "nnx"),
    ("_observe",),
    ("interop", "recalibrate", "diagnose", "fold"),
)
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}

PUBLIC = {
    "jaxbn": """AffineParams BatchNormParams BatchNormState MOMENTS_NAME Moments affine_init batch_norm_eval
        batch_norm_init batch_norm_train batch_norm_update batch_renorm_limits batch_renorm_train data_moments diagnose
        fold fold_batch_norm group_norm instance_norm_eval instance_norm_train interop layer_norm linen moments nnx
        put_domain recalibrate rms_norm sync_state take_domain""",
    "jaxbn.linen": "BatchNorm BatchRenorm GroupNorm InstanceNorm LayerNorm RMSNorm apply_fixed",
    "jaxbn.nnx": """BatchNorm BatchRenorm GroupNorm InstanceNorm LayerNorm RMSNorm fix_statistics release_statistics
        replace_batch_norms""",
    "jaxbn.interop": "LoadReport batch_norm_from_torch batch_norm_to_torch load_keras load_torch to_torch",
    "jaxbn.recalibrate": "recalibrate recalibrate_linen recalibrate_nnx",
    "jaxbn.diagnose": """Finding LayerReport NotChecked Report Thresholds diagnose_linen diagnose_nnx
        diagnose_statistics main""",
    "jaxbn.fold": """Identity Pairs apply_folded fold_batch_norm fold_linen fold_nnx propose_linen propose_nnx""",
}


def imports(tree: ast.AST) -> set[str]:
    """Imports from jaxbn, those within functions and those for the type checker alone included."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        found |= imports(node)
    return {name for name in found if name.startswith("jaxbn.")}


def module_name(path: pathlib.Path) -> str:
    return ".".join(["jaxbn", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {module_name(path): imports(ast.parse(path.read_text())) for path in ROOT.rglob("*.py")}


def module_of(name: str) -> str:
    """The module that an imported name is, or is in."""
    return name if name in MODULES else name.rpartition(".")[0]


GRAPH = {module: {module_of(name) for name in names} - {module} for module, names in MODULES.items()}
BETWEEN_PACKAGES = sorted(
    (module, imported)
    for module, others in GRAPH.items()
    for imported in others
    if module != "jaxbn" and module.split(".")[1] != imported.split(".")[1]
)


def test_every_package_has_a_floor():
    assert {module.split(".")[1] for module in MODULES if module != "jaxbn"} == set(LEVEL)


def test_imports_run_down():
    up = [pair for pair in BETWEEN_PACKAGES if LEVEL[pair[0].split(".")[1]] <= LEVEL[pair[1].split(".")[1]]]
    assert up == []


def test_no_import_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()


# Methods of NamedTuples.
NOT_PRIVATE = {"_replace", "_asdict", "_fields"}


def private_names(module: str, imported: str) -> set[str]:
    """Private names of `imported` that `module` uses."""
    path = ROOT.joinpath(*module.split(".")[1:])
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    alias = imported.rpartition(".")[2]
    by_attribute = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == alias
    }
    by_name = {name.removeprefix(f"{imported}.") for name in MODULES[module] if name.startswith(f"{imported}.")}
    private = {name for name in by_attribute | by_name if name.startswith("_")}
    return {f"{imported}.{name}" for name in private - NOT_PRIVATE} - set(MODULES)


def test_no_package_uses_private_names_of_another():
    assert {(m, name) for m, imported in BETWEEN_PACKAGES for name in private_names(m, imported)} == set()


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    code = ast.parse(pathlib.Path(importlib.import_module(module).__file__).read_text())
    exported = {
        alias.asname
        for node in ast.walk(code)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert exported == set(PUBLIC[module].split())
    for name in exported:
        getattr(importlib.import_module(module), name)


LAZY = """
import sys, jaxbn
assert not {"flax", "rich", "tqdm"} & set(sys.modules), "import jaxbn imports more than jax"
jaxbn.linen.BatchNorm, jaxbn.nnx.BatchNorm, jaxbn.interop.load_torch, jaxbn.fold.fold_linen
jaxbn.recalibrate.recalibrate_linen, jaxbn.diagnose.diagnose_linen
assert {"linen", "fold"} <= set(dir(jaxbn))
names = {}
exec("from jaxbn import *", names)
assert not {"Any", "typing", "importlib"} & set(names), "more than the API"
try:
    jaxbn.lines
except AttributeError as error:
    print(error)
"""


def test_packages_are_imported_when_they_are_used():
    ran = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("module 'jaxbn' has no attribute 'lines'\n", "")
