"""JupyterLab in a real browser: every chapter is opened and run there, and its widgets are moved.

``pytest tests/test_browser.py --screenshots DIR`` leaves a picture of each chapter in DIR.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import papermill
import pytest
import strange_names
from conftest import MICRO
from test_notebooks import NOTEBOOKS, ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question on the page
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells in the page, not only those in sight
}
# What the page knows about the open notebook: [cells that ran, code cells, is the kernel idle, errors].
STATE = """() => {
  const panel = window.jupyterapp?.shell?.currentWidget;
  if (!panel?.content?.model?.cells) return null;  // not yet
  const cells = [...panel.content.model.cells].filter(cell => cell.type === 'code').map(cell => cell.toJSON());
  const errors = cells.flatMap(cell => cell.outputs.filter(o => o.output_type === 'error').map(o => o.evalue));
  const kernel = panel.sessionContext.session?.kernel;
  return [cells.filter(cell => cell.execution_count !== null).length, cells.length, kernel?.status === 'idle', errors];
}"""


def prepare(base, parameters) -> None:
    """Copies of the chapters without outputs, set to ``parameters``."""
    (base / "notebooks").mkdir()
    for path in NOTEBOOKS:
        copy = base / "notebooks" / path.name
        papermill.execute_notebook(path, copy, parameters, prepare_only=True, log_output=False, progress_bar=False)
        notebook = nbformat.read(copy, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":  # so that what is there afterwards was made in the browser
                cell.outputs, cell.execution_count = [], None
        notebook.metadata.pop("papermill", None)
        nbformat.write(notebook, copy)


def write_settings(base) -> None:
    for name, values in SETTINGS.items():
        file = base / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))


def start(base, port: int, token: str) -> subprocess.Popen:
    """A JupyterLab that keeps everything of its own in ``base``."""
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser", f"--port={port}"]
    options += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={base / 'notebooks'}"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={token}"]
    folders = {
        "JUPYTER_CONFIG_DIR": base / "config",
        "JUPYTER_DATA_DIR": base / "data",
        "JUPYTER_RUNTIME_DIR": base / "run",
        "JUPYTERLAB_SETTINGS_DIR": base / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": base / "workspaces",
        "IPYTHONDIR": base / "ipython",
        "PYTHONPATH": ROOT,
    }
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1", **{k: str(v) for k, v in folders.items()}}
    with open(base / "log", "w") as log:
        return subprocess.Popen(command, cwd=base, env=environment, stdout=log, stderr=log)


@contextlib.contextmanager
def serving(base):
    """The address of a JupyterLab over ``base / "notebooks"``, with a place for a notebook's name in it."""
    write_settings(base)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    server = start(base, port, token)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"JupyterLab did not start:\n{(base / 'log').read_text()[-3000:]}")
                time.sleep(0.3)
        yield f"{address}/lab/tree/{{}}?reset&token={token}"
    finally:
        server.terminate()  # ends its kernels too
        server.wait(30)


@pytest.fixture(scope="module")
def lab(finished, tmp_path_factory):
    """The address of a JupyterLab over copies of the chapters, set to a copy of the micro run."""
    base = tmp_path_factory.mktemp("lab")
    shutil.copytree(finished.runs_dir, base / "runs")
    prepare(base, {**MICRO, "runs_dir": str(base / "runs")})
    with serving(base) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(240_000)  # a machine that does other things too
    yield page
    page.close()


def run_all(page, address: str, timeout: float = 900, expected: str | None = None) -> None:
    """Opens a notebook, chooses "Run All Cells" in the menu and waits for the last cell; fails on an error output.

    ``expected``: what the one error that is meant to come says.
    """
    page.goto(address)
    page.wait_for_function(f"() => {{ const now = ({STATE})(); return now && now[1] > 3 && now[2]; }}")  # idle, unrun
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name=re.compile("^Run All Cells")).click()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, cells, idle, errors = page.evaluate(STATE)
        assert all(expected and expected in error for error in errors), errors
        if idle and done == cells:
            return
        page.wait_for_timeout(200)
    pytest.fail(f"{done} of {cells} cells ran within {timeout} s")


def shut_down(page) -> None:
    """Saves nothing, and ends the kernel: eight of them would not fit into a small machine."""
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def cell(page, source: str):
    """The cell whose code holds ``source``, in sight."""
    found = page.locator(".jp-CodeCell").filter(has=page.locator(".jp-InputArea", has_text=source))
    assert found.count() == 1
    found.scroll_into_view_if_needed()
    return found


def pixels(image) -> list[int]:
    """The bytes of a picture in the page."""
    read = "async image => Array.from(new Uint8Array(await (await fetch(image.src)).arrayBuffer()))"
    return image.evaluate(read)


def guidance_slider(page):
    """Chapter 03: a moved slider draws other pictures; moved back, the first ones again."""
    explorer = cell(page, "explore.GuidanceExplorer(")
    slider = explorer.locator(".widget-slider").filter(has_text="UGS")
    image, words = explorer.locator(".widget-image"), explorer.locator(".widget-html").last
    before, said = pixels(image), slider.locator(".widget-readout").inner_text()
    slider.locator(".noUi-handle").focus()
    for key, same in (("ArrowRight", False), ("ArrowLeft", True)):
        source = image.get_attribute("src")
        page.keyboard.press(key)
        page.wait_for_function("([image, old]) => image.src !== old", arg=[image.element_handle(), source])
        assert (slider.locator(".widget-readout").inner_text() == said) is same
        assert (pixels(image) == before) is same
    assert re.search(r"nearest trial, number \d: IS \d, UGS \d\.\d+, accuracy \d+\.\d%", words.inner_text())


def search_click(page):
    """Chapter 03: a click on a trial shows its images."""
    explorer = cell(page, "explore.SearchExplorer(")
    points = explorer.locator(".widget-gridbox button")
    assert points.count() == 2 * MICRO["n_trials"]
    tooltip = points.last.get_attribute("title")  # "trial 3: 12.3%"; the last lies on top where two overlap
    points.last.click()
    words = explorer.locator(".widget-html").filter(has_text=tooltip.split(":")[0] + ": IS")
    words.wait_for()
    assert tooltip.split(": ")[1] in words.inner_text()
    assert len(pixels(explorer.locator(".widget-image").last)) > 1000


def denoising_slider(page):
    """Chapter 01: another step, another picture."""
    explorer = cell(page, "explore.DenoisingExplorer(")
    image = explorer.locator(".widget-image")
    before, source = pixels(image), image.get_attribute("src")
    explorer.locator(".noUi-handle").focus()
    page.keyboard.press("End")
    page.wait_for_function("([image, old]) => image.src !== old", arg=[image.element_handle(), source])
    assert explorer.locator(".widget-readout").inner_text() == "20" and pixels(image) != before


def quiz_and_confusion(page):
    """Chapter 07: an answer is scored; a cell of a matrix shows its images."""
    quiz = cell(page, "explore_classes.quiz(")
    for number in (1, 2):
        quiz.get_by_role("button", name="generated").click()
        quiz.get_by_text(re.compile(rf"You: \d of {number}\. The classifier: \d of {number}\.")).wait_for()
    confusion = cell(page, "explore_classes.confusion(")
    number = confusion.locator(".widget-gridbox button").first
    true, said, count = re.fullmatch(r"(.+) taken for (.+): (\d+)", number.get_attribute("title")).groups()
    number.click()
    confusion.get_by_text(f"trained on real images: {count} images of class {true} taken for {said}").wait_for()


MOVES = {"01": [denoising_slider], "03": [guidance_slider, search_click], "07": [quiz_and_confusion]}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter(lab, page, path, request):
    run_all(page, lab.format(path.name))
    for move in MOVES.get(path.name[:2], []):
        move(page)
    if folder := request.config.getoption("--screenshots"):
        screenshot(page, os.path.join(folder, f"{path.stem}.png"))
    shut_down(page)


def screenshot(page, path: str) -> None:
    """The whole chapter, however long, without the side bar."""
    page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area')")
    height = page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollHeight")
    page.set_viewport_size({"width": 1280, "height": min(height + 100, 16_000)})
    page.locator(".jp-WindowedPanel-outer").first.evaluate("panel => panel.scrollTo(0, 0)")
    page.wait_for_timeout(500)
    page.screenshot(path=path)


# --- names from a stranger's data ---

CELLS = (
    """
from sdgen_lib import data
from sdgen_lib.show import explore, explore_classes, figures

real = data.load("odd.npz")
names = real.class_names
figures.by_class(real.train.images, real.train.labels, names, max_classes=99)
""",
    """
import torch
from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion.conditions import ContextTable

model = backbone.load("tiny", device="cpu")
contexts = model.text_context(list(names) + [""])
explore.DenoisingExplorer(model, ContextTable(contexts[:-1], contexts[-1]), names, num_inference_steps=2)
""",
    """
truth = torch.arange(len(names)) % 2 == 0
asked = explore_classes.Questions(real.test.images, truth, ~truth, real.test.labels)
explore_classes.Quiz(asked, 0.5, names)
""",
    """
explore_classes.Confusion({names[0]: (real.test.labels + 1) % len(names)}, real.test, names)
""",
    """
import pandas as pd

pd.DataFrame({name: names for name in names}, index=names)
""",
    """
raise ValueError(f"one_line_first: {names}")
""",
)
# What the page must not hold: a picture, script or formula that a name made.
MADE_BY_NAMES = """() => [
  window.hacked, document.querySelectorAll('img[src=x]').length,
  document.querySelectorAll('.jp-OutputArea script, .jp-OutputArea a[href^="javascript"]').length,
  document.querySelectorAll('.jp-OutputArea mjx-container, .jp-OutputArea .MathJax').length,
]"""


def test_names_are_shown_and_never_run(browser, page, tmp_path):
    """A small notebook on a dataset whose classes are called by markup and formulas; its widgets are all moved."""
    names, count = strange_names.SEEN, len(strange_names.SEEN)
    arrays = {"class_names": np.array(names)}
    for part in ("train", "val", "test"):
        arrays |= {f"{part}_labels": np.arange(count), f"{part}_images": np.full((count, 8, 8), 128, np.uint8)}
    (tmp_path / "notebooks").mkdir()
    np.savez(tmp_path / "notebooks" / "odd.npz", **arrays)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text.strip()) for text in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}  # else the page asks for one
    nbformat.write(notebook, tmp_path / "notebooks" / "odd.ipynb")
    dialogs, broken = [], []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: broken.append(str(error)))
    with serving(tmp_path) as address:
        run_all(page, address.format("odd.ipynb"), expected="one_line_first")
        denoising, who = cell(page, "DenoisingExplorer("), cell(page, "DenoisingExplorer(").locator("select")
        assert who.locator("option").all_text_contents() == [name.replace(" ", "\xa0") for name in names]
        image = denoising.locator(".widget-image")
        for k in (1, 0):
            source = image.get_attribute("src")
            who.select_option(index=k)
            page.wait_for_function("([image, old]) => image.src !== old", arg=[image.element_handle(), source])
        quiz = cell(page, "Quiz(")
        for number in range(1, count + 1):
            quiz.get_by_role("button", name="real").click()
            words = quiz.get_by_text(re.compile(rf"You: \d+ of {number}\."))
            words.wait_for()
            assert f"class {names[number - 1]}. The classifier" in words.inner_text()
        confusion = cell(page, "Confusion(")
        buttons = confusion.locator(".widget-gridbox button")
        for k in range(buttons.count()):
            true, said = re.fullmatch(r"(.+) taken for (.+): 1", buttons.nth(k).get_attribute("title")).groups()
            buttons.nth(k).click()
            text = f"{names[0]}: 1 images of class {true} taken for {said}:"
            page.wait_for_function(
                "([cell, text]) => cell.querySelector('.widget-html-content').textContent === text",
                arg=[confusion.element_handle(), text],
            )
        table = cell(page, "pd.DataFrame(").locator("table")
        heads = [text.strip() for text in table.locator("thead th").all_text_contents()]
        assert heads[1:] == list(names)
        assert page.evaluate(MADE_BY_NAMES) == [None, 0, 0, 0]
        assert dialogs == [] and broken == []
        shut_down(page)
