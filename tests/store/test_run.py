"""A result is made once for what it depends on, and reused; another setting makes another one beside it."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from sdgen_lib.config.settings import resolve
from sdgen_lib.machine.ranks import ALONE, Ranks
from sdgen_lib.store import files
from sdgen_lib.store import run as runs
from sdgen_lib.store.run import Result, Run, Step

ROOTS = {"data": lambda: "d" * 64, "model": lambda: "m" * 64}


@pytest.fixture
def run(tmp_path):
    """``run(**given)`` -> the Run of these settings in one folder."""

    def make(ranks=ALONE, roots=ROOTS, **given):
        settings = resolve(**{"recipe": "demo", "backbone": "tiny", "runs_dir": str(tmp_path), **given})
        return Run(settings, runs.run_path(settings, "digits"), roots, ranks=ranks)

    return make


class Maker:
    """Makes results that say what they were made of; counts how often."""

    def __init__(self):
        self.made = []

    def step(self, name, fields=(), **options):
        def make(folder, settings):
            self.made.append(name)
            files.save_json(folder / "value.json", [name, *(getattr(settings, field) for field in fields)])
            return {"fact": 1}

        return Step(name, make, **options)


def value(run, step):
    return json.loads(run.file(step, "value.json").read_text())


def test_a_result_is_made_once(run):
    maker = Maker()
    step = maker.step("a", ["transfer_epochs"], topics=("transfer",), title="Step 1")
    assert run().peek(step) is None and not maker.made
    found = run().result(step)
    assert isinstance(found, Result) and found.facts == {"fact": 1} and value(run(), step) == ["a", 8]
    assert run().result(step).record == found.record and maker.made == ["a"]


def test_another_setting_makes_another_result_beside_the_first(run):
    maker = Maker()
    step = maker.step("a", ["transfer_epochs"], topics=("transfer",))
    one, two = run(transfer_epochs=3), run(transfer_epochs=4)
    assert (value(one, step), value(two, step), value(one, step)) == (["a", 3], ["a", 4], ["a", 3])
    assert maker.made == ["a", "a"] and one.path == two.path
    assert len(list((one.path / "a").glob("*/record.json"))) == 2
    assert value(run(transfer_epochs=3, n_trials=2), step) == ["a", 3] and len(maker.made) == 2  # not read by it


def test_what_is_upstream_is_reused_and_what_is_downstream_is_made_anew(run):
    maker = Maker()
    first = maker.step("first", ["transfer_epochs"], topics=("transfer",))
    second = maker.step("second", ["n_trials"], topics=("search",), needs=(first,))
    third = maker.step("third", needs=(second,))
    run(n_trials=3).result(third)
    run(n_trials=4).result(third)
    assert maker.made == ["first", "second", "third", "second", "third"]
    run(n_trials=3, transfer_epochs=5).result(third)
    assert maker.made[5:] == ["first", "second", "third"]
    run(n_trials=4).result(third)
    assert len(maker.made) == 8


def test_a_step_cannot_read_what_it_does_not_declare(run):
    maker = Maker()
    with pytest.raises(AttributeError, match="n_trials"):
        run().result(maker.step("a", ["n_trials"], topics=("transfer",)))
    assert run().peek(maker.step("a", topics=("transfer",))) is None


@pytest.mark.parametrize(
    "changed", [dict(version=2), dict(inputs={"block": 2}), dict(topics=("search",)), dict(roots=("data",))]
)
def test_the_fingerprint_covers_all_that_tells_steps_apart(run, changed):
    maker = Maker()
    assert run().fingerprint(maker.step("a")) != run().fingerprint(maker.step("a", **changed))
    assert run().fingerprint(maker.step("a")) == run().fingerprint(maker.step("a", title="in other words"))


def test_the_content_of_data_and_model_counts(run):
    step = Maker().step("a", roots=("data", "model"))
    found = {run(roots={"data": lambda d=d: d, "model": lambda m=m: m}).fingerprint(step) for d in "xy" for m in "xy"}
    assert len(found) == 4


def test_a_record_says_what_was_used(run):
    maker = Maker()
    first = maker.step("first", ["transfer_epochs"], topics=("transfer",))
    second = maker.step("second", topics=("search",), needs=(first,), roots=("data",))
    made = run(transfer_epochs=3, n_trials=7)
    result = made.result(second)
    record = json.loads((result.folder / "record.json").read_text())
    assert record["name"] == "second" and record["settings"]["n_trials"] == 7
    assert "transfer_epochs" not in record["settings"]
    assert record["needs"] == {"first": made.fingerprint(first)} and record["roots"] == {"data": "d" * 64}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["run"] == {"dataset": "digits", "backbone": "tiny", "recipe": "demo", "seed": 0}
    used = runs.settings_used(made.path, result)
    assert (used["transfer_epochs"], used["n_trials"]) == (3, 7)
    assert [found.name for found in runs.results(made.path)] == ["first", "second"]
    assert [found.name for found in runs.results(made.path, "second")] == ["second"]
    assert set(runs.upstream(made.path, result)) == {"first", "second"}


def test_an_interrupted_step_goes_on_in_its_folder(run):
    seen = []

    def make(folder, settings):
        seen.append(sorted(path.name for path in folder.iterdir()))
        files.save_json(folder / "half.json", 1)
        if len(seen) == 1:
            (folder / ".rest.json.4711").write_text("a killed writer's")
            raise KeyboardInterrupt
        return {}

    step = Step("a", make)
    with pytest.raises(KeyboardInterrupt):
        run().result(step)
    assert run().peek(step) is None
    run().result(step)
    assert seen == [[], ["half.json"]] and list(run().peek(step).record["files"]) == ["half.json"]


# --- damage ---


def flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_file_is_noticed_when_it_is_read_and_made_again(run, capsys):
    maker = Maker()
    step = maker.step("a")
    path = run().file(step, "value.json")
    flip(path)
    assert value(run(), step) == ["a"] and maker.made == ["a", "a"]
    assert "value.json is damaged" in capsys.readouterr().out and path.with_name("value.json.damaged").exists()
    assert "value.json.damaged" not in run().result(step).record["files"]


def test_a_missing_file_or_a_damaged_record_is_no_result(run, capsys):
    maker = Maker()
    step = maker.step("a")
    path = run().file(step, "value.json")
    assert "damaged" not in capsys.readouterr().out
    path.unlink()
    assert run().peek(step) is None and value(run(), step) == ["a"]
    for spoil in (flip, lambda record: record.write_text("{"), lambda record: record.write_text("[]")):
        spoil(path.with_name("record.json"))
        assert run().peek(step) is None and value(run(), step) == ["a"]
        assert capsys.readouterr().out.count("record.json is damaged (not as it was written)") == 1
    assert len(maker.made) == 5


def test_what_other_tools_may_append_to_has_no_checksum(run):
    def make(folder, settings):
        (folder / "journal.log").write_text("one\n")
        return {}

    step = Step("a", make)
    path = run().file(step, "journal.log")
    path.write_text("one\ntwo\n")
    assert run().file(step, "journal.log").read_text() == "one\ntwo\n"


def test_an_unknown_file_is_missed(run):
    with pytest.raises(FileNotFoundError, match="has no epoch_003.safetensors"):
        run().file(Maker().step("a"), "epoch_003.safetensors")


def test_a_discarded_file_is_not_missed_and_a_forgotten_result_is_made_again(run):
    maker = Maker()
    step, made = maker.step("a"), run()
    made.result(step)
    made.discard(step, {"value.json", "never there"})
    assert run().peek(step).record["files"] == {} and list(made.folder(step).iterdir()) == [
        made.folder(step) / "record.json"
    ]
    made.forget(step)
    assert run().peek(step) is None and value(run(), step) == ["a"]


# --- folders ---


def test_the_folder_names_the_run(tmp_path):
    def path(**given):
        return runs.run_path(
            resolve(**{"recipe": "demo", "backbone": "tiny", "runs_dir": str(tmp_path), **given}), "digits"
        )

    assert path(seed=3) == tmp_path / "digits" / "tiny-demo-seed3"
    assert path(recipe="paper", backbone="sd1.4") == tmp_path / "digits" / "sd1.4-paper-seed0"
    names = ["../../../elsewhere", "/tmp/x/../..", "..", "/", "~/models/my model", "org/name", "a\\..\\b", "./.hidden/"]
    for name in names:
        found = path(backbone=name)
        assert found.resolve().parent == (tmp_path / "digits").resolve()
        assert found.name.endswith("-demo-seed0") and not found.name.startswith((".", "-"))
        assert found.name.isascii() and " " not in found.name
    assert len({path(backbone=n) for n in ("/here/model", "/there/model", "org/model", "other/model")}) == 4


def test_runs_dir_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = resolve(recipe="demo", backbone="tiny", runs_dir="~/my runs")
    assert runs.run_path(settings, "digits").is_relative_to(tmp_path / "my runs")


def test_the_default_runs_dir_does_not_follow_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = runs.default_runs_dir()
    assert found.name == "runs"
    assert (found.parent / "notebooks").is_dir() or found.parent == tmp_path


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", "/proc/sdgen", "/dev/null/x"):
        settings = resolve(recipe="demo", backbone="tiny", runs_dir=str(where))
        with pytest.raises(OSError, match="cannot be made .*give another runs_dir"):
            Run(settings, runs.run_path(settings, "digits"), ROOTS)


def test_a_link_that_leads_out_of_the_run_folder_is_refused(run, tmp_path):
    made, outside = run(), tmp_path / "outside"
    outside.mkdir()
    (made.path / "2_tune").symlink_to(outside)
    with pytest.raises(ValueError, match="2_tune is a link that leads out of"):
        run()
    (made.path / "2_tune").unlink()
    (made.path / "1_transfer").mkdir()
    (made.path / "2_tune").symlink_to(made.path / "1_transfer")  # one inside is no harm
    run()
    assert list(outside.iterdir()) == []


def test_a_run_folder_may_be_on_another_disk(run, tmp_path):
    shutil.rmtree(run().path.parent)
    (tmp_path / "disk").mkdir()
    (tmp_path / "digits").symlink_to(tmp_path / "disk")
    step = Maker().step("a")
    run().result(step)
    assert list((tmp_path / "disk").glob("*/a/*/value.json"))


def test_results_of_an_older_version_are_said_and_left(run, capsys):
    made = run()
    (made.path / "1_transfer").mkdir()
    old = {
        "manifest.json": json.dumps({"settings": {}, "steps": {"1_transfer": {"seconds": 1}}, "files": {}}),
        "1_transfer/epoch_001.safetensors": "old weights",
        "table_1.json": "{}",
    }
    for name, content in old.items():
        (made.path / name).write_text(content)
    capsys.readouterr()
    step = Maker().step("1_transfer")
    run().result(step)
    assert "holds results of an older version of sdgen. They are left as they are" in capsys.readouterr().out
    assert {name: (made.path / name).read_text() for name in old} == old


def test_somebody_elses_manifest_is_not_ours(run, capsys):
    made = run()
    for content in ('{"name": "my web app", "icons": []}', '{"files": ["a"]}', "{", '"x"'):
        (made.path / "manifest.json").write_text(content)
        run().result(Maker().step("a"))
        assert (made.path / "manifest.json").read_text() == content
    assert "older version" not in capsys.readouterr().out


# --- several at once ---


def test_two_that_ask_at_once_make_it_once(run, capsys):
    maker, begun = Maker(), threading.Event()

    def make(folder, settings):
        maker.made.append("a")
        begun.set()
        return {}

    step, found = Step("a", make), []
    other = threading.Thread(target=lambda: (begun.wait(5), found.append(run().result(step))))
    other.start()
    found.append(run().result(step))
    other.join()
    assert maker.made == ["a"] and found[0].record == found[1].record


def two_ranks(work):
    """Calls ``work(ranks)`` in two threads that are the two ranks of a launch."""
    barrier, said = threading.Barrier(2, timeout=20), {}

    class Threads(Ranks):
        def wait(self):
            barrier.wait()

        def first_says(self, answer):
            said[self.rank] = answer
            self.wait()
            answer = said[0]
            self.wait()
            return answer

    with ThreadPoolExecutor(2) as pool:
        return [found.result(30) for found in [pool.submit(work, Threads(rank, 2)) for rank in (0, 1)]]


def test_ranks_that_see_different_things_do_as_the_first_one(run, monkeypatch):
    """Another process has finished the result, and the second rank's disk shows it already: nobody waits for ever."""
    made, peek = [], Run.peek

    def step_of(rank):
        return Step("both", lambda folder, settings: made.append(rank) or {}, together=True)

    def sees(self, step):
        return peek(self, step) if self.ranks.first or made.count(1) else Result(self.folder(step), {})

    monkeypatch.setattr(Run, "peek", sees)
    two_ranks(lambda ranks: run(ranks=ranks).result(step_of(ranks.rank)))
    assert sorted(made) == [0, 1]
    assert two_ranks(lambda ranks: run(ranks=ranks).agreed(ranks.rank == 0)) == [True, True]
    assert two_ranks(lambda ranks: run(ranks=ranks).agreed(ranks.rank == 1)) == [False, False]


def test_ranks_make_a_damaged_file_again_together(run, monkeypatch, capsys):
    """The second rank had read the file before it was damaged."""
    made, is_whole = [], Run._is_whole

    def read(ranks):
        def make(folder, settings):
            made.append(ranks.rank)
            if ranks.first:
                files.save_json(folder / "value.json", "made")
            return {}

        mine = run(ranks=ranks)
        return files.load_json(mine.file(Step("both", make, together=True), "value.json"))

    def seen_before(self, path, expected):
        return self.ranks.rank == 1 or is_whole(self, path, expected)

    assert two_ranks(read) == ["made", "made"]
    (run().folder(Step("both", None)) / "value.json").write_text("damaged")
    monkeypatch.setattr(Run, "_is_whole", seen_before)
    assert two_ranks(read) == ["made", "made"]
    assert sorted(made) == [0, 0, 1, 1] and capsys.readouterr().out.count("is damaged") == 1


def test_an_agreement_of_one_process_is_its_own_answer(run):
    assert run().agreed(True) and not run().agreed(False)
    both = run(ranks=Ranks(1, 2))
    with both.alone():  # asks nobody
        assert both.agreed(True) and not both.agreed(False)


def test_ranks_wait_for_what_the_first_one_makes(run):
    """A step of one of them, inside of it another one, a step of both."""
    made = []

    def work(ranks):
        mine, rank = run(ranks=ranks), ranks.rank

        def note(name):
            return lambda folder, settings: made.append((name, rank)) or {}

        inner = Step("inner", note("inner"))
        outer = Step("outer", lambda folder, s: (mine.result(inner), made.append(("outer", rank))) and {})
        both = Step("both", note("both"), needs=(outer,), together=True)
        mine.result(both)
        mine.result(inner)

    two_ranks(work)
    assert made[:2] == [("inner", 0), ("outer", 0)] and sorted(made[2:]) == [("both", 0), ("both", 1)]


def test_two_needs_of_one_name_both_count(run):
    maker = Maker()
    one, other = (maker.step("block", inputs={"of": of}) for of in "ab")
    r = run()
    told = {r.fingerprint(maker.step("mix", needs=needs)) for needs in ((one,), (other,), (one, other), (other, one))}
    assert len(told) == 4
    mix = maker.step("mix", needs=(one, other))
    found = runs.upstream(r.path, r.result(mix))
    assert {result.record["inputs"].get("of") for result in found.values()} == {None, "a", "b"}


def test_a_result_that_lies_in_anothers_folder_is_none(run):
    maker = Maker()
    one, other = (maker.step("step", inputs={"k": k}) for k in (1, 2))
    r = run()
    shutil.copytree(r.result(one).folder, r.folder(other))
    assert r.peek(one) and not r.peek(other)


def test_what_is_made_again_does_not_count_as_finished_meanwhile(run, capsys):
    r, seen = run(), []

    def make(folder, settings):
        seen.append((folder / runs.RECORD).exists())
        (folder / "value.txt").write_text("v")
        return {}

    step = Step("step", make)
    (r.result(step).folder / "value.txt").unlink()
    r.result(step)
    assert seen == [False, False]


@pytest.mark.parametrize("name", ["x" * 5000, "../../../../etc/passwd", "/etc/passwd", "a\0b"])
def test_nothing_outside_of_its_folder_is_looked_for_on_a_records_word(tmp_path, monkeypatch, name):
    record = {kind: {} if of is dict else "x" for kind, of in runs.KINDS.items()} | {"files": {name: "0" * 64}}
    files.save_json(tmp_path / "record.json", record | {"sum": runs.digest(record)})
    assert runs.read_result(tmp_path) is None


@pytest.mark.parametrize("name", ["facts", "needs", "files", "name", "finished"])
def test_a_record_of_another_shape_is_no_result(tmp_path, name):
    record = {kind: {} if of is dict else "x" for kind, of in runs.KINDS.items()}
    for changed, found in ((record, True), (record | {name: None}, False), (record | {name: 7}, False)):
        files.save_json(tmp_path / "record.json", changed | {"sum": runs.digest(changed)})
        assert (runs.read_result(tmp_path) is not None) == found
