"""The whole method on a micro run: every step, what it leaves, and what a second look reuses."""

import dataclasses
import shutil

import numpy as np
import optuna
import pytest
import torch
from PIL import Image
from threadpoolctl import threadpool_limits

from sdgen_lib import backbone, classifier, devices, runs, steps, train, tune
from sdgen_lib import course as courses
from sdgen_lib.course import ROWS, Course
from sdgen_lib.settings import resolve

# --- the finished run ---


def test_every_row_of_table_1(finished):
    s = finished.course.settings
    for row in ROWS:
        found = finished.rows[row]
        assert found["num_images"] == 40 and found["select_on"] == "val" and found["seconds"] > 0
        assert len(found["test"]) == len(found["val"]) == 2 and all(0 <= v <= 1 for v in found["test"] + found["val"])
    one, two, three, four = (finished.rows[row]["point"] for row in ROWS)
    assert one == {"IS": s.default_steps, "UGS": s.default_guidance, "transfer_epoch": 2, "finetune_epoch": None}
    assert two["finetune_epoch"] is None and three == {**two, "finetune_epoch": 2}
    assert four["transfer_epoch"] == two["transfer_epoch"] and four["finetune_epoch"] in (1, 2)


def test_the_second_search_is_bounded_by_the_first(finished):
    course = finished.course
    first, second = course.search(), course.research()
    best = first.best_params
    spaces = ((5, 6), (0, 7.5), (1, 2)), ((5, best["IS"]), (0, 2 * best["UGS"]), (1, 2))
    for study, space in zip((first, second), spaces, strict=True):
        frame = tune.trials_frame(study)
        assert len(frame) == 4
        for name, (low, high) in zip(("IS", "UGS", "epoch"), space, strict=True):
            assert frame[name].between(low, max(high, 1.0)).all()
    for row, study in (("after 2", first), ("after 4", second)):
        point = finished.rows[row]["point"]
        assert (point["IS"], point["UGS"]) == (study.best_params["IS"], study.best_params["UGS"])


def test_table_2_has_real_and_synthetic_sets(finished):
    assert list(finished.scaling) == ["real", "x1", "x2"]
    assert [finished.scaling[name]["num_images"] for name in finished.scaling] == [100, 100, 200]
    assert all(len(row["test"]) == 2 for row in finished.scaling.values())


def test_what_the_folder_holds(finished):
    path = finished.course.run.path
    assert path.relative_to(finished.runs_dir).as_posix() == "digits-100/tiny-demo-seed0"
    files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert files == {
        "manifest.json", "latents.safetensors", "table_1.json", "table_2.json",
        *(f"{step}/{name}" for step in ("1_transfer", "3_finetune")
          for name in ("epoch_001.safetensors", "epoch_002.safetensors", "history.json", "settings.json")),
        "2_tune/journal.log", "4_retune/journal.log",
        *(f"5_datasets/block_0{k}.{kind}" for k in (1, 2) for kind in ("npz", "json")),
        *(f"5_datasets/predicted_{row}.safetensors" for row in ("real", "x1", "x2")),
    }  # fmt: skip
    steps = ["1_transfer", "2_tune", "3_finetune", "4_retune", "5_datasets"]
    assert list(finished.course.run.manifest["steps"]) == steps


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
    with pytest.raises(ValueError, match="row must be one of after 1, .*not 'after 5'"):
        finished.course.point("after 5")


def test_each_point_has_its_own_weights(finished, tiny):
    """A fine-tuned UNet is put aside again; the Class-Encoder is that of the epoch."""
    course, path = finished.course, finished.course.run.path
    pretrained = tiny.unet.state_dict()
    tuned = course.use(1, 2)
    changed = course.backbone.unet.state_dict()
    checkpoint = runs.load_tensors(path / "3_finetune" / "epoch_002.safetensors")
    assert all(torch.equal(changed[name], value.float()) for name, value in checkpoint.items())
    assert not all(torch.equal(changed[name], pretrained[name]) for name in pretrained)
    saved = runs.load_tensors(path / "1_transfer" / "epoch_001.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in tuned.state_dict().items())
    course.use(2)
    assert all(torch.equal(value, pretrained[name]) for name, value in course.backbone.unet.state_dict().items())
    course._loaded = None


def test_use_and_draw_in_any_order(finished, micro):
    """Whatever was put in place by hand before, a point draws the same."""
    course, labels = Course(micro(finished.runs_dir)), torch.tensor([3, 4])
    point = {"IS": 5, "UGS": 1.0, "transfer_epoch": 2, "finetune_epoch": None}
    course.use(2)
    first = course.draw(point, labels, "any order")
    for tuned in ((1, None), (2, 1)):
        course.use(*tuned)
        assert torch.equal(course.draw(point, labels, "any order"), first)
    assert not torch.equal(course.draw({**point, "finetune_epoch": 2}, labels, "any order"), first)


def test_the_unet_was_tuned_with_the_best_class_encoder_fixed(finished):
    """Step 3 leaves the Class-Encoder's checkpoints alone; the losses of steps 1 and 3 are finite and differ."""
    one, three = finished.course.transfer(), finished.course.finetune()
    assert np.isfinite(one.to_numpy()).all() and np.isfinite(three.to_numpy()).all()
    assert one.index.tolist() == three.index.tolist() == [1, 2] and not one.equals(three)


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

    monkeypatch.setattr(train, "fit", refuse)
    monkeypatch.setattr(steps, "generate", refuse)
    monkeypatch.setattr(classifier, "train_classifier", refuse)
    monkeypatch.setattr(backbone, "load", refuse)


def test_a_second_course_reuses_everything(finished, micro, no_work):
    again = Course(micro(finished.runs_dir))
    assert again.transfer().equals(finished.course.transfer())
    assert again.finetune().equals(finished.course.finetune())
    for search in ("search", "research"):
        assert getattr(again, search)().best_params == getattr(finished.course, search)().best_params
    assert {row: again.cas(row) for row in ROWS} == finished.rows
    assert again.scaling() == finished.scaling
    assert len(again.synthetic(2)) == 200
    with pytest.raises(Worked):  # a third block is not there
        again.synthetic(3)


def test_a_tables_classifiers_side_by_side_are_those_one_by_one(copied, micro, monkeypatch):
    """On one core each; also where half of the table was there already."""
    rows = copied / "digits-100" / "tiny-demo-seed0" / "table_2.json"
    found = {}
    with threadpool_limits(1, user_api="openmp"):
        for name, at_once, kept in (("alone", 1, ()), ("two", 2, ()), ("the rest", 3, ("real", "x2"))):
            runs.save_json(rows, {row: found["alone"][row] for row in kept})
            monkeypatch.setattr(devices, "best_at_once", lambda count, at_once=at_once: at_once)
            course = Course(micro(copied))
            found[name] = course.scaling()
            assert float((course.predicted("x1") == course.data.test.labels).float().mean()) == pytest.approx(
                found[name]["x1"]["test"][0]
            )
    assert found["alone"] == found["two"] == found["the rest"]


def test_another_seed_is_another_run(finished, micro, no_work):
    with pytest.raises(Worked):
        Course(micro(finished.runs_dir, seed=1)).transfer()


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"transfer_epochs": 3}, "transfer"), ({"num_images": 50}, "search"), ({"select_on": "test"}, "search"),
     ({"finetune_learning_rate": 0.5}, "finetune")],
)  # fmt: skip
def test_settings_that_disagree_with_the_folder_are_refused(finished, micro, no_work, changes, step):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r} was asked for"):
        getattr(Course(micro(finished.runs_dir, **changes)), step)()


@pytest.mark.parametrize("changes", [{"num_images": 50}, {"classifier_seeds": 3}])
def test_a_row_of_other_settings_is_not_passed_off_as_asked_for(copied, micro, changes):
    """Refused, or made anew: a row made from 40 images by 2 classifiers is neither of 50 nor by 3."""
    shutil.rmtree(copied / "digits-100/tiny-demo-seed0/2_tune")
    try:
        found = Course(micro(copied, **changes)).cas("after 1")
    except ValueError:
        return
    assert found["num_images"] == changes.get("num_images", 40)
    assert len(found["test"]) == changes.get("classifier_seeds", 2)


def test_a_longer_search_whose_best_epoch_is_another_makes_the_later_steps_stale(copied, micro, no_work):
    """The UNet was fine-tuned with one Class-Encoder; it is not to be used with another."""
    course = Course(micro(copied, n_trials=5))
    best = course.run.manifest["steps"]["2_tune"]["best"]
    study = tune.open_study(course.run.folder("2_tune") / "journal.log", "step 2")
    first = study.trials[0]
    study.add_trial(optuna.trial.create_trial(
        params={**first.params, "epoch": 3 - best["epoch"]}, distributions=first.distributions, value=1.1,
        user_attrs={**first.user_attrs, "value": 1.1},
    ))  # fmt: skip
    with pytest.raises((ValueError, Worked)):
        course.research()


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


def test_balanced_sets_and_random_parts(finished, micro, tmp_path):
    """As in the released code: equal numbers per class, x1 apart, x2 a random part of x3."""
    shutil.copytree(finished.runs_dir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "digits-100/tiny-demo-seed0/5_datasets")
    course = Course(micro(tmp_path, class_mix="balanced", larger_sets="random", max_multiple=3))
    one, two, three = (course.synthetic(k) for k in (1, 2, 3))
    assert [len(part) for part in (one, two, three)] == [100, 200, 300]
    assert torch.bincount(one.labels).tolist() == [10] * 10 and torch.bincount(three.labels).tolist() == [30] * 10
    drawn = {image.numpy().tobytes(): int(label) for image, label in zip(three.images, three.labels, strict=True)}
    inside = [drawn.get(image.numpy().tobytes()) == int(label) for image, label in zip(two.images, two.labels)]
    assert all(inside) and len({image.numpy().tobytes() for image in two.images}) == 200  # no image twice
    assert not any(image.numpy().tobytes() in drawn for image in one.images)
    rows = course.scaling()
    assert [rows[name]["num_images"] for name in ("real", "x1", "x2", "x3")] == [100, 100, 200, 300]
    assert rows["x3"]["point"]["class_mix"] == "balanced"


def test_the_sets_start_from_noise_of_no_trial(finished):
    """The same labels at the same point, as a trial would draw them."""
    course = finished.course
    labels = course.synthetic(1).labels[:8]
    trial = course.draw(course.point("after 4"), labels, "trial")
    assert not torch.equal(trial, course.synthetic(1).images[:8])


def test_a_deleted_block_is_made_again_the_same(copied, finished, micro):
    path = copied / "digits-100/tiny-demo-seed0/5_datasets/block_02.npz"
    path.unlink()
    made = Course(micro(copied)).synthetic(2)
    expected = finished.course.synthetic(2)
    assert path.exists() and torch.equal(made.images, expected.images) and torch.equal(made.labels, expected.labels)


def test_blocks_are_datasets_that_numpy_reads(finished):
    with np.load(finished.course.run.path / "5_datasets/block_01.npz", allow_pickle=False) as file:
        assert file["images"].shape == (100, 16, 16, 3) and file["images"].dtype == np.uint8
        assert torch.equal(torch.from_numpy(file["images"]).permute(0, 3, 1, 2), finished.course.synthetic(1).images)


# --- a killed step ---


class Killed(BaseException):
    pass


def kill_after_an_epoch(patch):
    save = runs.save_tensors

    def killing(path, *args, **options):
        if path.name == "epoch_002.safetensors":
            raise Killed
        return save(path, *args, **options)

    patch.setattr(runs, "save_tensors", killing)


def test_a_killed_transfer_goes_on_to_the_same_result(finished, micro, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after_an_epoch(patch)
        with pytest.raises(Killed):
            Course(micro(tmp_path)).transfer()
    history = Course(micro(tmp_path)).transfer()
    assert history.equals(finished.course.transfer())
    for name in ("epoch_001.safetensors", "epoch_002.safetensors"):
        mine = tmp_path / "digits-100/tiny-demo-seed0/1_transfer" / name
        assert mine.read_bytes() == (finished.course.run.path / "1_transfer" / name).read_bytes()


def test_a_killed_transfer_does_not_go_on_with_other_settings(micro, tmp_path, monkeypatch):
    """Refused, or begun anew; going on would mix two learning rates in one set of checkpoints."""
    with monkeypatch.context() as patch:
        kill_after_an_epoch(patch)
        with pytest.raises(Killed):
            Course(micro(tmp_path / "a")).transfer()
    try:
        found = Course(micro(tmp_path / "a", transfer_learning_rate=1e-4)).transfer()
    except ValueError:
        return
    assert found.equals(Course(micro(tmp_path / "b", transfer_learning_rate=1e-4)).transfer())


# --- the reader's own images ---


def test_an_npz_file(micro, tmp_path):
    random = np.random.default_rng(0)
    arrays = {f"{part}_{kind}": random.integers(0, 256, (12, 20, 20, 3), dtype=np.uint8) if kind == "images"
              else np.arange(12, dtype=np.uint8)[:, None] % 3
              for part in ("train", "val", "test") for kind in ("images", "labels")}  # fmt: skip
    np.savez(tmp_path / "mine.npz", **arrays)
    course = Course(micro(tmp_path / "runs", dataset=str(tmp_path / "mine.npz")))
    history = course.transfer()
    assert len(history) == 2 and np.isfinite(history.to_numpy()).all()
    assert course.run.path.parent.name.startswith("mine-") and course.data.image_size == 20
    saved = runs.load_tensors(course.run.path / "1_transfer" / "epoch_002.safetensors")
    assert saved["linear.weight"].shape == (8 * 64, 3)


def test_a_folder_of_images(micro, tmp_path):
    for name, shade in (("cat", 60), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for k in range(8):
            Image.new("RGB", (24, 30), (shade, 3 * k, 0)).save(tmp_path / "pets" / name / f"{k}.png")
    course = Course(micro(tmp_path / "runs", dataset=str(tmp_path / "pets")))
    assert len(course.transfer()) == 2 and course.data.class_names == ("cat", "dog")
    drawn = course.draw({"IS": 2, "UGS": 1.0, "transfer_epoch": 2, "finetune_epoch": None}, torch.tensor([0, 1]), "x")
    assert drawn.shape == (2, 3, 32, 32)


def test_wrong_data_stops_before_anything_is_made(micro, tmp_path):
    with pytest.raises(ValueError, match="Unknown dataset 'digit'.*Did you mean 'digits'"):
        Course(micro(tmp_path / "runs", dataset="digit"))
    assert not (tmp_path / "runs").exists()


def test_the_released_recipe_from_end_to_end(micro, tmp_path):
    """Its Class-Encoder, classifier, searches and sets, on the tiny model with small numbers."""
    course = Course(micro(
        tmp_path, recipe="released", dataset="digits:20", n_trials=3, n_trials_retune=2, num_images=20,
        classifier_width=8, classifier_epochs=2, transfer_epochs=1,
    ))  # fmt: skip
    encoder = course.new_class_encoder()
    assert encoder.contexts().shape == (10, 100, 64) and encoder.linear[0].out_features == 500
    rows, sets = [course.cas(row) for row in ROWS], course.scaling()
    assert all(row["select_on"] == "test" for row in rows)
    first, second = tune.trials_frame(course.search()), tune.trials_frame(course.research())
    assert (len(first), len(second)) == (3, 2) and not first.pruned.any() and not second.pruned.any()
    assert (first.value == first.test_accuracy).all()
    assert list(sets) == ["real", "x1", "x2"]
    assert torch.bincount(course.synthetic(2).labels).sum() == 40
    assert (course.run.path / "5_datasets/block_00.npz").exists()  # x1, apart from x2
    assert "the released code in" in str(course)


def test_a_search_waits_longer_where_its_recipe_says_so(micro, tmp_path):
    released = courses.classifier_options(micro(tmp_path, recipe="released"), in_search=True)
    assert (released["plateau_patience"], released["stop_patience"]) == (25, 50)
    tables = courses.classifier_options(micro(tmp_path, recipe="released"))
    assert (tables["plateau_patience"], tables["stop_patience"]) == (10, 25)
    assert courses.classifier_options(micro(tmp_path), in_search=True) == courses.classifier_options(micro(tmp_path))


def test_only_used_unets_are_kept_when_asked(micro, tmp_path):
    course = Course(micro(tmp_path, finetune_epochs=4, keep_unets="used"))
    course.finetune()
    folder = course.run.path / "3_finetune"
    assert len(list(folder.glob("epoch_*"))) == 4
    best = course.research().best_params["epoch"]
    kept = {f"epoch_{epoch:03d}.safetensors" for epoch in (best, 4)}
    assert {path.name for path in folder.glob("epoch_*")} == kept
    course.cas("after 3"), course.cas("after 4")
    gone = next(epoch for epoch in (1, 2, 3) if epoch != best)
    with pytest.raises(FileNotFoundError, match="keep_unets='used' deletes"):
        course.use(1, gone)


def test_step_3_is_refused_where_the_disk_has_no_room(finished, monkeypatch, capsys):
    course = finished.course
    large = [torch.nn.Parameter(torch.zeros(1).expand(200_000_000))]  # counted, not stored
    monkeypatch.setattr(type(course.backbone.unet), "parameters", lambda self: large)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(5e9)))
        with pytest.raises(OSError, match="needs up to 6 GB in .*where 5 GB are free.*finetune_method='lora'"):
            course._check_disk()
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, int(6e9)))
        course._check_disk()
    assert "Keeps 2 UNets of 0.4 GB" in capsys.readouterr().out


def test_a_unet_tuned_with_another_class_encoder_is_refused(finished, tmp_path):
    """As happens when the first search goes on and finds another best epoch after the fine-tuning."""
    shutil.copytree(finished.runs_dir, tmp_path / "runs")
    course = Course(dataclasses.replace(finished.course.settings, runs_dir=str(tmp_path / "runs")))
    manifest = course.run.manifest
    manifest["steps"]["3_finetune"]["transfer_epoch"] += 1
    runs.save_json(course.run.path / "manifest.json", manifest)
    with pytest.raises(ValueError, match="3_finetune"):
        course.finetune()


def test_the_unet_is_compiled_where_that_pays(micro, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(backbone.Backbone, "compile_unet", lambda self, batch: asked.append(batch))
    point, labels = {"transfer_epoch": 1, "finetune_epoch": None, "IS": 2, "UGS": 2.0}, torch.arange(9) % 10
    auto = Course(micro(tmp_path, sample_batch_size=8))
    auto.draw(point, labels, "any")
    assert not auto.compiles and not asked  # so small a run is over before the compiler is
    told = Course(micro(tmp_path, sample_batch_size=8, compile_unet="yes"))
    told.draw(point, labels[:7], "any")
    assert not asked  # no batch is whole
    told.draw(point, labels, "any")
    assert asked == [16]
    told.reset()
    told.backbone.unet_dtype(torch.float64)  # what a training may leave behind
    monkeypatch.setattr(backbone.Backbone, "compile_unet", lambda self, batch: asked.append(self.unet.dtype))
    told._prepare(point, 9)
    assert asked == [16, torch.float32]  # with the point's weights in place, as they are sampled with
    assert Course(resolve(recipe="demo", backbone="tiny", runs_dir=str(tmp_path))).compiles
    never = resolve(recipe="paper", backbone="tiny", runs_dir=str(tmp_path), compile_unet="no")
    assert not Course(never).compiles
