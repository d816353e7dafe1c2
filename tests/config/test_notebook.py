"""What a notebook's cells may set, and how a notebook shows an error."""

import sys

import nbclient
import nbformat
import pytest

from sdgen_lib.config.notebook import from_notebook
from sdgen_lib.config.settings import SHARED, resolve

CELL = 'dataset = "digits"\nbackbone = "tiny"\nrecipe = "demo"\nseed = 0\nruns_dir = None\nn_trials = None'


def notebook(*cells):
    """The namespace after these cells have run, with the ``In`` that IPython keeps."""
    namespace = {}
    for cell in cells:
        if not cell.startswith("%"):
            exec(cell, namespace)
    return {**namespace, "In": ["", *cells]}


def test_the_parameters_cell_alone():
    assert from_notebook(notebook("import os", CELL)) == resolve(recipe="demo", backbone="tiny")


def test_injected_parameters_override():
    found = from_notebook(notebook(CELL, '# Parameters\ndataset = "digits:50"\nn_trials = 4\nnum_images = 20\n'))
    assert found == resolve(recipe="demo", backbone="tiny", dataset="digits:50", n_trials=4, num_images=20)
    assert found.given == ("n_trials", "num_images")


def test_the_text_none_sets_what_the_recipe_sets_back():
    """As papermill injects ``-p image_size none``."""
    found = from_notebook(notebook(CELL.replace("demo", "paper"), '# Parameters\nimage_size = "none"\n'))
    assert found.image_size is None and found.given == ("image_size",)


def test_a_misspelt_injected_parameter_stops_with_the_nearest_name():
    with pytest.raises(ValueError, match="Unknown parameter 'datset'.*Did you mean 'dataset'"):
        from_notebook(notebook(CELL, '# Parameters\ndatset = "pathmnist"\n'))


@pytest.mark.parametrize("line", ["n_trails = None", "n_trails: int = 3", "a = n_trails = 3"])
def test_a_misspelt_name_in_the_parameters_cell_stops_too(line):
    with pytest.raises(ValueError, match="Unknown parameter '(n_trails'.*Did you mean 'n_trials'|a')"):
        from_notebook(notebook(CELL + "\n" + line))


def test_an_annotated_parameter_counts():
    assert from_notebook(notebook(CELL + "\nnum_images: int = 11")).num_images == 11
    assert from_notebook(notebook(CELL + "\nnum_images: int")).given == ()


def test_a_magic_between_the_cells_is_skipped():
    found = from_notebook(notebook("%matplotlib inline", CELL, "%pip install x", "# Parameters\nseed = 7\n"))
    assert found.seed == 7
    with pytest.raises(ValueError, match="'datset'"):
        from_notebook(notebook(CELL, "%load_ext autoreload", '# Parameters\ndatset = "x"\n'))


def test_names_of_other_cells_are_no_parameters():
    later = "history = 3\nnum_images = 11\nimages, labels = 1, 2\nclassifier_width = 'not a width'"
    found = from_notebook(notebook("width = 3", CELL, later, "x = 1"))
    assert found == resolve(recipe="demo", backbone="tiny")  # a chapter's own num_images is not taken for the setting


def test_a_rerun_of_the_parameters_cell_counts_from_there():
    first = CELL + "\nnum_images = 9\n"
    found = from_notebook(notebook(first, "# Parameters\nnum_images = 5\n", "trials = 2", CELL, "y = 2"))
    assert found == resolve(recipe="demo", backbone="tiny")


def test_an_edited_parameters_cell_takes_its_new_values():
    found = from_notebook(notebook(CELL, "x = 1", CELL.replace("seed = 0", "seed = 5")))
    assert found.seed == 5


def test_a_wrong_value_of_the_parameters_cell_is_refused():
    with pytest.raises(ValueError, match="seed must be"):
        from_notebook(notebook(CELL.replace("seed = 0", "seed = -1")))


def test_a_parameter_that_was_deleted_is_the_recipes():
    assert from_notebook(notebook(CELL + "\nnum_images = 9", "del num_images")) == resolve("demo", "tiny")


def test_a_plain_script_without_cells_gives_its_globals():
    given = {"dataset": "digits:20", "seed": 2, "backbone": "tiny", "recipe": "demo"}
    assert from_notebook({**given, "other": 1}) == resolve(**given)


def test_outside_a_notebook_nothing_changes():
    hook = sys.excepthook
    assert from_notebook({"recipe": "demo", "backbone": "tiny"}) == resolve(recipe="demo", backbone="tiny")
    assert sys.excepthook is hook


def test_a_notebook_shows_the_line_first():
    """Of the package's errors; those of the reader's own code look as ever."""
    start = "from sdgen_lib.config.notebook import from_notebook\nasked = from_notebook(globals())"
    wrong = "asked.view('serach')"
    cells = [nbformat.v4.new_code_cell(cell) for cell in (CELL, start, wrong, "1 / 0")]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, kernel_name="python3", allow_errors=True, timeout=300).execute()
    assert not any(output.output_type == "error" for cell in cells[:2] for output in cell.outputs)
    error = cells[2].outputs[-1]
    line = error.traceback[0]
    assert line.startswith("ValueError: Unknown topic 'serach'. Did you mean 'search'?") and "\n" not in line
    assert any(wrong in detail for detail in error.traceback[1:])
    assert (error.ename, cells[3].outputs[-1].ename) == ("ValueError", "ZeroDivisionError")
    assert "ZeroDivisionError" in "".join(cells[3].outputs[-1].traceback)


def test_how_somebody_else_shows_errors_stays():
    """A handler of the reader's own, set before; the parameters cell runs twice."""
    own = """
def mine(shell, kind, error, frames, tb_offset=None):
    print("mine:", error)
get_ipython().set_custom_exc((ZeroDivisionError,), mine)
"""
    start = "from sdgen_lib.config.notebook import from_notebook\nasked = from_notebook(globals())"
    wrong = "asked.view('serach')"
    sources = [CELL, own, start, CELL, start, "1 / 0", wrong, "eval('1 +')", "[][1]"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, kernel_name="python3", allow_errors=True, timeout=300).execute()
    assert [output.text for output in cells[5].outputs if output.output_type == "stream"] == [
        "mine: division by zero\n"
    ]
    ours, syntax, plain = (cell.outputs[-1] for cell in cells[6:])
    assert ours.traceback[0].startswith("ValueError: Unknown topic 'serach'.")
    assert (syntax.ename, plain.ename) == ("SyntaxError", "IndexError")
    assert "eval" in "".join(syntax.traceback) and not any("registering" in str(cell.outputs) for cell in cells)


def test_the_parameters_cell_here_is_a_parameters_cell():
    assert all(f"{name} = " in CELL for name in SHARED)
