"""Folders as people have them: which are splits, which are classes, what is passed over, and what is said of it."""

import io
import os
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from sdgen_lib import data
from sdgen_lib.data import folders, parts

from .drawn import encoded, pictures_of, shade, write


def counts(found) -> tuple:
    return found.class_names, (len(found.train), len(found.val), len(found.test))


def quietly(root: Path, **options) -> data.ImageData:
    """What is loaded where nothing is to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data.load(root, **options)
    assert found.notes == ()
    return found


def noted(root: Path, message: str) -> data.ImageData:
    """What is loaded with one note, which is also a warning."""
    with pytest.warns(UserWarning, match=message):
        found = data.load(root)
    assert len(found.notes) == 1
    return found


def refusal(root: Path) -> str:
    with pytest.raises(ValueError) as error:
        data.load(root)
    text = str(error.value)
    assert str(root) in text and "\n" not in text and " at 0x" not in text
    return text


# --- splits ---


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("train", "valid", "test"),
        ("train", "validation", "test"),
        ("train", "dev", "test"),
        ("Train", "Val", "Test"),
        ("TRAIN", "VALID", "TEST"),
        ("training", "validation", "testing"),
        ("Training", "Validation", "Testing"),
    ],
)
def test_splits_by_every_name(tmp_path, train, val, test):
    for part, count in ((train, 6), (val, 5), (test, 3)):
        pictures_of(tmp_path, f"{part}/cat", f"{part}/dog", count=count)
    assert counts(quietly(tmp_path)) == (("cat", "dog"), (12, 10, 6))


@pytest.mark.parametrize("twice", [("val", "valid"), ("Train", "train"), ("test", "testing"), ("dev", "Validation")])
def test_a_split_that_is_there_twice(tmp_path, twice):
    pictures_of(tmp_path, *(f"{part}/{name}" for part in {"train", "test", *twice} for name in ("cat", "dog")))
    text = refusal(tmp_path)
    assert all(f"{name}/" in text for name in twice) and "the same split twice; keep one" in text


@pytest.mark.parametrize("parts", [("train",), ("train", "val"), ("Test",), ("training", "valid"), ("val", "test")])
def test_splits_that_are_not_enough(tmp_path, parts):
    pictures_of(tmp_path, *(f"{part}/{name}" for part in parts for name in ("cat", "dog")))
    text = refusal(tmp_path)
    given = next((part for part in parts if part.startswith("train")), sorted(parts)[0])
    assert "only; ready-made splits need both train/ and test/" in text and f"as {tmp_path / given}, to have" in text
    assert counts(quietly(tmp_path / given)) == (("cat", "dog"), (4, 2, 2))  # the advice holds


@pytest.mark.parametrize("other", ["unlabeled", "extra/cat", "Holdout/x"])
def test_another_folder_beside_the_splits_is_named(tmp_path, other):
    pictures_of(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", other)
    name = other.split("/")[0]
    assert counts(noted(tmp_path, f"{name}/ of .* beside test/, train/: not used"))[1] == (6, 2, 8)


@pytest.mark.parametrize("other", ["val_set", "ValImages", "my-validation", "test2", "Training Data"])
def test_what_could_be_a_split_is_not_passed_over(tmp_path, other):
    pictures_of(tmp_path, *(f"{part}/{name}" for part in ("train", "test", other) for name in ("cat", "dog")))
    text = refusal(tmp_path)
    assert f"holds {other}/ beside test/, train/" in text and "maybe val/ (or training/" in text


@pytest.mark.parametrize("names", [("training_set", "test_set"), ("seg-train", "seg-test"), ("trainset", "ValData")])
def test_splits_by_other_names_are_not_taken_for_classes(tmp_path, names):
    pictures_of(tmp_path, *(f"{part}/{name}" for part in names for name in ("cat", "dog")))
    assert "look like splits; splits are called train/, test/ and maybe val/" in refusal(tmp_path)


def test_a_split_without_classes_beside_one_with(tmp_path):
    pictures_of(tmp_path, "train/cat", "train/dog", "test")
    assert f"{tmp_path / 'test'} holds images and no class folders" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["train", "test", "val", "Training", "dev", "steam train"])
def test_a_class_called_as_a_split(tmp_path, name):
    pictures_of(tmp_path, "bus", "car", name)
    assert counts(quietly(tmp_path))[0] == tuple(sorted(("bus", "car", name)))


def test_classes_called_as_the_splits_are_told_of(tmp_path):
    pictures_of(tmp_path, "train", "test", "bus")
    assert noted(tmp_path, "test/, train/ of .*taken for classes").class_names == ("bus", "test", "train")


@pytest.mark.parametrize("names", [("train", "test"), ("train", "valid", "test"), ("train",), ("Test",)])
@pytest.mark.parametrize("table", ["_classes.csv", "metadata.jsonl", "../annotations/train.json", "../readme.txt"])
def test_splits_of_images_alone_hold_no_classes(tmp_path, names, table):
    """As multi-label exports have them, with the labels in a table."""
    write(pictures_of(tmp_path, *names), *(f"{name}/{table}" for name in names), content=b"filename, cat, dog")
    text = refusal(tmp_path)
    assert "images and no class folders; a split holds a sub-folder of images per class" in text
    assert all(f"{name}/" in text for name in names)


@pytest.mark.parametrize("name", ["validate", "eval", "Validation", "evaluation"])
def test_other_names_of_the_validation_images(tmp_path, name):
    pictures_of(tmp_path, *(f"{part}/{label}" for part in ("train", name, "test") for label in ("cat", "dog")))
    assert counts(quietly(tmp_path))[1][1] > 0 and not data.load(tmp_path).notes


LEFT_BESIDE = [
    *("0.png:Zone.Identifier", "0.png\uf03aZone.Identifier", "0.png:Zone.Identifier:$DATA", "0.png@SynoEAStream"),
    *("a.png@SynoResource", "Picasa.ini", ".picasa.ini", "ehthumbs_vista.db", "Thumbs.db:encryptable", "0.AAE"),
    *("0.png:AFP_AfpInfo", "0.png:AFP_Resource", "0.png:com.dropbox.attrs", "0.xmp", "0.png.XMP", "0.png.pp3"),
]


@pytest.mark.parametrize("left", LEFT_BESIDE)
def test_what_programs_leave_beside_a_picture_is_passed_over(tmp_path, left):
    pictures_of(tmp_path, "cat", "dog")
    before = counts(quietly(tmp_path))
    (tmp_path / "cat" / left).write_text("[ZoneTransfer]")
    assert counts(quietly(tmp_path)) == before


def test_a_class_called_as_what_is_left_beside_a_picture(tmp_path):
    assert quietly(pictures_of(tmp_path, "adobe.xmp", "dog")).class_names == ("adobe.xmp", "dog")


STRANGE = ["e\x1b[2J", "e\nz", "e\u202ez", os.fsdecode(b"\xe9t\xe9")]
WRONG = {
    "the dataset is empty": lambda root, name: (root / name).mkdir() or root / name,
    "a split without classes": lambda root, name: (
        pictures_of(root / name, "train/cat", "test/cat", "val") and root / name
    ),
    "a class of test/ alone": lambda root, name: pictures_of(
        root, "train/cat", "train/dog", "test/cat", f"test/{name}"
    ),
    "classes deeper": lambda root, name: pictures_of(root, f"{name}/cat", f"{name}/dog"),
    "an empty class": lambda root, name: (root / name / "cat").mkdir(parents=True) or pictures_of(root / name, "dog"),
    "no picture": lambda root, name: write(pictures_of(root, "cat", "dog"), f"cat/{name}.png", content=b"x"),
    "no pictures": lambda root, name: write(root, f"cat/{name}.png", f"dog/{name}.png", content=b"x"),
    "train alone": lambda root, name: pictures_of(root, "train/cat", "train/dog", name),
    "like a split": lambda root, name: pictures_of(root, "train/cat", "test/cat", f"val_{name}/cat"),
    "splits in a class": lambda root, name: pictures_of(root / name, "cat/train", "cat/test"),
    "an archive": lambda root, name: write(root, f"{name}.zip", content=b"x") / f"{name}.zip",
    "no npz": lambda root, name: write(root, f"{name}.npz", content=b"x") / f"{name}.npz",
    "too many": lambda root, name: f"{pictures_of(root / name, 'cat', 'dog')}:99",
    "no count": lambda root, name: f"{write(root, f'{name}.npz', content=b'x') / name}.npz:x",
}


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("wrong", WRONG)
def test_no_error_shows_a_name_as_it_is(tmp_path, wrong, name):
    dataset = WRONG[wrong](tmp_path, name)
    with pytest.raises(ValueError) as error:
        data.load(dataset)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", STRANGE)
def test_no_note_and_no_bar_shows_a_name_as_it_is(tmp_path, name, monkeypatch):
    root = pictures_of(tmp_path / name, "train/cat", "train/dog", "test/cat", "test/dog", name, f"train/cat/{name}")
    write(root / "train", f"{name}.png")
    titles, bar = [], folders.tqdm
    monkeypatch.setattr(folders, "tqdm", lambda *args, desc, **given: titles.append(desc) or bar(*args, **given))
    with pytest.warns(UserWarning):
        notes = data.load(root).notes
    assert len(notes) == 3 and len(titles) == 1 and all(text.isprintable() for text in (*notes, *titles))


def test_a_listed_folder_is_called_as_it_is(tmp_path):
    """Not by its escape codes."""
    pictures_of(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog", "犬\u3000柴")
    (note,) = noted(tmp_path, "not used").notes
    assert note.startswith("犬\u3000柴/ of ")


def test_a_picture_whose_camera_notes_are_damaged_is_named(tmp_path):
    pictures_of(tmp_path, "cat", "dog")
    content = encoded(Image.new("RGB", (9, 9)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):  # what Pillow says, without a name
        Image.open(io.BytesIO(content)).getexif()
    write(tmp_path, *(f"cat/odd {i}.jpg" for i in range(7)), content=content)
    with pytest.warns(UserWarning) as said:
        data.load(tmp_path)
    (text,) = {str(warning.message) for warning in said}
    assert f"7 image(s) of {tmp_path} are odd, and used: cat/odd 0.jpg (Corrupt EXIF" in text
    assert text.endswith("and 2 more") and said[0].filename == __file__


def test_names_of_files_reach_no_terminal_as_they_are(tmp_path):
    pictures_of(tmp_path, "cat", "dog")
    shutil.copy(next((tmp_path / "cat").iterdir()), tmp_path / "evil\x1b[2J\u202e.png")
    (note,) = noted(tmp_path, "beside the class folders").notes
    assert "evil\N{REPLACEMENT CHARACTER}[2J" in note and note.isprintable()
    (tmp_path / "a\x1bb").symlink_to(tmp_path / "cat")
    assert refusal(tmp_path).isprintable()


def test_one_image_a_class_in_train(tmp_path):
    for part in ("train", "test"):
        pictures_of(tmp_path, f"{part}/cat", f"{part}/dog")
        for folder in (tmp_path / part).iterdir():
            for extra in sorted(folder.iterdir())[1:]:
                extra.unlink()
    text = refusal(tmp_path)
    assert "the only one is taken for validation: put 2 or more into train, or give val images too" in text


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_a_class_that_a_given_part_lacks(tmp_path, lacking):
    """Nothing is split here, so nothing is said of splitting."""
    images = np.zeros((6, 8, 8), np.uint8)
    labels = {part: np.arange(6) % (1 if part == lacking else 2) for part in ("train", "val", "test")}
    np.savez(
        tmp_path / "a.npz",
        **{f"{part}_images": images for part in labels},
        **{f"{part}_labels": given for part, given in labels.items()},
    )
    text = refusal(tmp_path / "a.npz")
    where = {"train": "training", "test": "test"}[lacking]
    assert f"no {where} image of class 'class 1'" in text
    assert f"add some to the {where} images, or leave the class out" in text


def test_grey_images_are_refused_before_their_colours_fill_the_memory(tmp_path, monkeypatch):
    """12 kB in grey are 36 kB in RGB."""
    labels = np.arange(6) % 2
    for name, shape in (("grey", (6, 32, 32)), ("rgb", (6, 32, 32, 3))):
        images = np.zeros(shape, np.uint8)
        np.savez(
            tmp_path / f"{name}.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels
        )
    monkeypatch.setattr(parts, "memory_limit", lambda: 30_000)
    with pytest.raises(ValueError, match="12 images of 32x32 pixels are too many: unpacked they take"):
        data.load(tmp_path / "grey.npz")
    monkeypatch.setattr(parts, "memory_limit", lambda: 40_000)
    assert len(quietly(tmp_path / "grey.npz").test) == len(quietly(tmp_path / "rgb.npz").test) == 6


def test_enlarging_is_refused_before_the_memory_is_full(tmp_path, monkeypatch):
    pictures_of(tmp_path, "cat", "dog")
    images = np.zeros((30, 8, 8), np.uint8)
    np.savez(
        tmp_path / "a.npz",
        train_images=images,
        train_labels=np.arange(30) % 2,
        test_images=images[:6],
        test_labels=np.arange(6) % 2,
    )
    monkeypatch.setattr(parts, "memory_limit", lambda: 10 * 2**20)
    with pytest.raises(ValueError, match=r"36 images of 1024x1024 pixels are too many: unpacked they take 108 MB"):
        data.load(tmp_path / "a.npz", image_size=1024)


def test_splits_within_the_classes(tmp_path):
    pictures_of(tmp_path, "cat/train", "cat/test", "dog/train", "dog/test")
    assert f"{tmp_path / 'cat'} is a class folder with splits in it" in refusal(tmp_path)


def test_a_val_split_without_images(tmp_path):
    pictures_of(tmp_path, "train/cat", "train/dog", "test/cat", "test/dog")
    (tmp_path / "val").mkdir()
    assert "val has no images" in refusal(tmp_path)


# --- what lies deeper ---


@pytest.mark.parametrize("inside", [(), ("train/", "test/")])
@pytest.mark.parametrize("wrapping", ["pets", "download/pets v1"])
def test_wrapping_folders(tmp_path, wrapping, inside):
    pictures_of(tmp_path / wrapping, *(f"{part}{name}" for part in inside or ("",) for name in ("cat", "dog")))
    write(tmp_path, "__MACOSX/pets/._x.png", ".DS_Store", "readme.txt", content=b"x")
    assert f"the classes seem to lie in {tmp_path / wrapping}: give that" in refusal(tmp_path)
    assert quietly(tmp_path / wrapping).class_names == ("cat", "dog")


def test_a_wrapped_split(tmp_path):
    pictures_of(tmp_path, *(f"{part}/{part}/{name}" for part in ("train", "test") for name in ("cat", "dog")))
    text = refusal(tmp_path / ".")
    assert f"seem to lie in {tmp_path / 'train/train'}: move them up into {tmp_path / 'train'}" in text


def test_folders_within_classes_are_read_as_torchvision_reads_them(tmp_path):
    pictures_of(tmp_path, "cat", "cat/more/yet more", "dog/a.jpg", "dog/b", count=3)
    found = noted(tmp_path, "2 class folder.* hold folders, as cat/ holds more/: all images below a class folder")
    theirs = torchvision.datasets.ImageFolder(tmp_path)
    assert found.class_names == tuple(theirs.classes)
    ours = [int(label) for split in (found.train, found.val, found.test) for label in split.labels]
    assert sorted(ours) == sorted(theirs.targets)


def test_an_empty_folder_within_a_class(tmp_path):
    pictures_of(tmp_path, "cat", "dog")
    (tmp_path / "dog" / "x.jpg").mkdir()
    assert counts(quietly(tmp_path))[1] == (4, 2, 2)


def test_images_beside_the_class_folders_are_told_of(tmp_path):
    write(pictures_of(tmp_path, "cat", "dog"), "preview.JPG", "labels.csv", "README.md", content=b"x")
    assert counts(noted(tmp_path, "1 image.* beside the class folders, as preview.JPG: not used"))[1] == (4, 2, 2)


# --- leftovers ---

LEFTOVERS = [
    *("__MACOSX/cat/._0.png", "cat/__MACOSX/._0.png", "cat/._0.png", "cat/.DS_Store", "cat/Icon\r"),
    *("Thumbs.db", "cat/Thumbs.db", "cat/thumbs.DB", "dog/desktop.ini", "dog/Desktop.ini", "cat/ehthumbs.db"),
    *("@eaDir/x", "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/cat/old.png", "$RECYCLE.BIN/S-1/x.png"),
    *(".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "lost+found/x"),
    *("System Volume Information/x", "cat/.git/objects/0.png"),
]


def test_leftovers_of_systems_and_programs_are_passed_over_everywhere(tmp_path):
    clean = quietly(pictures_of(tmp_path / "clean" / "pets", "cat", "dog"))
    full = pictures_of(tmp_path / "full" / "pets", "cat", "dog")
    found = quietly(write(full, *LEFTOVERS, content=shade(255)))
    assert (found.slug, found.fingerprint) == (clean.slug, clean.fingerprint)
    splits = pictures_of(tmp_path / "splits", "train/cat", "train/dog", "test/cat", "test/dog")
    write(splits, *(f"{part}/{name}" for part in ("train", "test") for name in LEFTOVERS), content=b"")
    assert counts(quietly(splits))[1] == (6, 2, 8)


def test_a_class_of_leftovers_alone_is_empty(tmp_path):
    write(pictures_of(tmp_path, "cat", "dog"), "zebra/Thumbs.db", content=b"x")
    assert "zebra is an empty class folder" in refusal(tmp_path)


# --- bad files ---


def test_all_bad_files_are_named_at_once(tmp_path):
    pictures_of(tmp_path, "cat", "dog")
    bad = [f"cat/{i}.txt" for i in range(4)] + ["dog/5.heic", "dog/6.jpg", "dog/7.JPG.txt"]
    write(tmp_path, *bad, content=b"a cat on a mat")
    write(tmp_path, "dog/6.jpg", content=b"")
    text = refusal(tmp_path)
    assert "holds 7 files" in text and "and 2 more" in text and "Allowed are PNG, JPEG" in text
    assert all(name in text for name in bad[:5]) and not any(name in text for name in bad[5:])


def test_a_file_is_what_its_content_says(tmp_path):
    write(pictures_of(tmp_path, "cat", "dog"), "dog/8.JPG.txt", "dog/9", content=shade(3))
    assert sum(counts(quietly(tmp_path))[1]) == 10


def test_the_memory_is_looked_at_before_anything_is_read(tmp_path, monkeypatch):
    pictures_of(tmp_path, "cat", "dog")
    monkeypatch.setattr(parts, "memory_limit", lambda: 2**20)
    quietly(tmp_path)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match="8 images of 512x512 pixels are too many.*6 MB, and at most 1 MB"):
        data.load(tmp_path, image_size=512)


# --- links ---


def test_links_do_not_lead_out(tmp_path):
    secret = write(tmp_path / "private", "me.png") / "me.png"
    root = pictures_of(tmp_path / "pets", "cat", "dog")
    (root / "cat" / "link.png").symlink_to(secret)
    assert "link.png is not an image that can be read (it is a link that leads out of the dataset" in refusal(root)
    (root / "cat" / "link.png").unlink()
    (root / "cat" / "link.png").symlink_to(os.path.relpath(root / "dog/0.png", root / "cat"))  # within is fine
    assert sum(counts(quietly(root))[1]) == 9


@pytest.mark.parametrize("place", ["zebra", "cat/more", "test"])
def test_links_to_folders(tmp_path, place):
    pictures_of(tmp_path / "private", "me")
    root = pictures_of(tmp_path / "pets", "cat", "dog")
    (root / place).symlink_to(tmp_path / "private" / "me")
    text = refusal(root)
    assert place in text and "link" in text
    (root / place).unlink()
    (root / place).symlink_to(root)  # round in a circle
    assert "link" in refusal(root) or "no file" in refusal(root)


def test_the_dataset_itself_may_be_a_link(tmp_path):
    root = pictures_of(tmp_path / "pets", "cat", "dog")
    (tmp_path / "link").symlink_to(root)
    assert data.load(tmp_path / "link").fingerprint == quietly(root).fingerprint


# --- composed and decomposed names ---


def test_a_class_name_is_one_however_it_is_composed(tmp_path):
    one, two = (unicodedata.normalize(form, "Übung") for form in ("NFC", "NFD"))
    assert one != two
    root = pictures_of(tmp_path / "a" / two, f"train/{one}", "train/dog", f"test/{two}", "test/dog")
    found = quietly(root)
    assert counts(found) == (("dog", one), (6, 2, 8))
    same = pictures_of(tmp_path / "b" / one, f"train/{two}", "train/dog", f"test/{one}", "test/dog")
    assert (quietly(same).slug, quietly(same).fingerprint) == (found.slug, found.fingerprint)
    both = quietly(pictures_of(tmp_path / "both", one, two, "dog"))
    assert both.class_names == ("dog", one) and sum(counts(both)[1]) == 12


# --- few ---


@pytest.mark.parametrize("count", [3, 4])
def test_few_images(tmp_path, count):
    found = quietly(pictures_of(tmp_path, "cat", "dog", count=count))
    assert sum(counts(found)[1]) == 2 * count and found.class_counts.min() >= 1
