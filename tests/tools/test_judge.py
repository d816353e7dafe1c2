"""The command judge on folders and files that anyone may have made."""

import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_notebooks import ROOT

from sdgen_lib import __main__ as command
from sdgen_lib.classify import train_classifier
from sdgen_lib.data import Split, load
from sdgen_lib.data.sources import load_generated
from sdgen_lib.evaluate import quality
from sdgen_lib.evaluate.judged import judged
from sdgen_lib.share.formats import part_of, write_folder
from sdgen_lib.show import judged_report


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two epochs for each classifier: what is tested is what is said, not how well they learn."""
    from sdgen_lib.config import recipes

    for name, value in {"classifier_epochs": 2, "classifier_epoch_images": 1}.items():
        monkeypatch.setitem(recipes.RECIPES["demo"], name, value)
    assert train_classifier  # the package's own


def folder(root, classes, count, size=12, seed=0, dark=0):
    """A class a folder, of noise around a grey level of its own."""
    noise = np.random.default_rng(seed)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 60, (size, size, 3)) + 180 * k // max(1, len(classes) - 1) + dark
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def run(tmp_path, *words):
    return command.main(
        ["judge", *map(str, words), "--runs-dir", str(tmp_path / "runs"), "--out", str(tmp_path / "page.html")]
    )


def test_two_folders_are_judged_and_found_again(tmp_path, capsys):
    names = ["cat & <b>dog", "$x^$"]
    real, made = folder(tmp_path / "real", names, 20), folder(tmp_path / "made", names[::-1][:1] + names[:1], 9, seed=1)
    other = folder(tmp_path / "other", names, 8, seed=2, dark=20)
    run(tmp_path, real, made, "--test", other, "--classifiers", "2")
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "18 generated ones of 2 classes" in said
    for words in ("real + generated, randaugment", "Alone: classifiers of the generated", "Suspect images", "copy %"):
        assert words in said and words in page
    assert str(other) in said and "jpeg" in said
    assert "<script" not in page and "<b>dog" not in page and "cat &amp; &lt;b&gt;dog" in page
    assert len(re.findall('src="data:image/png;base64,', page)) >= 2
    images = pd.read_csv(tmp_path / "page_images.csv")
    assert images["class"].tolist() == [0] * 9 + [1] * 9 and images["number_in_class"].tolist() == [*range(1, 10)] * 2
    assert (
        set(quality.SCORES) | {"another_class", "unlike_any", "copy", "blank"} < set(images)
        and not images["blank"].any()
    )
    for kept in ("page.html", "page_images.csv"):
        (tmp_path / kept).rename(tmp_path / "away")
        with pytest.raises(SystemExit, match="is there: give another --out, or --overwrite"):
            run(tmp_path, real, made)
        (tmp_path / "away").rename(tmp_path / kept)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("record.json")}
    run(tmp_path, real, made, "--test", other, "--classifiers", "2", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("record.json")} == before


def test_other_images_are_another_result(tmp_path, capsys):
    names = ["a", "b"]
    real = folder(tmp_path / "real", names, 20)
    rows = []
    for seed in (1, 2):
        made = folder(tmp_path / f"made {seed}", names, 6, seed=seed)
        run(tmp_path, real, made, "--classifiers", "1", "--overwrite")
        rows.append(len(list((tmp_path / "runs").rglob("judged/**/record.json"))))
    assert rows == [6, 10]  # the two rows of real images alone are shared


def test_a_file_of_arrays_and_a_class_that_was_never_drawn(tmp_path, capsys):
    real = folder(tmp_path / "real", ["a", "b", "c"], 20)
    noise = np.random.default_rng(0)
    images, labels = noise.integers(0, 255, (9, 20, 20, 3), np.uint8), np.arange(9) % 2
    np.savez(tmp_path / "made.npz", train_images=images, train_labels=labels)
    run(tmp_path, real, tmp_path / "made.npz", "--classifiers", "1")
    said = capsys.readouterr()
    assert "9 generated ones of 3 classes" in said.out
    assert re.search(r"^\S*made.npz has no image of class 'c'\.$", said.err, re.M)


def test_test_images_among_the_generated_ones_are_found_even_as_jpeg(tmp_path, capsys):
    real = folder(tmp_path / "real", ["a", "b"], 30, size=8)
    data = load(real, seed=0)
    made = folder(tmp_path / "made", ["a", "b"], 8, size=8, seed=5)
    for i, (image, label) in enumerate(zip(data.test.images[:3], data.test.labels)):
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 40))
        picture.save(made / "ab"[label] / f"9 leak {i}.jpg", quality=75)
    run(tmp_path, real, made, "--classifiers", "1")
    said = capsys.readouterr().out
    assert "LEAK: 3 of the 19 generated images are one of the real test images" in said
    assert "generated images are one of the real validation images" not in said
    assert "None of the real training images is one of the real validation or test images" in said
    table = pd.read_csv(tmp_path / "page_images.csv")
    leaks = table[table.twin_of_test]
    assert len(leaks) == 3 and all(re.fullmatch(r"\./[ab]/9 leak \d\.jpg", file) for file in leaks.file)


def test_a_single_held_image_is_known_again():
    images = torch.randint(0, 255, (3, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert quality.twins(images[:1], images).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("made", "words"), [(["a", "x"], r"classes of .*made.* are not those of .*real.*has besides 'x'"), (["a"], None)]
)
def test_classes_must_be_the_real_ones(tmp_path, capsys, made, words):
    real = folder(tmp_path / "real", ["a", "b"], 20)
    folder(tmp_path / "made", made, 5)
    if words:
        with pytest.raises(SystemExit, match=words):
            run(tmp_path, real, tmp_path / "made")
    else:
        run(tmp_path, real, tmp_path / "made", "--classifiers", "1")
        assert "no image of class 'b'" in capsys.readouterr().err


def test_a_single_generated_image_is_refused_before_anything_is_trained(tmp_path):
    real = folder(tmp_path / "real", ["a", "b"], 20)
    folder(tmp_path / "made", ["a"], 1)
    with pytest.raises(SystemExit, match="There is 1 generated image"):
        run(tmp_path, real, tmp_path / "made")
    assert not list((tmp_path / "runs").rglob("record.json"))


def test_as_many_generated_images_as_real_validation_ones_are_measured(small, tmp_path):
    """Copies of real images that nothing has learnt from are no better than such images, however many there are."""
    course = small(tmp_path / "runs")
    data = course.data
    made = Split(data.val.images.repeat(20, 1, 1, 1), data.val.labels.repeat(20))
    found = judged(course.workspace, made)
    assert found.whole["num_generated"] == found.held_out["num_generated"] == len(data.val)
    page = judged_report.page(found, data, "real", "made")
    assert "random starts alone" in page and re.search(r"copy [\d.]+ % \([\d.]+ %\)", page)


def test_what_this_course_exports_is_read_again(tmp_path):
    names = ("colon, adenocarcinoma", "T-shirt/top")
    np.savez(
        tmp_path / "real.npz",
        class_names=np.array(names),
        **{
            f"{part}_{kind}": np.zeros((8, 12, 12, 3), np.uint8) if kind == "images" else np.arange(8) % 2
            for part in ("train", "val", "test")
            for kind in ("images", "labels")
        },
    )
    data = load(tmp_path / "real.npz")
    write_folder(data, tmp_path / "made", {"train": part_of(Split(data.train.images + 9, data.train.labels))})
    (tmp_path / "made" / "README.md").write_text("a card")
    made = load_generated(tmp_path / "made", data)
    again = made.images
    assert len(made.files) == 8 and all((tmp_path / "made" / "train" / file).is_file() for file in made.files)
    assert again.labels.bincount().tolist() == [4, 4] and (again.images == 9).all()


def test_notes_and_many_missing_classes_are_said(tmp_path):
    data = load(folder(tmp_path / "real", [f"class {k}" for k in range(9)], 20))
    made = folder(tmp_path / "made", ["class 0"], 3)
    Image.new("RGB", (8, 8)).save(made / "loose.png")
    with pytest.warns(UserWarning, match="loose.png"), pytest.warns(UserWarning, match="'class 1'.* and 3 more"):
        load_generated(made, data)
    with pytest.raises(ValueError, match="leave :2 out"):
        load_generated(f"{made}:2", data)


def test_a_page_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in (
        (tmp_path, r"is there: give another --out\.$"),
        (tmp_path / "file/page.html", "cannot be written"),
    ):
        with pytest.raises(SystemExit, match=words):
            command.main(["judge", "digits:20", "nowhere", "--overwrite", "--out", str(out)])


def test_what_is_not_there_is_one_line(tmp_path):
    words = [
        sys.executable,
        "-m",
        "sdgen_lib",
        "judge",
        "digits:20",
        str(tmp_path / "nowhere"),
        "--runs-dir",
        str(tmp_path),
    ]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "nowhere" in result.stderr
