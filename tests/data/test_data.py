"""`sdgen_lib.data` against scikit-learn, medmnist, torchvision, PIL and hand-made files."""

import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
import urllib.error
import zipfile
from pathlib import Path

import medmnist
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from sdgen_lib import data
from sdgen_lib.data import images as images_module
from sdgen_lib.data import named, sources
from sdgen_lib.data.parts import check_class_names

CIFAR_SUBSET = Path(__file__).parents[3] / "shared/data/cifar10-subset.npz"


def digests(*splits):
    return sorted(hashlib.md5(image.numpy().tobytes()).hexdigest() for s in splits for image in s.images)


def check_layout(found, size):
    """What every source must give."""
    for split in (found.train, found.val, found.test):
        assert split.images.dtype == torch.uint8 and split.images.shape == (len(split), 3, size, size)
        assert split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert 0 <= split.labels.min() and split.labels.max() < found.num_classes
    assert found.image_size == size
    assert re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", found.slug)
    assert found.class_counts.tolist() == [int((found.train.labels == c).sum()) for c in range(found.num_classes)]
    assert found.class_counts.dtype == torch.int64


def arrays(count=12, classes=3, side=8, rgb=True, parts=("train", "val", "test")):
    """MedMNIST's layout, random pixels, every class in every split."""
    random, found = np.random.default_rng(0), {}
    for part in parts:
        shape = (count, side, side, 3) if rgb else (count, side, side)
        found[f"{part}_images"] = random.integers(0, 256, shape, dtype=np.uint8)
        found[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
    return found


def write_npz(path, **changes):
    found = {**arrays(), **changes}
    np.savez(path, **{key: array for key, array in found.items() if array is not None})
    return path


def write_images(folder, count, side=(10, 8), shade=0):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", side, (shade, i, 0)).save(folder / f"{i}.png")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SDGEN_DATA", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


# --- digits ---


def test_digits_are_scikit_learns():
    found, scans = data.load("digits", image_size=8), load_digits()
    check_layout(found, 8)
    assert found.class_names == tuple("0123456789") and found.slug == "digits-8px"
    ours = torch.cat([s.images for s in (found.train, found.val, found.test)])
    assert torch.equal(ours[:, 0], ours[:, 1]) and torch.equal(ours[:, 0], ours[:, 2])
    expected = sorted(np.rint(scan / 16 * 255).astype(np.uint8).tobytes() for scan in scans.images)
    assert sorted(image[0].numpy().tobytes() for image in ours) == expected
    labels = torch.cat([s.labels for s in (found.train, found.val, found.test)])
    assert torch.bincount(labels).tolist() == np.bincount(scans.target).tolist()
    label_of = {
        np.rint(scan / 16 * 255).astype(np.uint8).tobytes(): label
        for scan, label in zip(scans.images, scans.target, strict=True)
    }
    assert labels.tolist() == [label_of[image[0].numpy().tobytes()] for image in ours]


def test_digits_default_size_and_slug():
    found = data.load("digits")
    check_layout(found, 16)
    assert (found.name, found.slug) == ("digits", "digits")
    assert data.load("digits", image_size=16).slug == "digits"
    assert data.load("Digits:50", image_size=32).slug == "digits-50-32px"


def test_digits_test_split_is_fixed_and_val_split_seeded():
    one, same, other = data.load("digits"), data.load("digits"), data.load("digits", seed=1)
    assert torch.equal(one.train.images, same.train.images) and torch.equal(one.val.labels, same.val.labels)
    assert torch.equal(one.test.images, other.test.images) and torch.equal(one.test.labels, other.test.labels)
    assert digests(one.val) != digests(other.val)
    assert digests(one.train, one.val) == digests(other.train, other.val)


def test_splits_are_disjoint_and_stratified():
    found, total = data.load("digits"), len(load_digits().target)
    assert len(found.test) == pytest.approx(0.25 * total, abs=1)
    assert len(found.val) == pytest.approx(0.15 * 0.75 * total, abs=1)
    assert len(found.train) + len(found.val) + len(found.test) == total
    expected = np.bincount(load_digits().target)
    for split in (found.train, found.val, found.test):
        share = len(split) / total
        assert np.abs(torch.bincount(split.labels).numpy() - share * expected).max() < 2


# --- :N ---


def test_count_keeps_a_stratified_seeded_part():
    whole, part = data.load("digits"), data.load("digits:200")
    check_layout(part, 16)
    assert part.name == "digits:200" and part.slug == "digits-200" and len(part.train) == 200
    assert set(digests(part.train)) <= set(digests(whole.train))
    assert part.class_counts.min() >= 18 and part.class_counts.max() <= 22
    assert torch.equal(part.val.images, whole.val.images) and torch.equal(part.test.images, whole.test.images)
    assert digests(part.train) == digests(data.load("digits:200").train)
    assert set(digests(part.train)) <= set(digests(data.load("digits:400").train))


def test_count_keeps_every_class_however_rare(tmp_path):
    labels = np.zeros(300, dtype=np.int64)
    labels[[7, 250]] = 1, 2
    images = np.zeros((300, 8, 8), dtype=np.uint8)
    path = write_npz(tmp_path / "rare.npz", train_images=np.stack([images] * 3, -1), train_labels=labels)
    assert data.load(f"{path}:3").class_counts.tolist() == [1, 1, 1]
    assert data.load(f"{path}:100").class_counts.tolist() == [98, 1, 1]
    assert data.load(f"{path}:300").class_counts.tolist() == [298, 1, 1]
    assert data.load(f"{path}:100").slug == data.load(path).slug + "-100"


@pytest.mark.parametrize("count", ["0", "9", "1147", "99999999999"])
def test_count_out_of_range(count):
    with pytest.raises(ValueError, match=rf"{count} training images.*from 10 .* to 1146"):
        data.load(f"digits:{count}")


@pytest.mark.parametrize("count", ["20o", "", "-5", "2.5", "٣"])
def test_count_not_a_number(count, tmp_path):
    with pytest.raises(ValueError, match="whole number after the colon, as in 'digits:200'"):
        data.load(f"digits:{count}")
    path = write_npz(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="whole number after the colon"):
        data.load(f"{path}:{count}")


# --- names ---


def test_names():
    found = named.names()
    assert {"digits", "cifar10", "cifar100", "pathmnist", "pathmnist_64", "organsmnist_224"} <= set(found)
    assert not [name for name in found if "chest" in name or "3d" in name]
    usable = [i for i in medmnist.INFO.values() if "3D" not in i["python_class"] and "multi-label" not in i["task"]]
    assert len(found) == len(set(found)) == 3 + 4 * len(usable)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "Did you mean 'digits'"),
        ("digts:200", "Unknown dataset 'digts'.*Did you mean 'digits'"),
        ("pathmnist_32", "Did you mean 'pathmnist"),
        ("", "Unknown dataset ''"),
        ("chestmnist", "multi-label"),
        ("ChestMNIST_64", "multi-label"),
        ("organmnist3d", "3-D volumes"),
        ("nodulemnist3d_64", "3-D volumes"),
    ],
)
def test_names_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.load(name)


def test_an_unknown_name_may_have_been_a_path(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    with pytest.raises(ValueError, match="Unknown dataset 'pets'.*Or the path of a folder or of a .npz") as error:
        data.load("pets:20", base_dir=tmp_path)
    assert f"there is none at {tmp_path / 'notebooks/pets'} or {tmp_path / 'pets'}." in str(error.value)


@pytest.mark.parametrize("name", ["pathmnist_28", "PathMNIST_28", "pathmnist"])
def test_28_pixels_are_medmnists_own_size(name, cache, monkeypatch):
    place_medmnist(cache, monkeypatch, "pathmnist", side=28)
    assert data.load(name).slug == "pathmnist" and data.load(f"{name}:20").slug == "pathmnist-20"


@pytest.mark.parametrize("number", [2024, 1.5])
def test_a_number_is_no_dataset_and_may_have_been_a_folder(number):
    with pytest.raises(TypeError, match=rf"'./{number}', or papermill's -r dataset {number}"):
        data.load(number)


@pytest.mark.parametrize("name", ["2024-05-01 12:30", "digits:200x", "a:b:7", "C:20"])
def test_a_path_with_a_colon_is_that_path(name, tmp_path, monkeypatch):
    write_images(tmp_path / name / "cat", 8)
    write_images(tmp_path / name / "dog", 8)
    monkeypatch.chdir(tmp_path)
    dataset = f"./{name}"
    for place in (dataset, tmp_path / name, str(tmp_path / name)):
        assert len(data.load(place).train) == 10 and len(data.load(f"{place}:4").train) == 4
    assert len(data.load(dataset[2:] if "digits" not in name else dataset, base_dir=tmp_path).train) == 10
    monkeypatch.chdir(tmp_path / name)
    assert len(data.load(dataset, base_dir=tmp_path).train) == 10


def test_a_path_wins_over_a_shorter_path_and_a_number_and_a_name_over_both(tmp_path, monkeypatch):
    for name, count in (("pets", 20), ("pets:6", 8), ("digits:50", 8)):
        write_images(tmp_path / name / "cat", count)
        write_images(tmp_path / name / "dog", count)
    monkeypatch.chdir(tmp_path)
    assert len(data.load("pets:6").train) == 10 and len(data.load("pets:5").train) == 5
    assert data.load("digits:50").slug == "digits-50" and len(data.load("./digits:50").train) == 10


def test_npz_in_capitals(tmp_path):
    path = write_npz(tmp_path / "mine.npz").rename(tmp_path / "MINE.NPZ")
    assert data.load(path).slug.startswith("MINE-")
    with pytest.raises(FileNotFoundError, match="No file or folder at"):
        data.load("missing.NPZ")


@pytest.mark.parametrize("names", [np.array(["a", "b", "c"], object), np.array([b"a", b"b", b"c"])])
def test_class_names_that_are_no_text_arrays(tmp_path, names):
    with pytest.raises(ValueError, match=r"class_names.astype\(str\)"):
        data.load(write_npz(tmp_path / "mine.npz", class_names=names))


def test_class_names_of_an_npz_are_composed(tmp_path):
    decomposed = unicodedata.normalize("NFD", "Übung")
    path = write_npz(tmp_path / "mine.npz", class_names=np.array([decomposed, "b", "c"]))
    assert data.load(path).class_names[0] == unicodedata.normalize("NFC", "Übung")
    both = np.array([decomposed, unicodedata.normalize("NFC", "Übung"), "c"])
    with pytest.raises(ValueError, match="C different strings"):
        data.load(write_npz(tmp_path / "both.npz", class_names=both))


@pytest.mark.parametrize("dataset", [5, None, b"digits", ["digits"]])
def test_dataset_of_another_type_is_refused(dataset):
    with pytest.raises(TypeError, match="must be text: a name .*digits, cifar10, .*or the path of a .npz file"):
        data.load(dataset)


def test_every_medmnist_set_is_known_or_refused():
    for flag in medmnist.INFO:
        if flag not in named.names():
            with pytest.raises(ValueError, match="cannot be used, because"):
                data.load(flag)


def test_medmnist_is_not_imported_needlessly(tmp_path):
    """Importing it makes a folder in the home folder."""
    code = (
        "import sys; from sdgen_lib import data; from sdgen_lib.data import named; named.names()\n"
        "for name in ('medmnist', 'sklearn', 'torchvision'): assert name not in sys.modules, name\n"
        f"data.load({str(write_npz(tmp_path / 'mine.npz'))!r}); assert 'medmnist' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("size", [0, 7, 1025, "32", 32.0, True])
def test_image_size_refused(size):
    with pytest.raises(ValueError, match="whole number from 8 to 1024"):
        data.load("digits", image_size=size)


@pytest.mark.parametrize("name", ["missing.npz", "./missing", "../missing", "some/folder", "missing.npz:20"])
def test_missing_path_says_where_it_was_sought(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        data.load(name, base_dir=tmp_path / "base")
    assert str(tmp_path / name.split(":")[0]) in str(error.value)
    assert str(tmp_path / "base" / name.split(":")[0]) in str(error.value)


def test_base_dir_is_tried_second(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    write_npz(tmp_path / "mine.npz")
    assert data.load("mine.npz", base_dir=tmp_path).slug.startswith("mine-")
    write_npz(tmp_path / "notebooks/mine.npz", class_names=np.array(["x", "y", "z"]))
    assert data.load("mine.npz", base_dir=tmp_path).class_names == ("x", "y", "z")


def test_a_checkout_is_known_by_its_notebooks(tmp_path, monkeypatch):
    assert sources.checkout() == Path(__file__).parents[2]
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sdgen_lib" / "data" / "sources.py"))
    assert sources.checkout() is None
    (tmp_path / "notebooks").mkdir()
    assert sources.checkout() == tmp_path


def test_an_installed_package_does_not_take_its_neighbours_for_datasets(tmp_path):
    """site-packages holds folders, and some of them have sub-folders: none is a dataset."""
    site_packages = tmp_path / "site-packages"
    shutil.copytree(
        Path(sources.__file__).parents[1], site_packages / "sdgen_lib", ignore=shutil.ignore_patterns("tiny")
    )
    write_images(site_packages / "pets/cat", 4)
    write_images(site_packages / "pets/dog", 4)
    code = (
        "from sdgen_lib import data; from sdgen_lib.data import sources\n"
        "try: data.load('pets', base_dir=sources.checkout())\n"
        "except ValueError as error: print(sources.__file__, error)"
    )
    command = [sys.executable, "-c", code]
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site_packages)}
    done = subprocess.run(
        command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(site_packages)) and "Unknown dataset 'pets'" in done.stdout


def test_other_file_types_are_refused(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a folder nor a .npz"):
        data.load(tmp_path / "images.zip")


# --- downloads ---


def place_medmnist(cache, monkeypatch, name, suffix="", **kind):
    """A small file where medmnist keeps its own, and its MD5 in medmnist's table."""
    path, info = cache / f"{name}{suffix}.npz", medmnist.INFO[name]
    np.savez(path, **arrays(count=24, classes=len(info["label"]), rgb=info["n_channels"] == 3, **kind))
    monkeypatch.setitem(info, f"MD5{suffix}", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.mark.parametrize(
    ("name", "suffix", "side"),
    [("retinamnist", "", 28), ("breastmnist", "", 28), ("pathmnist", "_64", 64), ("organamnist", "", 28)],
)
def test_medmnist_as_medmnist_reads_it(name, suffix, side, cache, monkeypatch):
    place_medmnist(cache, monkeypatch, name, suffix, side=side)
    found = data.load(name + suffix)
    check_layout(found, side)
    cls = getattr(medmnist, medmnist.INFO[name]["python_class"])
    for part in ("train", "val", "test"):
        theirs, ours = cls(part, root=cache, size=side, as_rgb=True), getattr(found, part)
        assert len(ours) == len(theirs.imgs)
        for i in (0, 5, 23):
            image, label = theirs[i]
            assert np.array_equal(ours.images[i].numpy().transpose(1, 2, 0), np.asarray(image))
            assert [ours.labels[i].item()] == label.tolist()
    assert (found.slug, found.name) == (name + suffix,) * 2
    assert found.class_names == tuple(medmnist.INFO[name]["label"][str(i)] for i in range(found.num_classes))


def test_organ_class_names_are_in_numeric_order(cache, monkeypatch):
    place_medmnist(cache, monkeypatch, "organamnist", side=28)
    assert data.load("organamnist").class_names[10] == medmnist.INFO["organamnist"]["label"]["10"]


def test_a_damaged_medmnist_file_is_moved_aside_and_fetched_again(cache, monkeypatch):
    path = place_medmnist(cache, monkeypatch, "pathmnist", side=28)
    whole, fetched = path.read_bytes(), []
    path.write_bytes(whole[:-100])  # as a killed download leaves it

    def download(url, root, filename, md5):
        fetched.append(url)
        (Path(root) / filename).write_bytes(whole)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    check_layout(data.load("pathmnist"), 28)
    assert path.with_name("pathmnist.npz.damaged").read_bytes() == whole[:-100] and path.read_bytes() == whole
    assert len(fetched) == 1 and fetched[0].startswith("https://")


def test_what_medmnist_does_not_publish_is_refused(cache, monkeypatch):
    def download(url, root, filename, md5):
        np.savez(Path(root) / filename, **arrays())

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    message = r"pathmnist.npz is not what MedMNIST publishes: its MD5 is not \w+; delete it"
    with pytest.raises(ValueError, match=message):
        data.load("pathmnist")


def no_network(url, *args, **kwargs):
    raise urllib.error.URLError("no route")


@pytest.mark.parametrize("name", ["pathmnist", "bloodmnist_64", "cifar10", "cifar100"])
def test_no_network(name, cache, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(ConnectionError) as error:
        data.load(name)
    for part in ("https://", "no route", str(cache), "by hand", "'digits'", f"{name!r}"):
        assert part in str(error.value)


def test_no_text_shows_the_folder_of_downloads_as_it_is(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "a\x1b[2J\u202e"
    folder.mkdir()
    monkeypatch.setenv("SDGEN_DATA", str(folder))
    (folder / "pathmnist.npz").write_bytes(b"damaged")
    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    with pytest.raises(ConnectionError) as error:
        data.load("pathmnist")
    printed = capsys.readouterr().out.splitlines()
    assert "moved aside to" in printed[0] and all(text.isprintable() for text in (str(error.value), printed[0]))


def test_a_broken_download_leaves_nothing_behind(cache, monkeypatch):
    def breaks_off(url, root, filename, md5):
        (Path(root) / filename).write_bytes(b"PK half")
        no_network(url)

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", breaks_off)
    with pytest.raises(ConnectionError):
        data.load("pathmnist")
    assert list(cache.iterdir()) == []


def test_cifar10_through_torchvision(cache, monkeypatch):
    folder, random, cls = (cache / "cifar-10-batches-py", np.random.default_rng(0), torchvision.datasets.CIFAR10)
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        pixels = random.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": [i % 10 for i in range(20)]})]

    class_names = ["airplane"] + [f"c{i}" for i in range(1, 10)]
    monkeypatch.setattr(cls, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(cls, "test_list", [batch("test_batch")])
    meta = {**cls.meta, "md5": write("batches.meta", {"label_names": class_names})}
    monkeypatch.setattr(cls, "meta", meta)

    found = data.load("cifar10")
    check_layout(found, 32)
    assert (len(found.train), len(found.val), len(found.test)) == (80, 20, 20)
    assert found.class_counts.tolist() == [8] * 10 and torch.bincount(found.val.labels).tolist() == [2] * 10
    assert found.class_names == tuple(class_names)
    theirs = cls(cache, train=True)
    pixels = {
        image.transpose(2, 0, 1).tobytes(): label for image, label in zip(theirs.data, theirs.targets, strict=True)
    }
    for split in (found.train, found.val):
        for image, label in zip(split.images, split.labels, strict=True):
            assert pixels.pop(image.numpy().tobytes()) == label
    assert not pixels
    test_image, test_label = cls(cache, train=False)[3]
    assert np.array_equal(found.test.images[3].numpy().transpose(1, 2, 0), np.asarray(test_image))
    assert found.test.labels[3] == test_label


# --- .npz ---


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_npz_pixels_and_labels(rgb, flat, tmp_path):
    written = arrays(rgb=rgb)
    if flat:
        written = {key: a[:, 0] if "labels" in key else a for key, a in written.items()}
    np.savez(tmp_path / "mine.npz", **written)
    found = data.load(tmp_path / "mine.npz")
    check_layout(found, 8)
    assert found.class_names == ("class 0", "class 1", "class 2")
    assert found.slug == "mine-" + hashlib.sha256((tmp_path / "mine.npz").read_bytes()).hexdigest()[:8]
    for part in ("train", "val", "test"):
        for channel in range(3):
            expected = written[f"{part}_images"][..., channel] if rgb else written[f"{part}_images"]
            assert np.array_equal(getattr(found, part).images[:, channel].numpy(), expected)
        assert getattr(found, part).labels.tolist() == written[f"{part}_labels"].ravel().tolist()


def test_npz_slug_follows_the_content_not_the_place(tmp_path):
    path = write_npz(tmp_path / "mine.npz")
    (tmp_path / "b").mkdir()
    copy = shutil.copy(path, tmp_path / "b/mine.npz")
    assert data.load(path).slug == data.load(copy).slug
    other = write_npz(tmp_path / "b/mine.npz", class_names=np.array(["a", "b", "c"]))
    assert data.load(path).slug != data.load(other).slug
    assert data.load(path, image_size=16).slug == data.load(path).slug + "-16px"
    odd = shutil.copy(path, tmp_path / ".my data (é).npz")
    assert re.fullmatch(r"my-data-[0-9a-f]{8}", data.load(odd).slug)


def test_npz_without_val_gets_one_from_train(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays(count=60, parts=("train", "test")))
    found, other = data.load(path), data.load(path, seed=1)
    assert (len(found.train), len(found.val), len(found.test)) == (51, 9, 60)
    assert torch.bincount(found.val.labels).tolist() == [3, 3, 3]
    assert not set(digests(found.train)) & set(digests(found.val))
    assert digests(found.val) != digests(other.val) and digests(found.test) == digests(other.test)


def as_float(key):
    return {key: arrays()[key] / 255}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_images": None}, "no array test_images"),
        ({"train_labels": None, "test_labels": None}, "no array train_labels, test_labels .*test_images"),
        ({"val_labels": None}, "no array val_labels"),
        (as_float("train_images"), "train_images is float64; it must be uint8"),
        (as_float("val_labels"), "val_labels is float64; it must hold whole numbers"),
        ({"train_images": np.zeros((12, 8, 8, 4), np.uint8)}, r"train_images has shape \(12, 8, 8, 4\)"),
        ({"train_images": np.zeros((12, 3, 8, 8), np.uint8)}, r"shape \(12, 3, 8, 8\); it must be \(N, H, H\)"),
        ({"train_images": np.zeros((12, 8, 9), np.uint8)}, r"train_images has shape \(12, 8, 9\)"),
        ({"train_images": np.uint8(3)}, r"train_images has shape \(\)"),
        ({"test_images": np.zeros((12, 9, 9), np.uint8)}, r"test_images has shape \(12, 9, 9\).* one H for all"),
        ({"val_images": np.zeros((0, 8, 8), np.uint8)}, r"val_images has shape \(0, 8, 8\)"),
        ({"train_labels": np.zeros(11, int)}, r"train_labels has shape \(11,\); its 12 images need"),
        ({"test_labels": np.zeros((12, 3), int)}, r"test_labels has shape \(12, 3\)"),
        ({"train_labels": np.arange(12) % 3 + 1}, "no training image of class 'class 0'"),
        (
            {f"{part}_labels": np.arange(12) % 3 + 1 for part in ("train", "val", "test")},
            "labels .* are 1, 2, 3; 3 classes must be numbered 0 to 2",
        ),
        ({"train_labels": np.arange(12) % 3 - 1}, "labels .* are -1, 0, 1, 2; 4 classes must be numbered 0 to 3"),
        ({"train_labels": np.arange(12) % 3 * 10**9}, "labels .* are 0, 1, 2, 1000000000, 2000000000; 5 classes"),
        ({"class_names": np.array(["a", "b"])}, "labels .* are 0, 1, 2; 2 classes must be numbered 0 to 1"),
        ({"class_names": np.array(["a", "b", "b"])}, "class_names is .* C different strings"),
        ({"class_names": np.array([1, 2, 3])}, "class_names is int64"),
        ({"class_names": np.array(["a", "b", "c", "d"])}, "no training image of class 'd'"),
        ({"train_labels": np.array([0, 1] * 6)}, "no training image of class 'class 2'"),
        ({"test_labels": np.array([0, 2] * 6)}, "no test image of class 'class 1'"),
        ({"train_labels": np.array([{}] * 12)}, "train_labels cannot be read .*plain numbers"),
    ],
)
def test_npz_errors(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        data.load(write_npz(tmp_path / "mine.npz", **changes))
    assert "mine.npz" in str(error.value)


def test_npz_needs_two_classes(tmp_path):
    one = {f"{part}_labels": np.zeros(12, int) for part in ("train", "val", "test")}
    with pytest.raises(ValueError, match="at least 2 classes"):
        data.load(write_npz(tmp_path / "mine.npz", **one))


def test_npz_with_one_class_that_is_not_0(tmp_path):
    ones = {f"{part}_labels": np.ones(12, int) for part in ("train", "val", "test")}
    with pytest.raises(ValueError, match="are 1; that is one class, and at least 2 are needed, numbered 0, 1 and so"):
        data.load(write_npz(tmp_path / "mine.npz", **ones))


def test_npz_that_is_none(tmp_path):
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    npy = io.BytesIO()
    np.save(npy, np.zeros(3))
    for content in (b"", b"hello", whole[: len(whole) // 2], npy.getvalue(), pickle.dumps({})):
        (tmp_path / "mine.npz").write_bytes(content)
        with pytest.raises(ValueError, match="mine.npz is not a .npz file"):
            data.load(tmp_path / "mine.npz")


def test_npz_with_flipped_bytes(tmp_path):
    content = bytearray(write_npz(tmp_path / "mine.npz").read_bytes())
    content[500] ^= 255
    (tmp_path / "mine.npz").write_bytes(content)
    with pytest.raises(ValueError, match="mine.npz: train_images cannot be read"):
        data.load(tmp_path / "mine.npz")


def test_npz_with_something_else_inside(tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="no array train_images, train_labels, test_images, test_labels"):
        data.load(tmp_path / "mine.npz")


def test_the_cifar10_subset():
    if not CIFAR_SUBSET.exists():
        pytest.skip(f"{CIFAR_SUBSET} is not there")
    found, file = data.load(CIFAR_SUBSET), np.load(CIFAR_SUBSET)
    check_layout(found, 32)
    assert (len(found.train), len(found.val), len(found.test)) == (3568, 500, 500)
    assert np.array_equal(found.test.images.permute(0, 2, 3, 1).numpy(), file["test_images"])
    assert found.class_counts.tolist() == np.bincount(file["train_labels"].ravel()).tolist()


# --- folders ---


def test_folder_of_classes(tmp_path):
    root = tmp_path / "my pets"
    write_images(root / "dog", 20, shade=200)
    write_images(root / "cat", 40, shade=100)
    write_images(root / ".cache", 1)
    (root / "cat" / ".DS_Store").write_bytes(b"x")
    (root / "notes.txt").write_text("x")
    found = data.load(root)
    check_layout(found, 32)
    assert found.class_names == ("cat", "dog")
    assert re.fullmatch(r"my-pets-[0-9a-f]{8}", found.slug)
    assert (len(found.train), len(found.val), len(found.test)) == (38, 7, 15)
    assert torch.bincount(found.test.labels).tolist() == [10, 5]
    for split in (found.train, found.val, found.test):
        assert split.images[:, 0, 0, 0].tolist() == [100 if label == 0 else 200 for label in split.labels]
    assert digests(found.test) == digests(data.load(root, seed=3).test)
    assert data.load(f"{root}:10", image_size=8).slug == found.slug + "-10-8px"


def test_folder_with_its_own_splits(tmp_path):
    root = tmp_path / "pets"
    for shade, part in enumerate(("train", "val", "test")):
        write_images(root / part / "a", 4, shade=shade)
        write_images(root / part / "b", 3, shade=shade)
    found = data.load(root)
    check_layout(found, 32)
    for shade, split in enumerate((found.train, found.val, found.test)):
        assert split.labels.tolist() == [0] * 4 + [1] * 3
        assert (split.images[:, 0] == shade).all()
    shutil.rmtree(root / "val")
    without = data.load(root)
    assert without.slug != found.slug
    assert (len(without.train), len(without.val), len(without.test)) == (5, 2, 7)


def test_folder_images_are_resized_and_cut_to_the_centre(tmp_path):
    picture = np.zeros((16, 40, 3), np.uint8)  # left third red, middle green, right blue
    picture[:, :12, 0], picture[:, 12:28, 1], picture[:, 28:, 2] = 255, 255, 255
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    found = data.load(tmp_path, image_size=16)
    assert (found.train.images == torch.tensor([0, 255, 0], dtype=torch.uint8).view(1, 3, 1, 1)).all()
    small = data.load(tmp_path, image_size=8)
    assert small.train.images[:, 1].float().mean() > 230 and small.slug.endswith("-8px")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_folder_images_of_every_mode_become_rgb(mode, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (9, 9), (255, 255, 255)).convert(mode).save(tmp_path / name / f"{i}.png")
    found = data.load(tmp_path)
    assert (found.train.images == 255).all()


def test_folder_hash_covers_names_and_bytes(tmp_path):
    write_images(tmp_path / "one/a", 4)
    write_images(tmp_path / "one/b", 4)
    shutil.copytree(tmp_path / "one", tmp_path / "copy/one")
    first = data.load(tmp_path / "one").slug
    assert data.load(tmp_path / "copy/one").slug == first
    (tmp_path / "one/a/0.png").rename(tmp_path / "one/a/9.png")
    renamed = data.load(tmp_path / "one").slug
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "one/a/9.png")
    assert len({first, renamed, data.load(tmp_path / "one").slug}) == 3


def spoil_image(root):
    (root / "a/1.png").write_bytes((root / "a/1.png").read_bytes()[:40])


def add_text(root):
    (root / "a/notes.txt").write_text("hello")


def empty_class(root):
    (root / "c").mkdir()


def train_only(root):
    write_images(root / "train/a", 3)


def other_test_class(root):
    train_only(root)
    write_images(root / "train/b", 3)
    write_images(root / "test/z", 3)


def no_test_images(root):
    train_only(root)
    write_images(root / "train/b", 3)
    (root / "test").mkdir()


def lacks_test_class(root):
    train_only(root)
    write_images(root / "train/b", 3)
    write_images(root / "test/a", 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_image, r"a/1.png is not an image that can be read"),
        (add_text, r"a/notes.txt is not an image"),
        (empty_class, r"c is an empty class folder"),
        (train_only, "train/ only, beside a/, b/; ready-made splits need both train/ and test/.*give .*pets/train"),
        (other_test_class, "test/z is a class that train/ does not have"),
        (no_test_images, "test has no images"),
        (lacks_test_class, "no test image of class 'b'"),
        (lambda root: shutil.rmtree(root / "b"), "one class, 'a'; at least 2"),
        (lambda root: (shutil.rmtree(root / "b"), shutil.rmtree(root / "a")), "has no sub-folders"),
        (lambda root: write_images(root / "c", 1), "no training image of class 'c'.*3 images or more"),
    ],
)
def test_folder_errors(spoil, message, tmp_path):
    root = tmp_path / "pets"
    write_images(root / "a", 4)
    write_images(root / "b", 4)
    spoil(root)
    with pytest.raises(ValueError, match=message) as error:
        data.load(root)
    assert "pets" in str(error.value)


# --- resize ---


def test_resize_against_pil():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 40, 40), dtype=np.uint8))
    for size in (13, 64):
        ours = data.resize(images, size)
        assert ours.dtype == torch.uint8 and ours.shape == (3, 3, size, size)
        for image, small in zip(images, ours, strict=True):
            theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.BILINEAR)
            gap = np.abs(np.asarray(theirs).astype(int) - small.permute(1, 2, 0).numpy())
            assert gap.max() <= 1


def test_resize_leaves_the_right_size_alone_and_checks_its_input():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert data.resize(images, 8) is images
    with pytest.raises(ValueError, match="uint8"):
        data.resize(images.float(), 16)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        data.resize(images[0], 16)


def test_resize_does_not_depend_on_the_batch(monkeypatch):
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (600, 3, 8, 8), dtype=np.uint8))
    monkeypatch.setattr(images_module, "RESIZED_AT_ONCE", 256 * 11 * 11)
    resized = data.resize(images, 11)
    assert torch.equal(resized[300:301], data.resize(images[300:301], 11))
    monkeypatch.undo()
    assert torch.equal(resized, data.resize(images, 11))


@pytest.mark.parametrize(("side", "size"), [(8, 1024), (1024, 8)])
def test_resize_has_few_pixels_in_float_at_a_time(side, size, monkeypatch):
    seen, interpolate = [], torch.nn.functional.interpolate

    def watched(batch, **given):
        found = interpolate(batch, **given)
        seen.append(max(batch.numel(), found.numel()))
        return found

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    data.resize(torch.zeros(9, 3, side, side, dtype=torch.uint8), size)
    assert len(seen) > 1 and max(seen) <= 3 * 2**22


def test_resize_shows_a_bar_where_it_takes_long(monkeypatch, capsys):
    images = torch.zeros(9, 3, 8, 8, dtype=torch.uint8)
    data.resize(images, 11)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(images_module, "BAR_AFTER", 0)
    data.resize(images, 11)
    assert capsys.readouterr().err == ""  # one piece of work
    monkeypatch.setattr(images_module, "RESIZED_AT_ONCE", 4 * 11 * 11)
    data.resize(images, 11)
    assert "Resizing to 11x11: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["犬\u3000柴", "می\u200cخواهم", "👨\u200d👩\u200d👧", "a\u00a0b"])
def test_names_of_every_script_are_class_names(name):
    check_class_names((name, "cat"), "somewhere")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\u202eb", "\u3000", "", "a\ud800", "\u200c", " \u200d\u3000"])
def test_what_no_line_shows_is_no_class_name(name):
    with pytest.raises(ValueError, match="must be printable text"):
        check_class_names((name, "cat"), "somewhere")
