"""The whole method on a micro run: every step, what it leaves, and what a second look reuses."""

import json
import shutil
import types

import numpy as np
import pytest
import torch
from optuna.trial import create_trial
from PIL import Image
from threadpoolctl import threadpool_limits

from sdgen_lib.classify import scores
from sdgen_lib.config.settings import resolve
from sdgen_lib.course import ROWS, Course, Point
from sdgen_lib.diffusion import backbone, generator
from sdgen_lib.diffusion.generate import balanced_labels
from sdgen_lib.evaluate import rows as evaluate_rows
from sdgen_lib.evaluate import scaling, sets
from sdgen_lib.methods import class_encoder
from sdgen_lib.search.search import chosen, trials_frame
from sdgen_lib.search.study import open_study
from sdgen_lib.store import blocks, files
from sdgen_lib.store.run import results
from sdgen_lib.work import fitting
from sdgen_lib.work.fitting import checkpoint_name
from sdgen_lib.work.workspace import classifier_options

# --- the finished run ---


def test_every_row_of_table_1(finished):
    s = finished.course.settings
    for row in ROWS:
        found = finished.rows[row]
        assert found["num_images"] == 40 and found["seconds"] > 0
        assert ("select_on" in found) == (row != "after 1")  # nothing was selected before the first search
        for numbers in ("test", "val", "balanced_test", "per_class", "steps"):
            assert len(found[numbers]) == 2
        assert all(0 <= v <= 1 for v in found["test"] + found["val"] + found["balanced_test"])
        assert all(len(classes) == 10 for classes in found["per_class"])
    one, two, three, four = (Point(**finished.rows[row]["point"]) for row in ROWS)
    assert one == Point(s.default_steps, s.default_guidance, 2, None)
    assert two.finetune_epoch is None and three.finetune_epoch == 2 and three.transfer_epoch == two.transfer_epoch
    assert four.transfer_epoch == two.transfer_epoch and four.finetune_epoch in (1, 2)


def test_the_second_search_is_bounded_by_the_first(finished):
    course = finished.course
    first, second = course.tune(), course.retune()
    best = chosen(first).params
    spaces = ((5, 6), (0, 7.5), (1, 2)), ((5, best["IS"]), (0, 2 * best["UGS"]), (1, 2))
    for study, space in zip((first, second), spaces, strict=True):
        frame = trials_frame(study)
        assert len(frame) == 4
        for name, (low, high) in zip(("IS", "UGS", "epoch"), space, strict=True):
            assert frame[name].between(low, max(high, 1.0)).all()
    for row, study in (("after 2", first), ("after 4", second)):
        point = finished.rows[row]["point"]
        found = chosen(study).params["IS"], chosen(study).params["UGS"]
        assert (point["num_inference_steps"], point["guidance_scale"]) == found


def test_table_2_has_real_and_synthetic_sets(finished):
    assert list(finished.scaling) == ["real", "x1", "x2"]
    assert [finished.scaling[name]["num_images"] for name in finished.scaling] == [100, 100, 200]
    assert all(len(row["test"]) == 2 for row in finished.scaling.values())


def test_what_the_folder_holds(finished):
    path = finished.course.run.path
    assert path.relative_to(finished.runs_dir).as_posix() == "digits-100/tiny-demo-seed0"
    found = {}
    for result in results(path):
        assert result.folder.parent == path / result.name and result.fingerprint.startswith(result.folder.name)
        found[result.name] = set(result.record["files"])
        on_disk = {p.name for p in result.folder.iterdir() if not p.name.startswith(".")}
        assert on_disk == {*found[result.name], "record.json"}
    training = {"epoch_001.safetensors", "epoch_002.safetensors", "history.json"}
    assert found == {
        "latents": {"latents.safetensors"},
        "1_transfer": training,
        "2_tune": {"journal.log"},
        "3_finetune": training,
        "4_retune": {"journal.log"},
        **{f"table_1/after_{k}": {"predicted.safetensors"} for k in (1, 2, 3, 4)},
        **{f"5_datasets/block_0{k}": {"images.npz", "records.safetensors"} for k in (1, 2)},
        **{f"table_2/{row}": {"predicted.safetensors"} for row in ("real", "x1", "x2")},
    }


def test_latents_are_those_of_the_real_images(finished, tiny):
    latents, images = finished.course.latents, finished.course.data
    for name in ("train", "val"):
        split = getattr(images, name)
        torch.testing.assert_close(latents[name].latents, tiny.encode(split.images), atol=1e-4, rtol=1e-3)
        assert torch.equal(latents[name].labels, split.labels)


def test_str_says_what_will_run(finished):
    shown = str(finished.course)
    assert "10 classes, 100 training, 202 validation and 449 test images of 16x16" in shown
    assert "n_trials=4" in shown and "demo" in shown and "tiny" in shown


def test_row_names_are_checked(finished):
    for ask in (finished.course.point, finished.course.source, finished.course.cas):
        with pytest.raises(ValueError, match="row must be one of after 1, .*not 'after 5'"):
            ask("after 5")
    with pytest.raises(ValueError, match="no row 'x3'. It has: real, x1, x2"):
        finished.course.predicted("x3")


def test_each_point_has_its_own_weights(finished, tiny):
    """A fine-tuned UNet is put aside again; the Class-Encoder is that of the epoch."""
    course, method = finished.course, finished.course.method
    pretrained, unet = tiny.unet.state_dict(), course.backbone.unet
    tuned = course.draw(Point(2, 1.0, 1, 2), torch.tensor([0]), "any")
    changed = {name: value.clone() for name, value in unet.state_dict().items()}
    checkpoint = files.load_tensors(course.run.file(method.finetune_step, checkpoint_name(2)))
    checkpoint = {name: value for name, value in checkpoint.items() if not name.startswith(class_encoder.ENCODER)}
    assert all(torch.equal(changed[name], value.float()) for name, value in checkpoint.items())
    assert not all(torch.equal(changed[name], pretrained[name]) for name in pretrained)
    saved = files.load_tensors(course.run.file(method.transfer_step, checkpoint_name(1)))
    found = method.class_encoder(1).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())
    plain = course.draw(Point(2, 1.0, 1, None), torch.tensor([0]), "any")
    assert all(torch.equal(value, pretrained[name]) for name, value in unet.state_dict().items())
    assert not torch.equal(tuned, plain)


def test_points_in_any_order(finished, micro):
    """Whatever was put in place before, by hand too, a point draws the same."""
    course, labels = Course(micro(finished.runs_dir)), torch.tensor([3, 4])
    point = Point(5, 1.0, 2, None)
    first = course.draw(point, labels, "any order")
    for other in (Point(5, 1.0, 1, None), Point(5, 1.0, 2, 1)):
        course.draw(other, labels, "any order")
        assert torch.equal(course.draw(point, labels, "any order"), first)
    course.backbone.set_unet({name: torch.zeros_like(w) for name, w in course.backbone.unet.state_dict().items()})
    assert torch.equal(course.draw(point, labels, "any order"), first)
    assert not torch.equal(course.draw(Point(5, 1.0, 2, 2), labels, "any order"), first)


def test_step_3_leaves_the_class_encoder_as_it_was(finished):
    """Its checkpoints are step 1's, byte for byte as recorded; the losses of both steps are finite and differ."""
    course = finished.course
    record = course.run.peek(course.method.transfer_step)
    for name, expected in record.record["files"].items():
        assert files.checksum(record.folder / name) == expected
    one, three = course.transfer(), course.finetune()
    assert np.isfinite(one.to_numpy()).all() and np.isfinite(three.to_numpy()).all()
    assert one.index.tolist() == three.index.tolist() == [1, 2] and not one.equals(three)
    best = chosen(course.tune()).params["epoch"]
    assert course.run.peek(course.method.finetune_step).facts["transfer_epoch"] == best


# --- a second look ---


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run's folder, to change."""
    shutil.copytree(finished.runs_dir, tmp_path / "runs")
    return tmp_path / "runs"


class Worked(Exception):
    """Work was done that should have been reused."""


@pytest.fixture
def no_work(monkeypatch):
    def refuse(*args, **options):
        raise Worked

    monkeypatch.setattr(fitting, "fit", refuse)
    monkeypatch.setattr(generator, "generate", refuse)
    monkeypatch.setattr(scores, "train_classifier", refuse)
    monkeypatch.setattr(backbone, "load", refuse)


def test_a_second_course_reuses_everything(finished, micro, no_work):
    again = Course(micro(finished.runs_dir))
    assert again.transfer().equals(finished.course.transfer())
    assert again.finetune().equals(finished.course.finetune())
    for search in ("tune", "retune"):
        assert chosen(getattr(again, search)()).params == chosen(getattr(finished.course, search)()).params
    assert {row: again.cas(row) for row in ROWS} == finished.rows == again.rows_made(1)
    assert again.scaling() == finished.scaling == again.rows_made(2)
    assert len(again.synthetic(2)) == 200
    with pytest.raises(Worked):  # a third block is not there
        again.synthetic(3)


def test_a_rows_classifiers_side_by_side_are_those_one_by_one(copied, micro, monkeypatch):
    """On one core each."""
    found = {}
    with threadpool_limits(1, user_api="openmp"):
        for at_once in (1, 2):
            course = Course(micro(copied))
            step = scaling.scaling_step(course.workspace, course.source(), "x1")
            course.run.forget(step)
            monkeypatch.setattr(evaluate_rows, "best_at_once", lambda count, at_once=at_once: at_once)
            found[at_once] = course.run.result(step).facts
            right = (course.predicted("x1") == course.data.test.labels).float().mean()
            assert float(right) == pytest.approx(found[at_once]["test"][0])
    assert found[1] == found[2]


def test_another_seed_is_another_run(finished, micro, no_work):
    with pytest.raises(Worked):
        Course(micro(finished.runs_dir, seed=1)).transfer()


def test_classifier_seeds_are_shared_neither_by_runs_nor_with_the_search(finished, micro, monkeypatch):
    seen = []
    result = types.SimpleNamespace(tests={})
    monkeypatch.setattr(evaluate_rows, "score", lambda *a, seed, **k: seen.append(seed) or result)
    monkeypatch.setattr(class_encoder.searches, "search", lambda *a, classifier_seed, **k: seen.append(classifier_seed))
    for seed in (0, 1, 2):
        course = Course(micro(finished.runs_dir, seed=seed))
        view = course.settings.view("classifier", "table", "precision", "seed")
        evaluate_rows.scores(course.workspace, view, course.data.train, {}, {}, "any")
        tune = course.method.tune_step()
        view = course.settings.view(*tune.topics, "how")
        course.method._run_trials(None, view, tune, course.method.first_space(), None)
    assert len(seen) == len(set(seen)) == 9


# --- the synthetic sets ---


def test_sets_are_nested_and_have_the_real_class_counts(finished):
    one, two = finished.course.synthetic(1), finished.course.synthetic(2)
    assert torch.equal(two.images[:100], one.images) and torch.equal(two.labels[:100], one.labels)
    counts = finished.course.data.class_counts
    assert torch.equal(torch.bincount(one.labels), counts)
    assert torch.equal(torch.bincount(two.labels), 2 * counts)
    assert two.images.dtype == torch.uint8 and two.images.shape == (200, 3, 16, 16)
    first, second = two.images[:100], two.images[100:]
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))  # fresh noise


def test_balanced_sets_and_random_parts(small, tmp_path):
    """As in the released code: equal numbers per class, x1 apart, x2 a random part of x3."""
    course = small(tmp_path, class_mix="balanced", larger_sets="random", max_multiple=3)
    one, two, three = (course.synthetic(k) for k in (1, 2, 3))
    assert [len(part) for part in (one, two, three)] == [6, 12, 18]
    assert torch.bincount(one.labels).tolist() == [3, 3] and torch.bincount(three.labels).tolist() == [9, 9]
    drawn = {image.numpy().tobytes(): int(label) for image, label in zip(three.images, three.labels, strict=True)}
    inside = [drawn.get(image.numpy().tobytes()) == int(label) for image, label in zip(two.images, two.labels)]
    assert all(inside) and len({image.numpy().tobytes() for image in two.images}) == 12  # no image twice
    assert not any(image.numpy().tobytes() in drawn for image in one.images)
    rows = course.scaling()
    assert [rows[name]["num_images"] for name in ("real", "x1", "x2", "x3")] == [6, 6, 12, 18]


def test_the_sets_start_from_noise_of_no_trial(finished):
    """The same labels at the same point, as a trial would draw them."""
    course = finished.course
    labels = course.synthetic(1).labels[:8]
    trial = course.draw(course.point("after 4"), labels, "trial")
    assert not torch.equal(trial, course.synthetic(1).images[:8])


def test_a_deleted_block_is_made_again_the_same(copied, finished, micro):
    course = Course(micro(copied))
    path = course.run.file(sets.block_step(course.workspace, course.source(), 2), blocks.BLOCK)
    path.unlink()
    made, expected = course.synthetic(2), finished.course.synthetic(2)
    assert path.exists() and torch.equal(made.images, expected.images) and torch.equal(made.labels, expected.labels)


def test_blocks_are_datasets_that_numpy_reads(finished):
    course = finished.course
    path = course.run.file(sets.block_step(course.workspace, course.source(), 1), blocks.BLOCK)
    with np.load(path, allow_pickle=False) as file:
        assert file["images"].shape == (100, 16, 16, 3) and file["images"].dtype == np.uint8
        assert torch.equal(torch.from_numpy(file["images"]).permute(0, 3, 1, 2), course.synthetic(1).images)


# --- a killed step ---


class Killed(BaseException):
    pass


def kill_at_the_second_epoch(patch):
    save = files.save_tensors

    def killing(path, *args, **options):
        if path.name == "epoch_002.safetensors":
            raise Killed
        return save(path, *args, **options)

    patch.setattr(files, "save_tensors", killing)


def checkpoints(course):
    folder = course.run.folder(course.method.transfer_step)
    return {path.name: path.read_bytes() for path in folder.glob("epoch_*")}


def test_a_killed_transfer_goes_on_to_the_same_result(finished, micro, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at_the_second_epoch(patch)
        with pytest.raises(Killed):
            Course(micro(tmp_path)).transfer()
    again = Course(micro(tmp_path))
    assert again.transfer().equals(finished.course.transfer())
    assert checkpoints(again) == checkpoints(finished.course) and len(checkpoints(again)) == 2


def test_a_killed_transfer_does_not_go_on_with_other_settings(small, tmp_path, monkeypatch):
    """Going on would mix two learning rates in one set of checkpoints."""
    with monkeypatch.context() as patch:
        kill_at_the_second_epoch(patch)
        with pytest.raises(Killed):
            small(tmp_path / "a").transfer()
    found = small(tmp_path / "a", transfer_learning_rate=1e-4)
    expected = small(tmp_path / "b", transfer_learning_rate=1e-4)
    assert found.transfer().equals(expected.transfer()) and checkpoints(found) == checkpoints(expected)


def test_a_search_that_lost_trials_is_finished_again(small, tmp_path):
    course = small(tmp_path)
    first = course.tune()
    journal = course.run.folder(course.method.tune_step()) / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + b'{"half')
    again = small(tmp_path).tune()
    assert [(t.params, t.value, t.state) for t in again.trials] == [(t.params, t.value, t.state) for t in first.trials]


def test_a_search_whose_point_was_changed_in_its_journal_is_done_again(small, tmp_path, capsys):
    """What Optuna's tools write is no reason; a better trial, added after the search, is: nothing was drawn with it."""
    course = small(tmp_path, rescored=0)
    first, point = course.tune(), course.point("after 2")
    result = course.run.peek(course.method.tune_step())
    same = open_study(result.folder / "journal.log", result.facts["study"])
    same.set_user_attr("note", "of a reader")
    assert small(tmp_path, rescored=0).tune().user_attrs["note"] == "of a reader"
    assert "done again" not in capsys.readouterr().out
    other = next(trial for trial in first.trials if trial.params != chosen(first).params)
    same.add_trial(create_trial(params=other.params, distributions=other.distributions, value=2.0))
    assert small(tmp_path, rescored=0).point("after 2") == point
    assert "2_tune: its journal.log is not what the search ended with" in capsys.readouterr().out


# --- the reader's own images ---


def test_an_npz_file(micro, tmp_path):
    random = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        arrays[f"{part}_images"] = random.integers(0, 256, (12, 20, 20, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(12, dtype=np.uint8)[:, None] % 3
    np.savez(tmp_path / "mine.npz", **arrays)
    course = Course(micro(tmp_path / "runs", dataset=str(tmp_path / "mine.npz")))
    history = course.transfer()
    assert len(history) == 2 and np.isfinite(history.to_numpy()).all()
    assert course.run.path.parent.name.startswith("mine-") and course.data.image_size == 20
    saved = files.load_tensors(course.run.file(course.method.transfer_step, checkpoint_name(2)))
    assert saved["linear.weight"].shape == (8 * 64, 3)


def test_a_folder_of_images(micro, tmp_path):
    for name, shade in (("cat", 60), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (24, 30), (shade, 3 * k, 0)).save(tmp_path / "pets" / name / f"{k}.png")
    course = Course(micro(tmp_path / "runs", dataset=str(tmp_path / "pets")))
    assert len(course.transfer()) == 2 and course.data.class_names == ("cat", "dog")
    drawn = course.draw(Point(2, 1.0, 2), torch.tensor([0, 1]), "x")
    assert drawn.shape == (2, 3, 32, 32)


def test_wrong_data_stops_before_anything_is_made(micro, tmp_path):
    with pytest.raises(ValueError, match="Unknown dataset 'digit'.*Did you mean 'digits'"):
        Course(micro(tmp_path / "runs", dataset="digit"))
    assert not (tmp_path / "runs").exists()


def test_fewer_images_than_classes_are_refused(micro, tmp_path):
    """A CAS of such a set would measure classes that were never drawn."""
    line = r"^num_images is 9 and the data has 10 classes: give 10 or more\.$"
    with pytest.raises(ValueError, match=line):
        Course(micro(tmp_path, num_images=9))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="^rescoring_images is 9 and the data has 10 classes"):
        Course(micro(tmp_path, rescoring_images=9))
    course = Course(micro(tmp_path, num_images=10))
    assert balanced_labels(course.settings.num_images, 10).unique().tolist() == list(range(10))


def test_the_released_recipe_from_end_to_end(micro, tmp_path):
    """Its Class-Encoder, classifier, searches and sets, on the tiny model with small numbers."""
    few = dict(n_trials=3, n_trials_retune=2, num_images=20, transfer_epochs=1)
    course = Course(
        micro(tmp_path, recipe="released", dataset="digits:20", classifier_width=8, classifier_epochs=2, **few)
    )
    encoder = course.new_class_encoder()
    assert encoder.contexts().shape == (10, 100, 64) and encoder.linear[0].out_features == 500
    rows, found = [course.cas(row) for row in ROWS], course.scaling()
    assert all(row["select_on"] == "test" for row in rows[1:])
    first, second = trials_frame(course.tune()), trials_frame(course.retune())
    assert (len(first), len(second)) == (3, 2) and not first.pruned.any() and not second.pruned.any()
    assert (first.value == first.test_accuracy).all()
    assert list(found) == ["real", "x1", "x2"]
    assert torch.bincount(course.synthetic(2).labels).sum() == 40
    assert (course.run.path / "5_datasets/block_00").exists()  # x1, apart from x2
    assert "the released code in" in str(course)


def test_a_search_waits_longer_where_its_recipe_says_so(micro, tmp_path):
    released = classifier_options(micro(tmp_path, recipe="released"), in_search=True)
    assert (released["plateau_patience"], released["stop_patience"]) == (25, 50)
    tables = classifier_options(micro(tmp_path, recipe="released"))
    assert (tables["plateau_patience"], tables["stop_patience"]) == (10, 25)
    assert classifier_options(micro(tmp_path), in_search=True) == classifier_options(micro(tmp_path))


def test_only_used_unets_are_kept_when_asked(small, tmp_path, capsys):
    course = small(tmp_path, finetune_epochs=4, keep_unets="used")
    course.finetune()
    folder = course.run.folder(course.method.finetune_step)
    assert len(list(folder.glob("epoch_*"))) == 4
    made = {path.name: path.read_bytes() for path in folder.glob("epoch_*")}
    best = chosen(course.retune()).params["epoch"]
    assert {path.name for path in folder.glob("epoch_*")} == {checkpoint_name(best), checkpoint_name(4)}
    course.cas("after 3"), course.cas("after 4")
    gone = next(epoch for epoch in (1, 2, 3) if epoch != best)
    course.draw(Point(1, 1.0, 1, gone), torch.tensor([0]), "any")  # is asked for after all
    assert f"{checkpoint_name(gone)} was deleted" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.glob("epoch_*")} == made
    again = small(tmp_path, finetune_epochs=4, keep_unets="used", n_trials_retune=6).retune()  # nothing is refused
    used = {checkpoint_name(chosen(again).params["epoch"]), checkpoint_name(4)}
    assert len(again.trials) == 6 and {path.name for path in folder.glob("epoch_*")} == used
    with pytest.raises(FileNotFoundError, match="has no epoch_009"):
        course.run.file(course.method.finetune_step, checkpoint_name(9))


def test_step_3_is_refused_where_the_disk_has_no_room(small, tmp_path, monkeypatch, capsys):
    course = small(tmp_path)
    course.tune()
    large = [torch.nn.Parameter(torch.zeros(1).expand(200_000_000))]  # counted, not stored
    monkeypatch.setattr(class_encoder.cost, "seconds", lambda *_: 1.0)
    monkeypatch.setattr(type(course.backbone.unet), "parameters", lambda self: large)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=int(5e9)))
    with pytest.raises(OSError, match="needs up to 6 GB in .*where 5 GB are free.*finetune_method='lora'"):
        course.finetune()
    assert "Keeps 2 UNets of 0.4 GB" in capsys.readouterr().out


def test_lora_from_end_to_end(small, tmp_path):
    course = small(tmp_path, finetune_method="lora", lora_rank=2, n_trials=2, finetune_encoder_learning_rate="none")
    saved = files.load_tensors(course.run.file(course.method.finetune_step, checkpoint_name(2)))
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in saved.items())
    assert any(value.abs().max() > 0 for name, value in saved.items() if ".lora_B" in name)
    assert len(course.cas("after 4")["test"]) == 2


def test_the_unet_is_compiled_where_that_pays(micro, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        backbone.Backbone, "compile_unet", lambda self, batch, *_: asked.append((batch, self.unet.dtype))
    )
    point, labels = Point(2, 2.0, 1), torch.arange(9) % 10
    auto = Course(micro(tmp_path, sample_batch_size=8))
    auto.draw(point, labels, "any")
    assert not auto.workspace.compiles() and not asked  # so small a run is over before the compiler is
    told = Course(micro(tmp_path, sample_batch_size=8, compile_unet="yes"))
    told.draw(point, labels[:7], "any")
    assert not asked  # no batch is whole
    told.backbone.set_unet(dtype=torch.float64)  # what a training may leave behind
    told.draw(point, labels, "any")
    assert asked == [(16, torch.float32)]  # with the point's weights in place, as they are sampled with
    assert Course(resolve(recipe="demo", backbone="tiny", runs_dir=str(tmp_path))).workspace.compiles()
    never = resolve(recipe="paper", backbone="tiny", runs_dir=str(tmp_path), compile_unet="no")
    assert not Course(never).workspace.compiles()


def test_a_record_is_json_that_others_read(finished):
    for path in finished.course.run.path.rglob("record.json"):
        record = json.loads(path.read_text())
        assert record["run"] == {"dataset": "digits:100", "backbone": "tiny", "recipe": "demo", "seed": 0}
        assert record["seconds"] >= 0 and len(record["fingerprint"]) == 64
