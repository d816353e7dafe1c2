"""Which part of the package may import which, read from the code; and what importing the package costs."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sdgen_lib"
# Each imports only from those before it; `course` is one module, the others are packages.
ROOMS = (
    *("config", "machine", "store", "data", "diffusion", "classify", "search", "work"),
    *("methods", "evaluate", "course", "show", "share", "tools"),
)
# The package's own face, the command line and its older forms: no room imports them.
OUTSIDE = {"__init__", "__main__", "report", "export", "bench", "launch", "pretrain_tiny"}
LIGHT = ("config", "machine", "data", "diffusion", "store", "classify")  # what `sdgen_lib.load` may need
HEAVY = ("optuna", "pandas", "sklearn", "matplotlib", "ipywidgets", "medmnist")

# {"data.images": its path}; a package's own code is "data.__init__", the face of the whole "__init__".
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(source: str, module: str, modules=MODULES) -> Iterator[str]:
    """The modules of the package that `module` imports, inside functions and under TYPE_CHECKING too."""
    package = ["sdgen_lib", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in (alias.name.split(".") for alias in node.names):
                if name[0] == "sdgen_lib":
                    yield found_as(name[1:], modules)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base[0] == "sdgen_lib":
                yield from (found_as([*base[1:], alias.name], modules) for alias in node.names)


def found_as(name: list[str], modules) -> str:
    """The module that ``sdgen_lib.a.b.c`` is, or that it is defined in; a name in no room if there is neither."""
    for dotted in (".".join(name), ".".join(name[:-1])):
        for candidate in (dotted, f"{dotted}.__init__" if dotted else "__init__"):
            if candidate in modules:
                return candidate
    return f"missing {'.'.join(name)}"


IMPORTS = {module: set(imports(path.read_text(), module)) for module, path in MODULES.items()}


def test_imports_are_found_wherever_they_stand():
    modules = {"__init__", "data.__init__", "data.images", "data.splits", "store.files", "course", "config.settings"}
    source = """
from __future__ import annotations
import os, sdgen_lib.course
from typing import TYPE_CHECKING
from . import splits, load
from .images import Split
if TYPE_CHECKING:
    from ..store.files import whole_file
def later():
    from sdgen_lib.config import settings
    from .. import __version__
"""
    found = {"course", "data.splits", "data.__init__", "data.images", "store.files", "config.settings", "__init__"}
    assert set(imports(source, "data.sources", modules)) == found
    assert set(imports("from .images import Split", "data.__init__", modules)) == {"data.images"}
    assert set(imports("from .data import Split, images", "course", modules)) == {"data.__init__", "data.images"}
    assert set(imports("from ..stroe.files import lock", "data.images", modules)) == {"missing stroe.files.lock"}
    assert set(imports("import sdgen_lib", "data.images", modules)) == {"__init__"}


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_there_and_says_what_it_is(room):
    path = PACKAGE / "course.py" if room == "course" else PACKAGE / room / "__init__.py"
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_module_is_in_a_room():
    assert {room_of(module) for module in MODULES} == {*ROOMS, *OUTSIDE}
    assert all("." not in module for module in MODULES if room_of(module) in OUTSIDE)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_those_before_it(room):
    before = {*ROOMS[: ROOMS.index(room) + 1], "__init__"}  # for the package's version
    wrong = {
        module: later
        for module in IMPORTS
        if room_of(module) == room and (later := {name for name in IMPORTS[module] if room_of(name) not in before})
    }
    assert wrong == {}


@pytest.mark.parametrize("room", ROOMS)
def test_modules_of_a_room_do_not_import_each_other_in_a_circle(room):
    graph = {m: {n for n in IMPORTS[m] if room_of(n) == room} for m in IMPORTS if room_of(m) == room}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_a_circle_would_be_noticed():
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).prepare()


@pytest.mark.parametrize("room", LIGHT)
def test_a_light_room_imports_heavy_packages_only_inside_functions(room):
    """Except the published numbers, which are tables; `test_only_what_is_shown_knows_the_published_numbers`."""
    found = {}
    for module, path in MODULES.items():
        if room_of(module) == room and module != "config.paper":
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
            names = {a.name for node in top if isinstance(node, ast.Import) for a in node.names}
            names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and not node.level}
            if heavy := {name.partition(".")[0] for name in names} & set(HEAVY):
                found[module] = heavy
    assert found == {}


def test_only_what_is_shown_knows_the_published_numbers():
    assert {room_of(module) for module in IMPORTS if "config.paper" in IMPORTS[module]} <= {"show"}


LOAD = f"""
import sys
import sdgen_lib
assert "torch" not in sys.modules
try:
    sdgen_lib.load("missing folder")
except FileNotFoundError as error:
    assert "missing folder" in str(error)
else:
    raise AssertionError("a folder that is not there was loaded")
print(sorted(set({HEAVY}) & sys.modules.keys()))
"""


def test_loading_a_generator_brings_none_of_what_searches_and_notebooks_need():
    """peft is not among them: diffusers imports it wherever it is installed."""
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
