"""What is taken away, read back by the libraries it is meant for; and which run's results they are."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import small as small_run
import strange_names
import torch
from PIL import Image

from sdgen_lib import data
from sdgen_lib.config.settings import resolve
from sdgen_lib.data import Split
from sdgen_lib.data.folders import folder_names
from sdgen_lib.diffusion import backbone, weights
from sdgen_lib.evaluate import quality
from sdgen_lib.evaluate.filters import Filter
from sdgen_lib.evaluate.sets import block_step, synthetic
from sdgen_lib.methods.class_encoder import ClassEncoderMethod
from sdgen_lib.share import export, generator
from sdgen_lib.share.formats import write_parquet
from sdgen_lib.share.reopen import choices, workspace_of
from sdgen_lib.store import files
from sdgen_lib.store.run import digest, results
from sdgen_lib.work.workspace import Workspace

LABELS = torch.tensor([1, 0, 1])
PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def taken(course, tmp_path_factory):
    """The small run in every format: {format: folder}."""
    base = tmp_path_factory.mktemp("taken")
    formats = ("folder", "npz", "parquet", "generator")
    return {to: export.export(course.workspace, course.source(), to, base / to) for to in formats}


@pytest.fixture(scope="module")
def expected(course):
    """The splits that a whole export holds."""
    return {"train": course.synthetic(2), "val": course.data.val, "test": course.data.test}


@pytest.fixture
def moved(course, tmp_path):
    """The small run's results in another place: (its run folder, its dataset), both free to be changed."""
    run = shutil.copytree(course.run.path, tmp_path / "runs" / course.run.path.parent.name / course.run.path.name)
    return run, Path(shutil.copy(course.settings.dataset, tmp_path / "elsewhere.npz"))


def npz_of(folder):
    (path,) = folder.glob("*.npz")
    return np.load(path, allow_pickle=False)


def train_of(folder) -> Split:
    """The training part of an exported .npz."""
    with npz_of(folder) as file:
        images = torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2)
        return Split(images, torch.from_numpy(file["train_labels"][:, 0].astype(np.int64)))


def same(a: Split, b: Split) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def as_split(pairs) -> Split:
    """(PIL image, label) pairs -> a Split."""
    pairs = [(np.array(image.convert("RGB")), int(np.asarray(label).item())) for image, label in pairs]
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
    return Split(images, torch.tensor([label for _, label in pairs]))


def same_set(a: Split, b: Split) -> bool:
    """Whether two splits hold the same labelled images, in any order."""
    sets = [sorted((int(y), x.contiguous().numpy().tobytes()) for x, y in zip(s.images, s.labels)) for s in (a, b)]
    return sets[0] == sets[1]


def rewrite(run, name, change):
    """Changes the records of a step in a run folder as their writer would have written them."""
    found = results(run, name)
    assert found
    for result in found:
        record = json.loads(json.dumps({key: value for key, value in result.record.items() if key != "sum"}))
        change(record)
        files.save_json(result.folder / "record.json", record | {"sum": digest(record)})


# --- round trips ---


def test_image_folder_by_torchvision(taken, expected):
    from torchvision.datasets import ImageFolder

    for part in PARTS:
        read = ImageFolder(taken["folder"] / part)
        assert read.classes == ["class 0", "class 1"]
        assert same_set(as_split(read), expected[part])


def test_npz_by_medmnist(taken, expected, tmp_path):
    """medmnist's own reader, of the file under a name of its own."""
    import medmnist

    (path,) = taken["npz"].glob("*.npz")
    (tmp_path / "breastmnist.npz").write_bytes(path.read_bytes())
    for part in PARTS:
        assert same(as_split(medmnist.BreastMNIST(part, root=tmp_path)), expected[part])
    with npz_of(taken["npz"]) as file:
        assert file["train_labels"].shape == (12, 1) and file["train_labels"].dtype == np.uint8


def test_a_missing_pyarrow_gives_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="need pyarrow: pip install pyarrow, or export to folder or npz"):
        write_parquet(None, tmp_path, {})


def test_parquet_by_datasets(taken, expected, tmp_path):
    import datasets
    from PIL.Image import Image

    whole = datasets.load_dataset(str(taken["parquet"]), cache_dir=str(tmp_path))
    assert list(whole) == ["train", "validation", "test"]
    features = whole["train"].features
    assert isinstance(features["image"], datasets.Image) and isinstance(whole["train"][0]["image"], Image)
    assert features["label"] == datasets.ClassLabel(names=["class 0", "class 1"])
    for part, name in zip(PARTS, whole):
        assert same(as_split((row["image"], row["label"]) for row in whole[name]), expected[part])
    blocks = sorted(path.name for path in (taken["parquet"] / "data").iterdir())
    assert blocks[1:3] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]


@pytest.mark.parametrize("to", ["npz", "folder"])
def test_a_set_is_a_dataset_of_the_course(taken, course, expected, to):
    read = data.load(next(taken[to].glob("*.npz")) if to == "npz" else taken[to], image_size=8)
    assert read.class_names == course.data.class_names
    assert all(same_set(getattr(read, part), expected[part]) for part in PARTS)


def test_the_saved_generator_draws_the_runs_images(taken, course):
    """In a process that knows nothing of the run, at its point, and at another one."""
    program = """
import sys, numpy, sdgen_lib
generator = sdgen_lib.load(sys.argv[1], device="cpu", precision="fp32")
for name, point in (("own", {}), ("other", dict(num_inference_steps=3, guidance_scale=0.5))):
    numpy.save(name + ".npy", generator([1, "class 0", 1], **point).numpy())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(taken["generator"])]
    subprocess.run(command, cwd=taken["generator"].parent, check=True, env=environment)
    point = course.point("after 4")
    other = dataclasses.replace(point, num_inference_steps=3, guidance_scale=0.5)
    for name, at in (("own", point), ("other", other)):
        read = torch.from_numpy(np.load(taken["generator"].parent / f"{name}.npy", allow_pickle=False))
        assert torch.equal(read, course.draw(at, LABELS, "generator"))


@pytest.mark.parametrize("row", ["after 1", "after 2"])
def test_the_generator_of_an_earlier_row(course, tmp_path, row):
    out = export.export(course.workspace, course.source(row), "generator", tmp_path / "out")
    loaded, point = generator.load(out, "cpu", "fp32"), course.point(row)
    assert (loaded.num_inference_steps, loaded.guidance_scale) == (point.num_inference_steps, point.guidance_scale)
    assert torch.equal(loaded(LABELS), course.draw(point, LABELS, "generator"))
    assert json.loads((out / "generator.json").read_text())["point"] == point.to_dict()


def test_generator_json_says_what_was_used(taken, course):
    facts = json.loads((taken["generator"] / "generator.json").read_text())
    assert facts["trained_on"] == course.data.slug and facts["row"] == "after 4" and facts["recipe"] == "demo"
    assert facts["fingerprint"] == course.run.fingerprint(course.source().step)
    used = {name: facts["settings"][name] for name in ("transfer_epochs", "n_trials", "select_on", "unconditional")}
    assert used == {"transfer_epochs": 2, "n_trials": 4, "select_on": "val", "unconditional": "zero"}
    assert not {"dataset", "backbone", "runs_dir", "storage", "classifier_seeds"} & set(facts["settings"])


# --- any generator, and exactly its sets ---


@pytest.mark.parametrize("larger_sets", ["nested", "random"])
@pytest.mark.parametrize("multiple", [1, 2, 3, None])
def test_what_is_written_is_the_set_of_the_tables(small, prompts, tmp_path, larger_sets, multiple):
    """Of a generator that is no method's, for both ways of putting blocks together."""
    ws = small(tmp_path / "runs", larger_sets=larger_sets, max_multiple=3).workspace
    source = prompts(ws)
    made = {k: synthetic(ws, source, k) for k in (1, 2, 3)}
    out = export.export(ws, source, "npz", tmp_path / "out", multiple)
    assert same(train_of(out), made[multiple or 3])
    assert (out / "README.md").read_text().count(f"{6 * (multiple or 3)} **generated**") == 1


def test_a_generator_of_no_method(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    source = prompts(ws)
    loaded = generator.load(export.export(ws, source, "generator", tmp_path / "out"), "cpu", "fp32")
    assert torch.equal(loaded(LABELS), source.build()(LABELS))
    text = (tmp_path / "out/README.md").read_text()
    assert "with its generator 'prompts'" in text and "Class-Encoder" not in text


def test_a_set_of_another_generator_is_not_taken(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    synthetic(ws, prompts(ws), 1)
    with pytest.raises(FileNotFoundError, match="no finished 5_datasets/block_01 for these settings: run chapter 07"):
        export.export(ws, prompts(ws, "other words"), "npz", tmp_path / "out")


def test_one_block_is_in_memory_at_a_time(small, prompts, tmp_path, monkeypatch):
    ws, opened = small(tmp_path / "runs").workspace, []
    synthetic(ws, prompts(ws), 3)
    monkeypatch.setattr(export, "synthetic_blocks", None)

    class Counted(zipfile.ZipFile):
        def __init__(self, path, *how):
            if Path(path).name == "images.npz":
                opened.append(Path(path).parents[1].name)
            super().__init__(path, *how)

    monkeypatch.setattr(zipfile, "ZipFile", Counted)
    export.export(ws, prompts(ws), "npz", tmp_path / "out")
    assert opened == ["block_01", "block_02", "block_03"]


# --- a row for each image ---


def records_of(folder) -> list[dict[str, str]]:
    with (folder / "records.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("to", ["folder", "npz", "parquet"])
def test_each_image_can_be_drawn_again_from_its_record(taken, course, expected, to):
    rows = records_of(taken[to])
    assert [int(row["number"]) for row in rows] == list(range(1, 1 + len(expected["train"])))
    assert [int(row["label"]) for row in rows] == expected["train"].labels.tolist()
    generator = course.source().build()
    for k in (0, len(rows) - 1):
        row = rows[k]
        again = generator(
            [int(row["label"])], seed=int(row["seed"]), set_name=row["set"], first_index=int(row["index"])
        )
        assert (again[0].int() - expected["train"].images[k].int()).abs().max() <= 1  # alone, not in its batch
        if to == "folder":
            assert np.array_equal(
                np.array(Image.open(taken[to] / row["file"])).transpose(2, 0, 1), expected["train"].images[k]
            )


def test_a_damaged_record_is_not_taken_and_comes_back(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    synthetic(ws, prompts(ws), 1)
    path = ws.run.peek(block_step(ws, prompts(ws), 1)).folder / "records.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FileNotFoundError, match="records.safetensors is damaged: delete it, then run chapter 07"):
        export.export(ws, prompts(ws), "npz", tmp_path / "out")
    path.unlink()
    synthetic(ws, prompts(ws), 1)
    assert path.read_bytes() == whole and records_of(export.export(ws, prompts(ws), "npz", tmp_path / "out"))


def test_a_filter_keeps_whole_classes_best_images(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    source, n = prompts(ws), len(ws.data.train)
    drawn = synthetic(ws, source, 2)
    out = export.export(ws, source, "npz", tmp_path / "out", kept=Filter("confidence", 0.5, redraw=True))
    rows, scores = records_of(out), quality.scores_of(ws, source, [1, 2])["confidence"]
    assert len(rows) == n and sorted(int(row["label"]) for row in rows) == ws.data.train.labels.sort().values.tolist()
    kept = [int(row["index"]) for row in rows]
    assert same(train_of(out), drawn.take(kept))
    for label in range(ws.data.num_classes):
        own = set((drawn.labels == label).nonzero()[:, 0].tolist())
        assert scores[sorted(own & set(kept))].min() >= scores[sorted(own - set(kept))].max()
    assert (
        "confidence:0.5:redraw" in (out / "README.md").read_text() and "not measured" in (out / "README.md").read_text()
    )
    assert float(rows[0]["confidence"]) == pytest.approx(float(scores[kept[0]]), rel=1e-4)


def test_a_filter_that_cannot_be(course, tmp_path):
    with pytest.raises(ValueError, match="a generator is none: leave 'confidence:0.5' out"):
        export.export(course.workspace, course.source(), "generator", tmp_path / "out", kept=Filter("confidence", 0.5))
    with pytest.raises(FileNotFoundError, match=r"holds x1 \.\. x2 of this"):
        kept = Filter("confidence", 0.25, redraw=True)
        export.export(course.workspace, course.source(), "npz", tmp_path / "out", 1, kept=kept)


# --- what is asked for ---


def test_without_real_images_and_fewer_blocks(course, expected, tmp_path):
    out = export.export(course.workspace, course.source(), "npz", tmp_path / "out", multiple=1, real=False)
    with npz_of(out) as file:
        assert set(file.files) == {"train_images", "train_labels", "class_names"}
    assert same(train_of(out), expected["train"].take(range(6)))
    assert "No real image is in it." in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("multiple", "error", "words"),
    [
        (3, FileNotFoundError, r"x1 \.\. x2 of this .* not x3: run chapter 07 with max_multiple=3"),
        (0, ValueError, "1 or more times"),
        (-1, ValueError, "1 or more times"),
    ],
)
def test_more_than_there_is(course, tmp_path, multiple, error, words):
    with pytest.raises(error, match=words):
        export.export(course.workspace, course.source(), "npz", tmp_path / "out", multiple=multiple)
    assert list(tmp_path.iterdir()) == []  # nor anything half made


def test_what_is_there_is_not_replaced(course, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already there"):
        export.export(course.workspace, course.source(), "npz", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_files_beside_it_are_left_alone(course, tmp_path):
    """Somebody's own manifest.json is theirs, and so is a generator.json that is none of ours."""
    for name in ("manifest.json", "generator.json"):
        (tmp_path / name).write_text('{"files": ["mine"], broken')
    out = export.export(course.workspace, course.source(), "generator", tmp_path / "out")
    generator.load(out, "cpu", "fp32")
    with pytest.raises(ValueError, match="no JSON object"):
        generator.load(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.json", "generator.json", "out"}
    assert (tmp_path / "manifest.json").read_text() == '{"files": ["mine"], broken'


def test_an_unfinished_run(small, tmp_path):
    course = small(tmp_path / "runs")
    for to in ("generator", "npz"):
        with pytest.raises(FileNotFoundError, match="no finished 1_transfer for these settings: run chapter 02 first"):
            export.export(course.workspace, course.source(), to, tmp_path / "out")
    with pytest.raises(ValueError, match="Unknown format 'zip'.*Allowed: folder, generator, npz, parquet"):
        export.export(course.workspace, course.source(), "zip", tmp_path / "out")


def test_a_damaged_block_is_not_taken(moved, tmp_path):
    run, dataset = moved
    path = next(run.glob("5_datasets/block_02/*/images.npz"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(SystemExit, match="block_02.*images.npz is damaged: delete it, then run chapter 07"):
        take(run, "npz", tmp_path / "out", "--dataset", str(dataset))
    assert not (tmp_path / "out").exists()


# --- from a run folder alone ---


def take(run, to, out, *more):
    export.main([str(run), "--to", to, str(out), *more])
    return out


def test_command_line(course, expected, tmp_path, capsys):
    run, where = course.run.path, ("--dataset", course.settings.dataset)
    out = take(run, "npz", tmp_path / "out", *where)
    assert str(out) in capsys.readouterr().out
    assert same(train_of(out), expected["train"])
    assert same(
        train_of(take(run, "npz", tmp_path / "one", "--multiple", "1", *where)), expected["train"].take(range(6))
    )
    loaded = generator.load(take(run, "generator", tmp_path / "two", "--row", "after 2", *where), "cpu", "fp32")
    assert torch.equal(loaded(LABELS), course.draw(course.point("after 2"), LABELS, "generator"))
    for wrong, words in (
        ([str(run), "--to", "npz", str(out), *where], "already there"),
        ([str(tmp_path), "--to", "npz", str(tmp_path / "new")], "is no run folder"),
        ([str(run.parent), "--to", "npz", str(tmp_path / "new")], "is no run folder"),
        ([str(run), "--to", "npz"], "--to folder"),
        ([str(run), str(tmp_path / "new")], "--to folder"),
    ):
        with pytest.raises(SystemExit, match=words) as error:
            export.main(wrong)
        assert "\n" not in str(error.value)


def test_a_setting_changed_after_the_run_changes_nothing_that_is_said(small, course, taken, moved, tmp_path):
    """Somebody asks for other settings in the same folder, and does not get far."""
    run, dataset = moved
    changed = {"transfer_epochs": 1, "n_trials": 7, "unconditional": "class_mean", "select_on": "test"}
    later = small(run.parents[1], dataset=str(dataset), **changed)
    later.run.path = run
    later.transfer()
    with pytest.raises(FileNotFoundError, match="no finished 2_tune for these settings: run chapter 03"):
        export.export(later.workspace, later.source(), "generator", tmp_path / "new")
    for to in ("generator", "npz"):
        out = take(run, to, tmp_path / to, "--dataset", str(dataset))
        assert (out / "README.md").read_text() == (taken[to] / "README.md").read_text()
    assert (tmp_path / "generator/generator.json").read_bytes() == (taken["generator"] / "generator.json").read_bytes()


def test_a_run_with_several_results(small, tmp_path, capsys):
    first = small(tmp_path / "runs", transfer_epochs=1)
    second = small(tmp_path / "runs", transfer_epochs=1, n_trials=3)
    sets = [course.synthetic(1) for course in (first, second)]
    run, where = first.run.path, ("--dataset", first.settings.dataset)
    older, newer = choices(run, "npz", "after 4")
    assert (older.settings["n_trials"], newer.settings["n_trials"]) == (4, 3)
    assert same(train_of(take(run, "npz", tmp_path / "newest", *where)), sets[1])
    out = take(run, "npz", tmp_path / "older", "--result", older.base.fingerprint[:8], *where)
    assert same(train_of(out), sets[0]) and "| changed: n_trials | 4 |" in (out / "README.md").read_text()
    capsys.readouterr()
    export.main([str(run), "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [
        "generated",
        older.base.fingerprint[:12],
        newer.base.fingerprint[:12],
        "generators,",
        *(r.fingerprint[:12] for r in results(run, "4_retune")),
    ]
    assert "transfer_epochs=1" in listed[1] and "n_trials=4" in listed[1] and "n_trials=3" in listed[2]
    for wrong, count in (("", 2), ("x", 0)):
        with pytest.raises(SystemExit, match=f"^{count} of these") as error:
            take(run, "npz", tmp_path / "none", "--result", wrong)
        assert [line.strip() for line in listed[1:3]] == str(error.value).splitlines()[1:]


def test_sets_put_together_in_two_ways(small, course, moved, tmp_path):
    """The same blocks lie under nested sets and under random parts; the newest row of the table tells which."""
    run, dataset = moved
    nested = course.synthetic(2)
    later = small(run.parents[1], dataset=str(dataset), larger_sets="random")
    later.run.path = run
    later.scaling()
    random = later.synthetic(2)
    assert not same(nested, random) and same_set(nested, random)
    where = ("--dataset", str(dataset))
    older, newer = choices(run, "npz", "after 4")
    assert same(train_of(take(run, "npz", tmp_path / "random", *where)), random)
    assert same(train_of(take(run, "npz", tmp_path / "apart", *where, "--multiple", "1")), later.synthetic(1))
    out = take(run, "npz", tmp_path / "nested", *where, "--result", older.newest.fingerprint)
    assert same(train_of(out), nested)
    said = {name: (tmp_path / name / "README.md").read_text() for name in ("random", "nested")}
    assert "| changed: larger_sets | random |" in said["random"] and "larger_sets" not in said["nested"]


def test_random_parts_by_the_recipe(small, tmp_path):
    """Before any row of the table tells: the larger set's blocks are there, and not yet the block that is x1."""
    course = small(tmp_path / "runs", recipe="released", class_encoder_start="random")
    course.synthetic(2)
    run, where = course.run.path, ("--dataset", course.settings.dataset)
    assert same(train_of(take(run, "npz", tmp_path / "out", *where)), course.synthetic(2))
    with pytest.raises(SystemExit, match="no finished 5_datasets/block_00 for these settings"):
        take(run, "npz", tmp_path / "one", "--multiple", "1", *where)
    course.synthetic(1)
    assert same(train_of(take(run, "npz", tmp_path / "one", "--multiple", "1", *where)), course.synthetic(1))


@pytest.mark.parametrize("image_size", [None, 12])
def test_the_settings_are_those_of_the_run(small, tmp_path, image_size):
    """ "after 1", whose point is a setting of its own; a size of images that is no step's setting."""
    asked = dict(default_steps=3, default_guidance=0.5, class_mix="balanced", seed=5, sampler="dpm-solver++")
    course = small(tmp_path / "runs", image_size=image_size, recipe="workshop", **asked)
    course.cas("after 1")
    where = course.settings.dataset
    ws = workspace_of(course.run.path, "generator", "after 1", dataset=where)
    read = {name: getattr(ws.settings, name) for name in asked}
    assert read == asked | {"class_mix": "real"}  # no set was made: the recipe's
    assert (ws.data.fingerprint, ws.data.slug) == (course.data.fingerprint, course.data.slug)
    assert ws.settings.image_size in (image_size, None)
    out = take(course.run.path, "generator", tmp_path / "out", "--row", "after 1", "--dataset", where)
    loaded = generator.load(out, "cpu", "fp32")
    assert (loaded.num_inference_steps, loaded.guidance_scale, loaded.sampler) == (3, 0.5, "dpm-solver++")
    assert torch.equal(loaded(LABELS, seed=5), course.draw(course.point("after 1"), LABELS, "generator"))


def test_a_dataset_that_was_moved(course, moved, taken, tmp_path):
    run, dataset = moved
    assert course.settings.dataset != str(dataset)
    rewrite(run, "5_datasets/*", lambda record: record["run"].update(dataset=str(tmp_path / "gone.npz")))
    with pytest.raises(SystemExit, match="--dataset .*gone.npz .or where it is now") as e:
        take(run, "npz", tmp_path / "out")
    assert "\n" not in str(e.value)
    out = take(run, "npz", tmp_path / "out", "--dataset", str(dataset))
    for name in ("README.md", next(taken["npz"].glob("*.npz")).name):
        if name.endswith(".md"):
            assert (out / name).read_text() == (taken["npz"] / name).read_text().replace("./npz/", "./out/")
        else:
            assert same(train_of(out), train_of(taken["npz"]))
    assert sorted(path.name for path in run.parents[1].iterdir()) == [run.parent.name]  # no second run folder
    other = small_run.write_dataset(tmp_path / "other.npz", seed=1)
    with pytest.raises(SystemExit, match="does not hold what this result was made from.*--dataset") as error:
        take(run, "npz", tmp_path / "new", "--dataset", str(other))
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match="No file or folder at .*nowhere.npz"):
        take(run, "npz", tmp_path / "new", "--dataset", str(tmp_path / "nowhere.npz"))


def test_the_number_of_images_kept_is_that_of_the_run(course, moved):
    """A run of digits:6 and the like: the place is given, the number is on record."""
    run, dataset = moved
    rewrite(run, "5_datasets/*", lambda record: record["run"].update(dataset="gone.npz:6"))
    assert workspace_of(run, dataset=str(dataset)).settings.dataset == f"{dataset}:6"


def test_a_set_is_taken_without_the_model(moved, taken, tmp_path):
    run, dataset = moved
    (gone, other) = tmp_path / "gone", shutil.copytree(weights.TINY, tmp_path / "other")
    for name in ("5_datasets/*", "4_retune"):
        rewrite(run, name, lambda record: record["run"].update(backbone=str(gone)))
    where = ("--dataset", str(dataset))
    assert same(train_of(take(run, "npz", tmp_path / "out", *where)), train_of(taken["npz"]))
    with pytest.raises(SystemExit, match="--backbone .*gone .or where it is now"):
        take(run, "generator", tmp_path / "new", *where)
    with pytest.raises(SystemExit, match="No folder .*gone.*--backbone PATH"):
        take(run, "generator", tmp_path / "new", *where, "--backbone", str(gone))
    (other / "scheduler/scheduler_config.json").write_text(
        (other / "scheduler/scheduler_config.json").read_text() + "\n"
    )
    with pytest.raises(SystemExit, match="other' is not the one that this result was made with"):
        take(run, "generator", tmp_path / "new", *where, "--backbone", str(other))
    moved_model = shutil.copytree(weights.TINY, tmp_path / "moved")
    loaded = generator.load(
        take(run, "generator", tmp_path / "new", *where, "--backbone", str(moved_model)), "cpu", "fp32"
    )
    assert torch.equal(loaded(LABELS), generator.load(taken["generator"], "cpu", "fp32")(LABELS))


def test_a_run_of_the_older_layout(tmp_path):
    run = tmp_path / "runs/digits/tiny-demo-seed0"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"steps": {"1_transfer": {}}, "settings": {}}')
    with pytest.raises(SystemExit, match="older version of sdgen") as error:
        take(run, "npz", tmp_path / "out")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r["run"].update(recipe="../x"), "Unknown recipe"),
        (lambda r: r["run"].update(recipe=["demo"]), "is not what this version of sdgen writes"),
        (lambda r: r["run"].update(seed="0"), "seed must be a whole number"),
        (lambda r: r["run"].update(backbone="no such"), "add --backbone 'no such'"),
        (lambda r: r["run"].pop("dataset"), "is not what this version of sdgen writes"),
        (lambda r: r["run"].update(dataset=["x"]), "is not what this version of sdgen writes"),
        (lambda r: r.update(run=None), "has no finished 4_retune"),
        (lambda r: r.update(settings=3), "has no finished 4_retune"),
        (lambda r: r.pop("needs"), "has no finished 4_retune"),
        (lambda r: r["settings"].update(classifier_shortcut="rm -rf"), "Unknown value for classifier_shortcut"),
        (lambda r: r["settings"].update(n_trials=10**12), "n_trials must be"),
        (lambda r: r["settings"].update(n_trials=None), "n_trials must be"),
        (lambda r: r["settings"].update(n_trials=5), "was not made by this version of the paper's method"),
        (lambda r: r.update(fingerprint=64 * "0"), "was not made by this version of the paper's method"),
    ],
)
def test_a_strangers_records_are_checked(moved, tmp_path, change, words):
    """As a notebook's parameters are; nothing is said of a result that its own records do not lead to."""
    run, dataset = moved
    rewrite(run, "4_retune", change)
    with pytest.raises(SystemExit, match=words) as error:
        take(run, "generator", tmp_path / "out", "--dataset", str(dataset))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["name", "settings", "needs", "roots", "inputs", "facts", "finished", "run"])
@pytest.mark.parametrize("wrong", [None, 3, [], {}, {"generator": []}, "x"])
def test_other_records_of_another_shape_end_with_one_line(moved, tmp_path, field, wrong):
    """Those of the rows, which only the card looks at: it is written without them, or not at all."""
    run, dataset = moved
    rewrite(run, "table_2/*", lambda record: record.update({field: wrong}))
    try:
        take(run, "npz", tmp_path / "out", "--dataset", str(dataset))
    except SystemExit as stopped:
        assert "is not what this version of sdgen writes" in str(stopped) and "\n" not in str(stopped)


def test_a_strangers_settings_of_how_are_not_taken(moved):
    run, dataset = moved
    change = {
        "storage": "sqlite:///mine.db",
        "runs_dir": "/tmp/x",
        "image_size": 9,
        "dataset": "/etc",
        "seed": 1,
        "sample_batch_size": 1,
    }
    rewrite(run, "1_transfer", lambda record: record["settings"].update(change))
    settings = workspace_of(run, dataset=str(dataset)).settings
    assert (settings.storage, settings.dataset, settings.seed) == (None, str(dataset), 0)
    assert settings.runs_dir == str(run.parents[1]) and settings.sample_batch_size == resolve("demo").sample_batch_size


def test_a_set_that_a_compiled_unet_drew_is_taken_away_beside_the_others(moved, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone.Backbone, "compile_unet", lambda self, *sizes: None)  # only what is on record counts
    run, dataset = moved
    runs_dir, elsewhere = run.parents[1], str(dataset)
    ws = workspace_of(run, dataset=elsewhere).varied(compile_unet="yes", sample_batch_size=3)
    synthetic(ws, ClassEncoderMethod(ws).source("after 4"), 1)
    eager, compiled = choices(run, "folder", "after 4")
    assert "compile_unet='yes'" in compiled.line and "compile_unet" not in eager.line
    for choice, how in ((eager, ("no", 4)), (compiled, ("yes", 3))):
        again = workspace_of(run, dataset=elsewhere, result=choice.newest.fingerprint[:12])
        assert again.run.path.parents[1] == runs_dir and again.settings.compile_unet == how[0]
        assert how[0] == "no" or again.settings.sample_batch_size == how[1]
        source = ClassEncoderMethod(again).source("after 4")
        assert again.run.fingerprint(block_step(again, source, 1)) == choice.base.fingerprint


# --- what is opened on a stranger's word ---


@pytest.fixture
def sealed(monkeypatch):
    """Fails where a dataset or a model is looked for."""

    def opened(*args, **options):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(data, "load", opened)
    monkeypatch.setattr(weights, "find", opened)
    monkeypatch.setattr(weights.huggingface_hub, "snapshot_download", opened)


@pytest.mark.parametrize("to", ["npz", "generator"])
@pytest.mark.parametrize(
    "dataset", ["/etc", "~/pictures", "../../secret", "pathmnist_224", "cifar10:500", "\x1b[2J; rm"]
)
def test_no_dataset_is_read_on_a_records_word(moved, tmp_path, sealed, monkeypatch, to, dataset):
    run, _ = moved
    monkeypatch.setenv("SDGEN_DATA", str(tmp_path / "cache"))
    for name in ("5_datasets/*", "4_retune"):
        rewrite(run, name, lambda record: record["run"].update(dataset=dataset))
    with pytest.raises(SystemExit, match="Nothing is opened or downloaded on a record's word.*add --dataset") as error:
        take(run, to, tmp_path / "out")
    assert str(error.value).isprintable() and not (tmp_path / "out").exists()


def test_a_dataset_in_the_folder_of_the_runs_is_read(moved, tmp_path, taken):
    """And not what a link there leads to."""
    run, dataset = moved
    inside, link = run.parents[1] / "set.npz", run.parents[1] / "link.npz"
    shutil.copy(dataset, inside)
    link.symlink_to(dataset)
    rewrite(run, "5_datasets/*", lambda record: record["run"].update(dataset=str(inside)))
    assert same(train_of(take(run, "npz", tmp_path / "out")), train_of(taken["npz"]))
    rewrite(run, "5_datasets/*", lambda record: record["run"].update(dataset=str(link)))
    with pytest.raises(SystemExit, match="add --dataset"):
        take(run, "npz", tmp_path / "new")


@pytest.mark.parametrize("backbone", ["sd2", "evil/model", "evil/model@main", "/etc", "~/model", "./model"])
@pytest.mark.parametrize("with_model", [True, False])
def test_no_model_is_fetched_on_a_records_word(moved, tmp_path, monkeypatch, backbone, with_model):
    """Nor where the record leaves out which one it was."""
    run, dataset = moved

    def opened(*args, **options):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(weights, "find", opened)

    def change(record):
        record["run"].update(backbone=backbone)
        if not with_model:
            record["roots"].pop("model", None)

    rewrite(run, "*", change)
    with pytest.raises(SystemExit, match="Nothing is opened or downloaded on a record's word.*add --backbone") as error:
        take(run, "generator", tmp_path / "out", "--dataset", str(dataset))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_model_that_is_asked_for_is_fetched(moved, tmp_path, monkeypatch):
    run, dataset = moved
    rewrite(run, "4_retune", lambda record: record["run"].update(backbone="sd2"))
    asked = []

    def find(name, half=False):
        asked.append(name)
        raise OSError("no network here")

    monkeypatch.setattr(weights, "find", find)
    with pytest.raises(SystemExit, match="no network here"):
        take(run, "generator", tmp_path / "out", "--dataset", str(dataset), "--backbone", "sd2")
    assert asked == ["sd2"]


def npy(dtype, shape, content=b"") -> bytes:
    file = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


GOOD = npy("<i8", (6,), (np.arange(6) % 2).astype("<i8").tobytes())


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (npy("u1", (10**12, 8, 8, 3)), GOOD, "is no block of this dataset's images"),
        (npy("u1", (6, 8, 8, 3)) + bytes(10**8), GOOD, "is no block of this dataset's images"),  # never unpacked
        (npy("u1", (5, 8, 8, 3)) + bytes(5 * 192), GOOD, "holds images .5, 8, 8, 3. and labels .6,., not images .6,"),
        (npy("u1", (6, 8, 8, 3)), GOOD, "is no block of this dataset's images"),  # breaks off
        (npy("f8", (6, 8, 8, 3)), GOOD, "is no block"),
        (npy("u1", (6, 8, 8, 3)) + bytes(6 * 192), npy("<i8", (6,), np.full(6, 9).tobytes()), "has labels from 9 to 9"),
        (b"PK", GOOD, "is no block"),
        (None, GOOD, "is no block"),
    ],
)
def test_a_strangers_block_is_not_unpacked_beyond_its_size(moved, tmp_path, images, labels, words):
    run, dataset = moved
    (path,) = run.glob("5_datasets/block_01/*/images.npz")
    with zipfile.ZipFile(
        path, "w", zipfile.ZIP_STORED if images and len(images) < 10**6 else zipfile.ZIP_DEFLATED
    ) as archive:
        archive.writestr("labels.npy", labels)
        if images is not None:
            archive.writestr("images.npy", images)
    rewrite(run, "5_datasets/block_01", lambda record: record["files"].update({"images.npz": files.checksum(path)}))
    tracemalloc.start()
    try:
        with pytest.raises(SystemExit, match=words) as error:
            take(run, "npz", tmp_path / "out", "--multiple", "1", "--dataset", str(dataset))
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**7
    finally:
        tracemalloc.stop()


def test_what_another_method_made_is_not_taken_for_the_papers(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    synthetic(ws, prompts(ws), 1)
    assert choices(ws.run.path, "npz", "after 4") == []
    with pytest.raises(SystemExit, match="no finished 1_transfer: run chapter 02 first"):
        take(ws.run.path, "npz", tmp_path / "out")


def test_blocks_without_their_training_can_be_taken(course, moved, tmp_path):
    """Who needs room deletes the UNets; the sets that they drew stay what they are."""
    run, dataset = moved
    block = block_step(course.workspace, course.source(), 1)
    shutil.rmtree(run / "3_finetune")
    ws = Workspace(course.settings)
    ws.run.path = run
    assert ws.run.peek(block)
    out = export.export(ws, course.source(), "npz", tmp_path / "out")
    assert same(train_of(out), course.synthetic(2))
    with pytest.raises(FileNotFoundError, match="no finished 3_finetune"):
        export.export(ws, course.source(), "generator", tmp_path / "new")


# --- names ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cat", "dog"), ["cat", "dog"]),
        (("dog", "cat"), ["0_dog", "1_cat"]),  # ImageFolder would number them the other way round
        (("a/b", "a\\c", "d:e"), ["a-b", "a-c", "d-e"]),
        (("..", "x"), ["0", "1_x"]),
        (("CON", "x"), ["0_CON", "1_x"]),
        (("A", "a"), ["0_A", "1_a"]),  # one folder on Windows and macOS
        (("é" * 100, "z"), ["0_" + "é" * 40, "1_z"]),
    ],
)
def test_folder_names(names, expected):
    found = folder_names(names)
    assert found == expected == sorted(found)


def test_any_names_are_taken_away(small, prompts, tmp_path):
    """Read back by their readers: the same names for the same images, and no path that leads elsewhere."""
    import datasets
    from torchvision.datasets import ImageFolder

    names, count = strange_names.SEEN, len(strange_names.SEEN)
    arrays = {"class_names": np.array(names)}
    for part, each in (("train", 1), ("val", 1), ("test", 1)):
        labels = np.arange(count * each) % count
        arrays |= {f"{part}_labels": labels, f"{part}_images": np.zeros((len(labels), 8, 8), np.uint8)}
    np.savez(tmp_path / "odd.npz", **arrays)
    ws = small(tmp_path / "runs", dataset=str(tmp_path / "odd.npz"), num_images=count).workspace
    source = prompts(ws)
    synthetic(ws, source, 1)
    out = {to: export.export(ws, source, to, tmp_path / to / "out") for to in ("folder", "npz", "parquet", "generator")}
    read = ImageFolder(out["folder"] / "train")
    assert len(read.classes) == count and [label for _, label in read.samples] == list(range(count))
    with npz_of(out["npz"]) as file:
        assert tuple(file["class_names"]) == names
    whole = datasets.load_dataset(str(out["parquet"]), cache_dir=str(tmp_path / "cache"))
    assert tuple(whole["train"].features["label"].names) == names
    loaded = generator.load(out["generator"], "cpu", "fp32")
    assert loaded.class_names == names and loaded([names[0], names[-1]]).shape == (2, 3, 8, 8)
    for folder in out.values():
        assert all(str(path.relative_to(folder)).isprintable() for path in folder.rglob("*"))
        assert {path.name for path in folder.parent.iterdir()} == {"out"}
        assert "<img" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("to", ["folder", "npz", "parquet", "generator"])
def test_the_lines_of_a_card_work_as_they_stand(taken, to, tmp_path):
    (program,) = re.findall(r"```python\n(.+?)```", (taken[to] / "README.md").read_text(encoding="utf-8"), re.S)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=taken[to].parent, check=True, env=environment)
