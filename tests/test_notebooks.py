"""The notebook contract. That the notebooks run and repeat their checked outputs is nbval's part (see the README): in
the default size for the paper's method, chapters 00 to 07, and in the smallest size, here, for the others."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import optuna
import pytest
from conftest import MICRO
from PIL import Image

from sdgen_lib.config.settings import FIELDS, SHARED
from tests import pictures, small

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def papermill(notebook: str, output: Path, cwd: Path, **parameters) -> subprocess.CompletedProcess:
    """Runs a notebook as a user would, from ``cwd``."""
    options = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "-k", "python3", str(ROOT / "notebooks" / notebook), str(output)]
    return subprocess.run([*command, *options], cwd=cwd, capture_output=True, text=True, timeout=900)


def printed(notebook: Path) -> str:
    """Everything that the cells of an executed notebook wrote to their streams."""
    cells = nbformat.read(notebook, 4).cells
    return "".join(o.get("text", "") for c in cells if c.cell_type == "code" for o in c.outputs)


def shown_as_html(notebook: Path) -> list[str]:
    """The tables, and whatever else the cells of an executed notebook show as HTML."""
    outputs = [o for c in nbformat.read(notebook, 4).cells if c.cell_type == "code" for o in c.outputs]
    return [o.data["text/html"] for o in outputs if "text/html" in o.get("data", {})]


def test_all_fifteen_chapters_are_there():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{k:02d}" for k in range(15)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_contract(path):
    cells = nbformat.read(path, 4).cells
    assert cells[0].cell_type == "markdown" and "In this chapter" in cells[0].source
    tagged = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = re.findall(r"^(\w+) = ", tagged[0].source, re.M)
    assert tuple(names[:5]) == SHARED
    assert set(names) <= set(FIELDS) - {"given"}
    values = {}
    exec(tagged[0].source, values)  # literal defaults, and None for the recipe's value
    assert [values[n] for n in SHARED] == ["digits", "auto", "auto", 0, None]
    assert all(values[n] is None for n in names[5:])
    at = next(i for i, c in enumerate(cells) if "## Try" in c.source)
    closing, heading, *solutions = cells[at:]
    assert "learnt" in closing.source and heading.source.startswith("## Solutions") and len(solutions) >= 2
    for cell in solutions:  # run as all others are, but folded
        number = re.match(r"# Solution to exercise (\d)\n", cell.source)[1]
        assert f"\n{number}. " in closing.source and cell.metadata["tags"] == ["solution"]
        assert cell.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}
    if path != NOTEBOOKS[-1]:
        following = NOTEBOOKS[NOTEBOOKS.index(path) + 1].name
        assert f"({following})" in closing.source
    assert any("diagrams.method(" in c.source for c in cells)


def test_links_between_the_texts_lead_somewhere():
    cells = {path: nbformat.read(path, 4).cells for path in NOTEBOOKS}
    texts = {path: "".join(c.source for c in cells[path] if c.cell_type == "markdown") for path in NOTEBOOKS}
    texts |= {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", ROOT / "notebooks/glossary.md")}
    links = [(path, link) for path, text in texts.items() for link in re.findall(r"\]\((?!http)([^)#]+)\)", text)]
    assert sum(link == "glossary.md" for _, link in links) == len(NOTEBOOKS)
    assert [(path.name, link) for path, link in links if not (path.parent / link).exists()] == []


def test_the_readmes_pictures_are_the_notebooks_and_are_described():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"!\[([^]]*)\]\(notebooks/pictures/(\w+)\.png\)", readme))
    files = {path.stem: path.read_bytes() for path in (ROOT / "notebooks/pictures").glob("*.png")}
    assert set(shown.values()) == set(files) and all(len(words) > 40 for words in shown)
    assert files == pictures.stored(), "python -m tests.pictures copies them out again"


def test_the_glossary_is_sorted_and_its_references_exist():
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", (ROOT / "notebooks/glossary.md").read_text(encoding="utf-8"), re.M)[1:]
    words = [word for word, _ in rows]
    assert words == sorted(words, key=str.casefold) and {"CAS", "IS", "UGS", "CFG", "fANOVA", "token"} <= set(words)
    plain = {re.sub(r" \(.+\)", "", word).casefold() for word in words} | {"pruner"}
    assert {word.casefold() for _, text in rows for word in re.findall(r"\*\*(.+?)\*\*", text)} <= plain


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_is_said_of_digits_is_said_of_the_default_dataset(path):
    """The text is the same with every ``-p dataset``."""
    texts = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
    paragraphs = [part for text in texts for part in re.split(r"\n\n|\n(?=\d\. |- )", text)]
    assert [part for part in paragraphs if re.search(r"\bdigits?\b", part, re.I) and "default" not in part] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_cells_use_no_private_names_and_type_no_result(path):
    cells = nbformat.read(path, 4).cells
    code = [c.source.replace("    %pip", "    pass  #") for c in cells if c.cell_type == "code"]
    used = {node.attr for source in code for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    assert {name for name in used if re.match("_[a-z]", name)} == set()
    texts = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    assert re.findall(r"\d ± \d|\d\.\d+ ?%", texts) == []


def test_the_shares_of_hyperbands_brackets_are_optunas():
    (text,) = (c.source for c in nbformat.read(NOTEBOOKS[3], 4).cells if "brackets* with" in c.source)
    written = [int(share) for share in re.search(r"\d+(?::\d+){4}", text)[0].split(":")]
    pruner = optuna.pruners.HyperbandPruner(1, 100, 3)
    pruner.prune(optuna.create_study(), optuna.trial.create_trial(value=0.0))  # makes its brackets
    shares = pruner._trial_allocation_budgets
    assert sorted(written) == sorted(shares)
    # Each bracket begins with 10 trials at random.
    at_random = sum(min(10, round(50 * share / sum(shares))) for share in shares)
    assert 25 < at_random < 50 and "more than half of the 50 trials are random" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_come_from_one_clean_run(path):
    notebook = nbformat.read(path, 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any("injected-parameters" in c.metadata.get("tags", []) for c in code)
    outputs = [o for c in code for o in c.outputs]
    assert not any(o.output_type == "error" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs)
    for cell in code:  # the still picture of a thing to move: GitHub shows no more
        last = cell.source.splitlines()[-1]
        if re.match(r"(explore(_classes)?|\w+_figures)\.([A-Z]\w+|quiz)\(|confusion$", last):
            assert any("image/png" in o.get("data", {}) for o in cell.outputs), cell.id
    assert not re.search(r"/(root|home|work|tmp|Users)/\w", json.dumps(outputs))
    assert any("NBVAL_CHECK_OUTPUT" in c.source for c in code)
    assert path.stat().st_size < 3 * 2**20


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"datset": "digits"}, ["'datset'", "'dataset'"]),
        ({"dataset": "digist"}, ["'digist'", "'digits'"]),
        ({"recipe": "dmo"}, ["'dmo'", "'demo'"]),
        ({"n_trials": 0}, ["n_trials", "0"]),
    ],
)
def test_a_wrong_parameter_stops_the_notebook(tmp_path, parameters, words):
    result = papermill("03_tune.ipynb", tmp_path / "out.ipynb", tmp_path, runs_dir=tmp_path / "runs", **parameters)
    assert result.returncode != 0
    outputs = [o for c in nbformat.read(tmp_path / "out.ipynb", 4).cells for o in c.get("outputs", [])]
    errors = [o for o in outputs if o.output_type == "error"]
    assert [o.ename for o in errors] == ["ValueError"]
    assert all(word in errors[0].evalue for word in words)


@pytest.mark.slow
@pytest.mark.parametrize("chapter", ["01_encoder_swap.ipynb", "02_transfer.ipynb"])
def test_the_chapters_on_the_class_encoder_run_with_the_released_codes_two_maps(tmp_path, chapter):
    given = {**MICRO, "recipe": "released", "runs_dir": tmp_path / "runs"}
    result = papermill(chapter, tmp_path / "out.ipynb", tmp_path, **given)
    assert result.returncode == 0, result.stderr[-2000:]


def test_a_chapter_runs_alone_and_reuses_what_is_there(tmp_path):
    first = papermill("03_tune.ipynb", tmp_path / "1.ipynb", tmp_path, runs_dir=tmp_path / "runs", **MICRO)
    assert first.returncode == 0, first.stderr[-2000:]
    said = printed(tmp_path / "1.ipynb")
    assert "Step 1: Class-Encoder" in said and "Step 2: the search" in said
    checkpoints = sorted((tmp_path / "runs").rglob("*.safetensors"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    again = papermill("03_tune.ipynb", tmp_path / "2.ipynb", tmp_path, runs_dir=tmp_path / "runs", **MICRO)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "Step " not in printed(tmp_path / "2.ipynb")
    assert [path.stat().st_mtime_ns for path in checkpoints] == times


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS[8:], ids=lambda p: p.stem)
def test_checked_outputs_are_those_of_any_run(path, tmp_path):
    """What a chapter of the related methods checks holds for every run: nbval finds it in the smallest."""
    notebook = nbformat.read(path, 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    given = {**MICRO, "runs_dir": str(tmp_path / "runs")}
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in given.items())
    nbformat.write(notebook, tmp_path / path.name)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        path.name,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-4000:]
    assert "passed" in result.stdout


AWKWARD = "dark & $x^$"  # markup in HTML, and no formula of matplotlib's


def four_images(folder: Path) -> Path:
    """A folder of two classes, one of an awkward name, with four images each."""
    noise = np.random.default_rng(0)
    for label, name in enumerate((AWKWARD, "bright")):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = noise.integers(0, 100, (8, 8, 3)) + 120 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_the_chapters_go_through_with_four_images_a_class(tmp_path):
    """Those with cells of a fixed number of images; what they print of the results is computed from them."""
    given = {**small.SMALL, "dataset": four_images(tmp_path / "pets"), "runs_dir": tmp_path / "runs"}
    said = {}
    for chapter in ("02_transfer", "06_retune", "07_cas_tables"):
        output = tmp_path / f"{chapter}.ipynb"
        result = papermill(f"{chapter}.ipynb", output, tmp_path, **given)
        assert result.returncode == 0, result.stderr[-2000:]
        said[chapter[:2]] = printed(output)
        assert [text for text in shown_as_html(output) if AWKWARD in text] == []
    assert not any("digit" in text for text in said.values())
    # One of two classes of the same size.
    assert "always the largest class: 50.0%" in said["02"] and "chance" not in said["02"]
    pairs = re.findall(r"after \d minus after \d: (\S+) points, interval (\S+) to (\S+): (.+)", said["06"])
    assert len(pairs) == 4
    for mean, low, high, verdict in pairs:
        mean, low, high = map(float, (mean, low, high))
        assert low <= mean <= high
        words = "better" if low > 0 else "worse" if high < 0 else "no difference is shown"
        assert verdict == words
    assert re.search(r"validation images choose: x\d", said["07"])


def test_chapter_01_draws_the_classes_that_it_shows(tmp_path):
    noise, labels = np.random.default_rng(0), np.arange(120).repeat(3)
    images = noise.integers(0, 255, (len(labels), 8, 8)).astype(np.uint8)
    parts = {
        f"{part}_{what}": value
        for part in ("train", "val", "test")
        for what, value in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "many.npz", **parts)
    given = {**small.SMALL, "num_images": 120, "dataset": tmp_path / "many.npz", "runs_dir": tmp_path / "runs"}
    result = papermill("01_encoder_swap.ipynb", tmp_path / "out.ipynb", tmp_path, **given)
    assert result.returncode == 0, result.stderr[-2000:]
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    drawn = [int(total) for total in re.findall(r"from classes:[^\"]*?/(\d+) \[", text)]
    assert drawn and max(drawn) <= 60
    assert "the rows are the same" in printed(tmp_path / "out.ipynb")
