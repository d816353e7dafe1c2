"""What is declared in pyproject.toml, requirements.txt and constraints.txt against what is imported."""

import ast
import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "sdgen_lib"
OF_MODULE = importlib.metadata.packages_distributions()  # {"PIL": ["pillow"], ...} of what is installed here


def requirements(lines: Iterable[str]) -> dict[str, Requirement]:
    """Requirements by their normalised names; comments and empty lines are left out."""
    found = [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]
    by_name = {canonicalize_name(requirement.name): requirement for requirement in found}
    assert len(by_name) == len(found), "a name stands there twice"
    return by_name


NEEDED = requirements(PROJECT["project"]["dependencies"])
EXTRAS = {name: requirements(lines) for name, lines in PROJECT["project"]["optional-dependencies"].items()}
CHECKOUT = requirements((ROOT / "requirements.txt").read_text().splitlines())
TESTED = requirements((ROOT / "constraints.txt").read_text().splitlines())


def imported(source: str) -> Iterator[str]:
    """Top-level names that a module imports, inside functions too; relative imports are left out."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]


def third_party(folder: Path) -> dict[str, set[str]]:
    """{a distribution's normalised name: the files under `folder` that import it}."""
    ours = {"sdgen_lib", "tests"} | {path.stem for path in folder.iterdir()}
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        for name in set(imported(path.read_text())) - ours - sys.stdlib_module_names:
            for distribution in OF_MODULE.get(name, [name]):
                found.setdefault(canonicalize_name(distribution), set()).add(str(path.relative_to(ROOT)))
    return found


def of_notebooks() -> set[str]:
    """Distributions that the notebooks' code cells import; a cell with IPython's own syntax is read by its lines."""
    names = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                names |= set(re.findall(r"^\s*(?:import|from) (\w+)", "".join(cell["source"]), re.MULTILINE))
    names -= {"sdgen_lib", *sys.stdlib_module_names}
    return {canonicalize_name(distribution) for name in names for distribution in OF_MODULE.get(name, [name])}


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b, os\nfrom c.d import e\nfrom . import f\nfrom ..g import h\ndef i():\n    if i:\n        import j"
    )
    assert sorted(imported(source)) == ["a", "c", "j", "os"]
    assert requirements(["# x", "", "A_b[c]>=1,<2 # why"])["a-b"] == Requirement("A_b[c]>=1,<2")


def test_what_the_package_imports_is_declared():
    found, declared = third_party(PACKAGE), set(NEEDED).union(*EXTRAS.values())
    assert {"torch", "pillow", "scikit-learn"} <= set(found)
    assert {name: files for name, files in found.items() if name not in declared} == {}


def test_what_the_package_needs_to_run_is_imported_somewhere():
    assert set(NEEDED) - set(third_party(PACKAGE)) == set()


def test_what_the_tests_import_is_in_requirements():
    found, declared = third_party(ROOT / "tests"), set(CHECKOUT) | set(EXTRAS["8bit"])
    assert {"pytest", "numpy", "pyyaml"} <= set(found)
    assert {name: files for name, files in found.items() if name not in declared} == {}


def test_what_the_notebooks_import_is_declared():
    assert of_notebooks() - set(NEEDED) - set(EXTRAS["notebooks"]) == set()


def test_requirements_are_the_dependencies_and_every_extra_but_two():
    declared = dict(NEEDED)
    for name, extra in EXTRAS.items():
        assert not set(extra) & set(declared), "one place for each"
        if name not in ("8bit", "fid"):  # what needs a GPU, or a download of 91 MB
            declared |= extra
    assert {name: str(found) for name, found in CHECKOUT.items()} == {n: str(found) for n, found in declared.items()}


@pytest.mark.parametrize("name", sorted(CHECKOUT))
def test_the_tested_version_keeps_the_bounds(name):
    (tested,) = TESTED[name].specifier
    assert tested.operator == "==" and CHECKOUT[name].specifier.contains(tested.version)


def test_constraints_name_nothing_else():
    """No local path, no wheel of one platform: they have to install anywhere."""
    assert set(TESTED) == set(CHECKOUT)
    assert not any(r.url or r.extras or r.marker or "+" in str(r.specifier) for r in TESTED.values())


def test_a_wheel_would_hold_every_module_and_the_tiny_models():
    setuptools = PROJECT["tool"]["setuptools"]
    assert setuptools["packages"]["find"].pop("namespaces") is False
    packages = find_packages(str(ROOT), **setuptools["packages"]["find"])
    with_code = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")}
    assert set(packages) == with_code  # none of tests/, and no folder that lacks its __init__.py
    patterns = setuptools["package-data"]["sdgen_lib"]
    data = {path for pattern in patterns for path in PACKAGE.glob(pattern) if path.is_file()}
    assert data == {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert any(path.suffix == ".safetensors" for path in data)


def test_the_version_is_said_once_more_in_the_package():
    assert re.search(r'__version__ = "(.*)"', (PACKAGE / "__init__.py").read_text())[1] == PROJECT["project"]["version"]
