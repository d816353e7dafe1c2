"""Whatever bytes stand in an .npz file or an image folder: it is read rightly, or refused in one line that names it."""

import io
import unicodedata
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from PIL import Image

from sdgen_lib.data.folders import read_folder
from sdgen_lib.data.npz import read_npz

bounded = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(read, path: Path):
    """What ``read(path)`` gives, or None where it refused the file properly."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return None


def check_parts(found, side=None) -> None:
    """What a reader may return: the layout that `data` relies on."""
    slug, class_names, parts = found.slug, found.class_names, found.parts
    assert all(isinstance(name, str) for name in class_names) and "/" not in slug and not slug.startswith(".")
    for images, labels in parts.values():
        assert images.dtype == np.uint8 and images.ndim in (3, 4) and images.shape[1] == images.shape[2]
        assert side in (None, images.shape[1])
        assert len(images) == labels.size > 0 and labels.dtype.kind in "iu"
        assert 0 <= int(labels.min()) and int(labels.max()) < len(class_names)


def whole_npz() -> bytes:
    random, file = np.random.default_rng(0), io.BytesIO()
    parts = {}
    for part in ("train", "test"):
        parts[f"{part}_images"] = random.integers(0, 256, (4, 8, 8), dtype=np.uint8)
        parts[f"{part}_labels"] = np.array([0, 1, 0, 1])
    np.savez_compressed(file, **parts, class_names=np.array(["cat", "dog"]))
    return file.getvalue()


NPZ = whole_npz()
edits = st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=8)


@pytest.mark.parametrize("cut", [False, True])
@bounded
@given(edits=edits)
def test_an_npz_with_changed_bytes(tmp_path, cut, edits):
    content = bytearray(NPZ)
    for at, value in edits:
        content[at % len(content)] = value
    path = tmp_path / "mine.npz"
    path.write_bytes(content[: edits[0][0] % len(content)] if cut else content)
    if (found := outcome(read_npz, path)) is not None:
        check_parts(found)
        images, labels = found.parts["train"]  # the archive's CRC: what got through is what was written
        assert images.shape == (4, 8, 8) and labels.tolist() == [0, 1, 0, 1]


@bounded
@given(headers=st.lists(st.binary(max_size=200), min_size=4, max_size=4), magic=st.booleans())
def test_an_npz_of_any_members(tmp_path, headers, magic):
    path = tmp_path / "mine.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for key, content in zip(("train_images", "train_labels", "test_images", "test_labels"), headers):
            archive.writestr(f"{key}.npy", (b"\x93NUMPY\x01\x00" if magic else b"") + content)
    assert outcome(read_npz, path) is None


any_array = np_st.arrays(
    st.one_of(np_st.scalar_dtypes(), np_st.unicode_string_dtypes(max_len=3)),
    np_st.array_shapes(min_dims=0, max_dims=4, max_side=4),
)


@bounded
@given(images=any_array, labels=any_array, names=st.none() | any_array)
def test_an_npz_of_any_arrays(tmp_path, images, labels, names):
    path = tmp_path / "mine.npz"
    arrays = dict(train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    np.savez(path, **arrays, **({} if names is None else {"class_names": names}))
    found = outcome(read_npz, path)
    if found is not None:
        check_parts(found)
        assert np.array_equal(found.parts["train"][0], images) and np.array_equal(found.parts["test"][1], labels)


@bounded
@given(
    images=np_st.arrays(np.uint8, st.tuples(st.integers(1, 5), st.just(3), st.just(3))),
    classes=st.integers(1, 4),
    order=st.sampled_from("CF"),
    kind=st.sampled_from(["u1", "<i8", ">i4", "i2"]),
)
def test_every_right_npz_is_read_as_numpy_reads_it(tmp_path, images, classes, order, kind):
    path = tmp_path / "mine.npz"
    labels = (np.arange(len(images)) % min(classes, len(images))).astype(kind)
    np.savez(
        path, train_images=np.asarray(images, order=order), train_labels=labels, test_images=images, test_labels=labels
    )
    found = read_npz(path)
    with np.load(path, allow_pickle=False) as file:
        for part in ("train", "test"):
            assert np.array_equal(found.parts[part][0], file[f"{part}_images"])
            assert np.array_equal(found.parts[part][1], file[f"{part}_labels"])
    assert len(found.class_names) == min(classes, len(images))


def encoded(kind: str) -> bytes:
    random, file = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(random.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    (image.convert("P") if kind == "GIF" else image).save(file, kind)
    return file.getvalue()


IMAGES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")}


@bounded
@given(
    kind=st.sampled_from(sorted(IMAGES)),
    edits=edits,
    cut=st.none() | st.integers(0, 10**4),
    name=st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20).filter(lambda n: n[0] != "."),
)
def test_a_folder_with_changed_images_under_any_name(tmp_path, kind, edits, cut, name):
    content = bytearray(IMAGES[kind])
    for at, value in edits:
        content[at % len(content)] = value
    content = content[: cut % len(content)] if cut is not None else content
    root = tmp_path / "pets"
    folder = root / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    try:
        (folder / name).write_bytes(content)
    except (OSError, UnicodeEncodeError):
        return  # no name for a file here
    found = outcome(lambda path: read_folder(path, 8), root)
    if found is not None:
        check_parts(found, side=8)
        assert found.parts["all"][0].shape == (1, 8, 8, 3)


@bounded
@given(name=st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=30))
def test_class_folders_of_any_name(tmp_path, name):
    root = tmp_path / "pets"
    for old in root.glob("*/*"):
        old.unlink()
        old.parent.rmdir()
    try:
        (root / name).mkdir(parents=True)
        (root / name / "1.png").write_bytes(IMAGES["PNG"])
    except (OSError, ValueError):
        return
    found = outcome(lambda path: read_folder(path, 8), root)
    if found is not None:
        check_parts(found, side=8)
        assert found.class_names == (unicodedata.normalize("NFC", name),)
