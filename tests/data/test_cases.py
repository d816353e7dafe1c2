"""Inputs that people really have, made after public bug reports: what is loaded of each, or what its error says."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from sdgen_lib import data

CASES = Path(__file__).parents[3] / "shared/cases"
PETS, THREE = ("cat", "dog"), ("class 0", "class 1", "class 2")
NEEDS = "must hold train_images, train_labels, test_images and test_labels"

# name: (class names, numbers of training, validation and test images) or words of the error
FOUND = {
    "2024": (PETS, (4, 2, 2)),
    "F01_roboflow_valid": (PETS, (12, 10, 6)),
    "F02_training_testing": (PETS, (10, 2, 10)),
    "F02_validation": (PETS, (12, 10, 6)),
    "F03_macosx_beside": (PETS, (4, 2, 2)),
    "F05_csv_beside": (PETS, (4, 2, 2)),
    "F05_desktop_ini": (PETS, (4, 2, 2)),
    "F05_thumbs": (PETS, (4, 2, 2)),
    "F06_mpo": (PETS, (6, 2, 2)),
    "F08_2024-05-01_12:30": (PETS, (4, 2, 2)),
    "F08_2024-05-01_12:30:2": (PETS, (2, 2, 2)),
    "F08_case": (("CAT", "Cat", "cat"), (6, 3, 3)),
    "F08_colon:2024": (PETS, (4, 2, 2)),
    "F08_colon:2024:3": (PETS, (3, 2, 2)),
    "F08_emoji_newline": (PETS, (4, 2, 2)),
    "F08_mit Leerzeichen und ünïcode": (("hässlich", "schön"), (4, 2, 2)),
    "F09_four_images": (PETS, (4, 2, 2)),
    "F09_imbalanced": (("common", "rare"), (78, 14, 31)),
    "F09_three_images": (PETS, (2, 2, 2)),
    "F10_npz/UPPER.NPZ": (THREE, (24, 6, 9)),
    "F10_npz/bigendian_labels.npz": (THREE, (24, 6, 9)),
    "F10_npz/compressed.npz": (THREE, (24, 6, 9)),
    "F10_npz/fortran.npz": (THREE, (24, 6, 9)),
    "F10_npz/standard.npz": (THREE, (24, 6, 9)),
    "F10_npz/val_lacks_class.npz": (THREE, (24, 6, 9)),
    "F10_npz/val_one_image.npz": (THREE, (24, 1, 9)),
    "F12_class_train": (("bus", "car", "train"), (6, 3, 3)),
    "F12_class_train_test": (("bus", "car"), (6, 2, 8)),
    "F16_cjk": (("犬", "猫"), (15, 3, 6)),
    "F16_symbols": (("$x^$", "alpha"), (15, 3, 6)),
    "Ω Fotos (Kopie) & 'x'": (("hässlich", "schön"), (4, 2, 2)),
}
REFUSED = {
    "F02_train_only": ["holds train/ only", "F02_train_only/train, to have the splits made"],
    "F02_train_val_only": ["holds train/, val/ only", "need both train/ and test/"],
    "F03_wrapped": ["holds one folder, pets/", "seem to lie in", "F03_wrapped/pets: give that"],
    "F05_broken": ["cat/0.png is not an image that can be read", "truncated", "mend or remove it"],
    "F05_captions": ["holds 8 files", "cat/0.txt (of no allowed format", "and 3 more", "Allowed are PNG, JPEG"],
    "F05_petimages": ["holds 2 files", "Cat/66.jpg (it is empty)", "Dog/77.jpg (it is empty)"],
    "F09_flat": ["has no sub-folders; it must hold one sub-folder of images per class"],
    "F09_one_image": ["no training image of class 'zebra'", "3 images or more"],
    "F09_single_class": ["one class, 'cat'; at least 2"],
    "F09_two_images": ["no training image of class 'cat', 'dog'"],
    "F10_npz/X_y.npz": ["it has X, y", NEEDS],
    "F10_npz/bool_labels.npz": ["train_labels is bool; it must hold whole numbers"],
    "F10_npz/chest_like.npz": ["train_labels has shape (24, 3)"],
    "F10_npz/class_names_bytes.npz": ["C different strings", "class_names.astype(str)"],
    "F10_npz/class_names_object.npz": ["Python objects", "as text: class_names.astype(str)"],
    "F10_npz/float01.npz": ["train_images is float32; it must be uint8, values 0 to 255"],
    "F10_npz/float_labels.npz": ["train_labels is float32; it must hold whole numbers"],
    "F10_npz/gaps.npz": ["are 0, 2, 4; 3 classes must be numbered 0 to 2"],
    "F10_npz/just.npy": ["neither a folder nor a .npz file"],
    "F10_npz/keras_keys.npz": ["it has x_train, y_train, x_test, y_test", NEEDS],
    "F10_npz/nchw.npz": ["shape (24, 3, 16, 16); it must be (N, H, H) or (N, H, H, 3)"],
    "F10_npz/nhw1.npz": ["shape (24, 16, 16, 1); it must be"],
    "F10_npz/nonsquare.npz": ["shape (24, 16, 12, 3); it must be"],
    "F10_npz/one_based.npz": ["are 1, 2, 3; 3 classes must be numbered 0 to 2"],
    "F10_npz/onehot.npz": ["train_labels has shape (24, 3); its 24 images need (24,)"],
    "F10_npz/positional.npz": ["it has arr_0, arr_1, arr_2, arr_3", NEEDS],
    "F10_npz/rgba.npz": ["shape (24, 16, 16, 4); it must be"],
    "F10_npz/string_labels.npz": ["train_labels is <U3; it must hold whole numbers"],
    "F10_npz/uint16.npz": ["train_images is uint16; it must be uint8"],
    "F10_npz/val_empty.npz": ["val_images has shape (0, 16, 16, 3)", "N of 1 or more"],
    "F10_npz/volumes.npz": ["shape (24, 16, 16, 16); it must be"],
    "F11_csv": ["has no sub-folders"],
    "F11_hf_disk": ["train has no sub-folders"],
    "F11_images_folder_csv": ["one class, 'images'"],
    "F11_labels.csv": ["neither a folder nor a .npz file"],
    "F11_pets.zip": ["neither a folder nor a .npz file", "unpack an archive first"],
}


def case(name: str) -> Path:
    if not CASES.is_dir():
        pytest.skip(f"{CASES} is not there")
    return CASES / name


@pytest.mark.parametrize("name", FOUND)
def test_what_is_loaded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = data.load(case(name))
    assert (found.class_names, (len(found.train), len(found.val), len(found.test))) == FOUND[name]
    assert found.class_counts.min() >= 1 and found.notes == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    with pytest.raises(ValueError) as error:
        data.load(case(name))
    text = str(error.value)
    assert str(CASES / name) in text and "\n" not in text and " at 0x" not in text
    assert [words for words in REFUSED[name] if words not in text] == []


def test_many_classes():
    found = data.load(case("F13_100_classes.npz"))
    assert found.num_classes == 100 and found.class_counts.min() >= 1


def test_markup_in_a_class_name_is_a_name():
    assert any("<img" in name for name in data.load(case("X1_html.npz")).class_names)


def test_of_the_phones_photographs_the_first_pictures_are_taken():
    root = case("F06_mpo")
    found = data.load(root)
    ours = torch.cat([split.images for split in (found.train, found.val, found.test)]).permute(0, 2, 3, 1).int().numpy()
    photographs = sorted(root.glob("cat/phone*"))
    assert photographs
    for file in photographs:
        with Image.open(file) as image:
            assert image.n_frames > 1
            small = ImageOps.fit(image.convert("RGB"), (32, 32), Image.Resampling.BILINEAR)
        assert np.abs(ours - np.asarray(small, int)).max((1, 2, 3)).min() <= 3


@pytest.mark.parametrize("name", ["F08_2024-05-01_12:30", "F08_colon:2024", "2024"])
def test_relative_paths(name, monkeypatch):
    monkeypatch.chdir(case(""))
    for path in (name, f"./{name}", f"./{name}:3"):
        assert len(data.load(path).train) == (3 if path.endswith(":3") else 4)
