"""Files appear whole or not at all; a folder never mixes results of different settings."""

import json
import shutil

import pytest
import torch

from sdgen_lib import runs
from sdgen_lib.settings import RECIPES, resolve


def test_whole_file_appears_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with runs.whole_file(path) as temporary:
        assert temporary.parent == path.parent  # the same disk: the last move is atomic
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whole_file_keeps_the_old_content_when_the_writer_fails(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), runs.whole_file(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_failing_save_leaves_the_old_file(tmp_path):
    runs.save_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        runs.save_json(tmp_path / "a.json", {"x": object()})
    runs.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    shared = torch.ones(2)
    with pytest.raises(RuntimeError):
        runs.save_tensors(tmp_path / "a.safetensors", {"x": shared, "y": shared})  # safetensors refuses shared memory
    assert runs.load_json(tmp_path / "a.json") == {"x": 1}
    assert runs.load_tensors(tmp_path / "a.safetensors")["x"].tolist() == [1, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_round_trips(tmp_path):
    tensors = {
        "half": torch.randn(3, 4).half(), "number": torch.tensor(7), "bytes": torch.arange(5, dtype=torch.uint8),
        "strided": torch.arange(6.0).view(2, 3).T, "learnt": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    runs.save_tensors(tmp_path / "a.safetensors", tensors, {"note": "x"})
    found = runs.load_tensors(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value.detach())
    value = {"list": [1, 2.5, None, True], "text": "é", "seven": 1 / 7}
    runs.save_json(tmp_path / "a.json", value)
    assert runs.load_json(tmp_path / "a.json") == value
    assert runs.load_json(tmp_path / "none.json") is None and runs.load_json(tmp_path / "none.json", []) == []


@pytest.fixture
def run(tmp_path):
    """``run(**given)`` -> the Run of these settings in one runs_dir."""
    return lambda **given: runs.Run(
        resolve(**{"recipe": "demo", "backbone": "tiny", "runs_dir": str(tmp_path), **given}), "digits"
    )


def test_the_folder_names_the_run(run, tmp_path):
    assert run(seed=3).path == tmp_path / "digits" / "tiny-demo-seed3"
    assert run(recipe="paper", backbone="sd1.4").path == tmp_path / "digits" / "sd1.4-paper-seed0"
    assert run().folder("2_tune") == tmp_path / "digits" / "tiny-demo-seed0" / "2_tune"
    assert run().folder("2_tune").is_dir()


@pytest.mark.parametrize(
    "name", ["../../../elsewhere", "/tmp/x/../..", "..", "/", "~/models/my model", "org/name", "a\\..\\b", "./.hidden/"]
)
def test_a_backbone_given_as_a_path_stays_in_runs_dir(run, tmp_path, name):
    path = run(backbone=name).path
    assert path.resolve().parent == (tmp_path / "digits").resolve()
    assert path.name.endswith("-demo-seed0") and not path.name.startswith((".", "-"))
    assert path.name.isascii() and " " not in path.name


def test_two_backbones_of_one_name_have_two_folders(run):
    paths = {run(backbone=name).path for name in ("/here/model", "/there/model", "org/model", "other/model")}
    assert len(paths) == 4


def test_runs_dir_may_begin_at_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = runs.Run(resolve(recipe="demo", backbone="tiny", runs_dir="~/my runs"), "digits")
    assert made.path.is_relative_to(tmp_path / "my runs")


def test_the_default_runs_dir_does_not_follow_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = runs.default_runs_dir()
    assert found.name == "runs"
    assert (found.parent / "notebooks").is_dir() or found.parent == tmp_path


def test_a_step_is_done_once_it_is_recorded(run):
    made = run()
    assert not made.is_done("1_transfer")
    made.folder("1_transfer")
    assert not made.is_done("1_transfer")  # a folder is no result
    runs.save_json(made.folder("1_transfer") / "history.json", [])
    assert not made.is_done("1_transfer")  # nor is what an interrupted step has left
    made.record("1_transfer", 12.34, best={"IS": 3})
    again = run()
    assert again.is_done("1_transfer") and not again.is_done("2_tune")
    manifest = json.loads((made.path / "manifest.json").read_text())
    record = manifest["steps"]["1_transfer"]
    assert record["seconds"] == 12.3 and record["best"] == {"IS": 3}
    assert record["settings"]["transfer_epochs"] == RECIPES["demo"]["transfer_epochs"]
    assert "n_trials" not in record["settings"]
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["settings"]["dataset"] == "digits"


def test_recording_a_step_keeps_the_others(run):
    run().record("1_transfer", 1)
    run().record("2_tune", 2)
    assert set(run().manifest["steps"]) == {"1_transfer", "2_tune"}


def test_another_value_given_by_hand_is_refused(run):
    made = run(transfer_epochs=3)
    runs.save_json(made.folder("1_transfer") / "history.json", [])
    made.record("1_transfer", 1)
    assert run(transfer_epochs=3).is_done("1_transfer")
    assert run().is_done("1_transfer")  # the recipe's own number was not asked for
    with pytest.raises(ValueError, match="transfer_epochs=4 was asked for, but 1_transfer.*transfer_epochs=3"):
        run(transfer_epochs=4).is_done("1_transfer")
    assert run(n_trials=3).is_done("1_transfer")  # a setting of a later step


def test_deleting_the_folder_as_the_error_says_begins_the_step_anew(run):
    made = run(transfer_epochs=3)
    runs.save_json(made.folder("1_transfer") / "history.json", [])
    made.record("1_transfer", 1)
    with pytest.raises(ValueError, match=f"delete {made.path / '1_transfer'}"):
        run(transfer_epochs=4).is_done("1_transfer")
    shutil.rmtree(made.path / "1_transfer")
    assert not run(transfer_epochs=4).is_done("1_transfer") and not run().is_done("1_transfer")


def test_every_field_of_a_step_is_a_setting(run):
    for step, fields in runs.STEP_FIELDS.items():
        for name in fields:
            assert hasattr(run().settings, name), (step, name)
