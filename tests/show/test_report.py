"""The report of a runs folder, from records that a real `Run` wrote; its steps are made by hand."""

import dataclasses
import json
import shutil

import pytest

from sdgen_lib.config.settings import resolve
from sdgen_lib.show import report
from sdgen_lib.store.files import save_json
from sdgen_lib.store.run import RECORD, Run, Step, digest, run_path

from .made import POINT, TABLE_1, TABLE_2, TUNED, cas_row, scaling_row

WHICH = {"dataset": "cifar10", "backbone": "tiny", "recipe": "demo"}


@dataclasses.dataclass
class Made:
    """A run whose rows are made by hand: "after 1" of step 1, "after 2" of step 2 too; step 2 needs step 1."""

    base: str
    roots: dict = dataclasses.field(default_factory=lambda: {"data": "d", "model": "m"})

    def run(self, **given):
        s = resolve(**{**WHICH, "runs_dir": str(self.base), **given})
        roots = {name: (lambda value=value: value) for name, value in self.roots.items()}
        return Run(s, run_path(s, s.dataset), roots)

    def row(self, name, facts, **given):
        """Makes a row with these settings, and what it needs, unless they are there."""
        first = Step("1_transfer", lambda folder, s: {}, topics=("transfer", "seed"), roots=("data", "model"))
        second = Step("2_tune", lambda folder, s: {}, topics=("search", "classifier"), needs=(first,))
        needs = {"table_1/after_1": (first,), "table_1/after_4": (first, second), "table_2/real": ()}
        topics = ("classifier", "table", "cas") if name.startswith("table_1") else ("classifier", "table")
        of = needs.get(name, (first, second))
        step = Step(name, lambda folder, s: facts, topics=topics, needs=of, roots=("data",))
        run = self.run(**given)
        return run.path, run.result(step)


@pytest.fixture
def made(tmp_path):
    return Made(tmp_path)


def finish(made, **given):
    """Both tables of a run."""
    for name, facts in TABLE_1.items():
        made.row(f"table_1/{name.replace(' ', '_')}", facts, **given)
    for name, facts in TABLE_2.items():
        path, _ = made.row(f"table_2/{name}", facts, **given)
    return path


def printed(base, capsys):
    """{heading: the lines of its table}, and what else was said."""
    report.main([str(base)])
    found, others = {}, []
    for block in capsys.readouterr().out.strip().split("\n\n"):
        heading, *lines = block.splitlines()
        if heading.startswith("Table "):
            assert heading not in found
            found[heading] = lines
        else:
            others.append(block)
    return found, others


def test_every_run_is_printed(made, capsys):
    finish(made)
    finish(made, dataset="digits")
    found, others = printed(made.base, capsys)
    runs = [f"{dataset}/tiny-demo-seed0" for dataset in ("cifar10", "digits")]
    assert list(found) == [f"Table {k}, {run}" for run in runs for k in (1, 2)] and others == []
    cifar, digits = ("\n".join(found[f"Table 2, {run}"]) for run in runs)
    assert "74.0 ± 3.6" in cifar and "published accuracy" in cifar and "published" not in digits
    assert found[f"Table 2, {runs[0]}"][0].split() == ["real", "x1", "x2"]
    assert found[f"Table 2, {runs[0]}"][-1] == "The set that validation images choose: x2."
    assert "55.0 ± 7.1" in "\n".join(found[f"Table 1, {runs[1]}"])


def test_rows_of_one_set_of_settings_stand_together_and_the_heading_says_what_is_changed(made, capsys):
    finish(made, transfer_epochs=1, classifier_seeds=2, compile_unet="no")  # the last one changes no result
    found, _ = printed(made.base, capsys)
    heading = "cifar10/tiny-demo-seed0, classifier_seeds=2, transfer_epochs=1"
    assert list(found) == [f"Table 1, {heading}", f"Table 2, {heading}"]
    assert [len(lines[0].split()) for lines in found.values()] == [4, 3]  # "after 1 after 4"; "real x1 x2"


def test_rows_of_different_settings_stand_apart_and_what_they_share_stands_in_both(made, capsys):
    finish(made)
    path, _ = made.row("table_1/after_4", cas_row(TUNED, [0.8, 0.8]), n_trials=30)  # the same step 1
    made.row("table_1/after_1", cas_row(POINT, [0.2, 0.2]), transfer_epochs=3)  # another step 1
    made.row("table_2/x1", scaling_row([0.6], 1000), n_trials=30)
    found, _ = printed(made.base, capsys)
    run = "cifar10/tiny-demo-seed0"
    values = {heading: lines[1].split("classifiers")[1].split() for heading, lines in found.items()}
    assert values == {
        f"Table 1, {run}": ["55.0", "±", "7.1", "70.0", "±", "0.0"],
        f"Table 1, {run}, n_trials=30": ["55.0", "±", "7.1", "80.0", "±", "0.0"],
        f"Table 1, {run}, transfer_epochs=3": ["20.0", "±", "0.0"],
        f"Table 2, {run}": ["90.0", "74.0", "±", "3.6", "80.0", "±", "0.0"],
        f"Table 2, {run}, n_trials=30": ["90.0", "60.0"],
    }


def test_rows_of_other_data_stand_apart(made, capsys):
    """The settings are the same: the folder of images changed under its name."""
    made.row("table_1/after_1", TABLE_1["after 1"])
    made.roots["data"] = "others"
    made.row("table_1/after_1", cas_row(POINT, [0.3, 0.3]))
    found, _ = printed(made.base, capsys)
    first, second = found
    assert first == "Table 1, cifar10/tiny-demo-seed0" and second.startswith(f"{first} (finished 2")
    assert ["30.0" in line for line in (found[first][1], found[second][1])].count(True) == 1


def test_a_recipe_is_measured_against_itself(made, capsys):
    """A value that is the recipe's is no change, though the paper has another one."""
    finish(made, recipe="workshop", n_trials=20)
    found, _ = printed(made.base, capsys)
    assert list(found)[0] == "Table 1, cifar10/tiny-workshop-seed0"


def test_two_seeds_are_two_runs(made, capsys):
    finish(made)
    finish(made, seed=1)
    found, _ = printed(made.base, capsys)
    assert [heading.split("seed")[1] for heading in found] == ["0", "0", "1", "1"]


def test_more_rows_are_in_the_order_of_their_numbers(made, capsys):
    for k in (10, 2, 1):
        made.row(f"table_2/x{k}", scaling_row([k / 100], 1000 * k))
    made.row("table_2/real", TABLE_2["real"])
    found, _ = printed(made.base, capsys)
    (lines,) = found.values()
    assert lines[0].split() == ["real", "x1", "x2", "x10"]
    assert lines[1].split("classifiers")[1].split() == ["90.0", "1.0", "2.0", "10.0"]


def test_what_an_accuracy_is_judged_by_stands_below_it_and_in_words_below_the_table(made, capsys):
    """3 of 10 test images are of the largest class; x1 is below that. The row of real images is an older one."""
    made.row("table_2/real", {"test": [0.9, 0.8], "num_images": 1000})
    made.row("table_2/x1", scaling_row([0.2, 0.22], 1000))
    found, _ = printed(made.base, capsys)
    lines = found["Table 2, cifar10/tiny-demo-seed0"]
    width = len("balanced accuracy %, mean ± st. dev. of its classifiers")
    cells = {line[:width].strip(): line[width:].split() for line in lines[1:5]}
    assert cells == {
        "accuracy %, mean ± st. dev. of its classifiers": ["85.0", "±", "7.1", "21.0", "±", "1.4"],
        "standard error by the test images, points": ["2.0"],  # root of 86 / 404 * 318 / 404 / 404
        "balanced accuracy %, mean ± st. dev. of its classifiers": ["21.0", "±", "1.4"],
        "always the largest class %": ["30.0"],
    }
    assert [line for line in lines if line.startswith("x1: ")] == lines[-1:]
    assert "21.0% is below the 30.0% of always answering the largest class" in lines[-1]


def test_older_and_unfinished_runs_are_named_and_passed_over(made, capsys):
    finish(made)
    older = made.base / "digits/tiny-demo-seed3"
    older.mkdir(parents=True)
    (older / "manifest.json").write_text(json.dumps({"settings": {"dataset": "digits"}, "steps": {"1_transfer": {}}}))
    (older / "table_1.json").write_text(json.dumps({"after 1": {"test": [0.5]}}))
    made.run(seed=4)  # killed before its first record
    made.run(seed=5).result(Step("1_transfer", lambda folder, s: {}))
    damaged, result = made.row("table_1/after_1", TABLE_1["after 1"], seed=6)
    (result.folder / RECORD).write_text("[]")
    foreign = made.base / "digits/tiny-demo-seed7"
    foreign.mkdir()
    (foreign / "manifest.json").write_text("{")
    (made.base / "executed").mkdir()
    (made.base / "executed/00_start_here.ipynb").write_text("{}")
    found, others = printed(made.base, capsys)
    assert list(found) == [f"Table {k}, cifar10/tiny-demo-seed0" for k in (1, 2)]
    unfinished = ", ".join([*(f"cifar10/tiny-demo-seed{k}" for k in (4, 5, 6)), "digits/tiny-demo-seed7"])
    assert others == [
        "Passed over, made by an older version: digits/tiny-demo-seed3",
        f"Passed over, unfinished: {unfinished}",
    ]


def test_a_row_that_lacks_what_a_table_shows_is_left_out(made, capsys):
    made.row("table_1/after_1", {"test": [0.5]})
    found, others = printed(made.base, capsys)
    assert found == {} and others == ["Passed over, unfinished: cifar10/tiny-demo-seed0"]


WRONG = [None, 3, "x", [], {}, [1], {"a": 1}, True, "\x1b[2J", ...]  # the last one: left out


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of no accuracies
@pytest.mark.parametrize(
    "field", ["name", "fingerprint", "settings", "needs", "roots", "run", "facts", "finished", "files"]
)
def test_a_foreign_record_hides_no_other_run(made, capsys, field):
    """Its sum is right, whatever it holds: each field is set to values of every other kind."""
    finish(made)
    _, result = made.row("table_1/after_1", TABLE_1["after 1"], seed=6)
    record = {key: value for key, value in result.record.items() if key != "sum"}
    facts = {"facts": [{**record["facts"], key: wrong} for key in record["facts"] for wrong in WRONG]}
    for wrong in (*WRONG, *facts.get(field, ())):
        changed = {**record, field: wrong}
        if wrong is ...:
            del changed[field]
        elif isinstance(wrong, dict):
            changed[field] = {key: value for key, value in wrong.items() if value is not ...}
        save_json(result.folder / RECORD, changed | {"sum": digest(changed)})
        report.main([str(made.base)])
        out = capsys.readouterr().out
        assert "Table 1, cifar10/tiny-demo-seed0\n" in out and "\x1b" not in out and "cifar10/tiny-demo-seed6" in out


def test_nothing_is_loaded_or_written(finished, tmp_path, capsys, monkeypatch):
    """A real run: neither its data nor its model is read, and its folder stays as it is."""
    monkeypatch.setattr("sdgen_lib.data.load", None)
    monkeypatch.setattr("sdgen_lib.diffusion.backbone.load", None)
    path = tmp_path / finished.course.run.path.relative_to(finished.runs_dir)
    shutil.copytree(finished.course.run.path, path)  # other tests leave their runs beside the finished one
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    found, others = printed(tmp_path, capsys)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    assert len(found) == 2 and others == []
    first, second = found
    assert first.startswith("Table 1, digits-100/tiny-demo-seed0, ") and "transfer_epochs=2" in first
    assert (
        "precision='fp32'" in first and "classifier_seeds=2" in second and "seed=" not in first.split("seeds=")[0][-9:]
    )
    assert len(found[first][0].split()) == 8 and found[second][0].split() == ["real", "x1", "x2"]


def test_without_runs(tmp_path):
    with pytest.raises(SystemExit, match="No run in .*run the notebooks first"):
        report.main([str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="is a run itself: give the folder of the runs"):
        report.main([str(tmp_path / "digits" / "tiny-demo-seed0")])


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--help"])
    assert stopped.value.code == 0 and "RUNS" in capsys.readouterr().out


# --- which rows stand together ---


def row(name, **known):
    """A row that knows only what it was made from."""
    return report.Row(name, result=None, settings=known, origin={})


def names(groups):
    return {frozenset(row.name for row in group) for group in groups}


def test_the_largest_sets_of_rows_that_agree():
    """By trying every subset."""
    rows = [
        row("free"),
        row("a1", a=1),
        row("a2", a=2),
        row("a1b1", a=1, b=1),
        row("b2", b=2),
        row("a2b1c1", a=2, b=1, c=1),
        row("c2", c=2),
    ]
    subsets = ([row for k, row in enumerate(rows) if bits >> k & 1] for bits in range(1, 2 ** len(rows)))
    agreeing = [rows for rows in subsets if all(one.agrees(two) for one in rows for two in rows)]
    every = names(agreeing)
    largest = {one for one in every if not any(one < other for other in every)}
    assert names(report.together(rows)) == names(report.together(rows[::-1])) == largest
    assert len(report.together(rows)) == len(largest) and report.together([]) == []
