"""What is taken away, read back by the libraries it is meant for."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from sdgen_lib import data, export, generator, runs
from sdgen_lib.export import course_of, folder_names

LABELS = torch.tensor([3, 0, 9])


@pytest.fixture(scope="module")
def taken(finished, tmp_path_factory):
    """The micro run in every format: {format: folder}."""
    base = tmp_path_factory.mktemp("taken")
    return {to: export.export(finished.course, to, base / to) for to in ("folder", "npz", "parquet", "generator")}


@pytest.fixture(scope="module")
def synthetic(finished):
    return finished.course.synthetic(2)


def as_split(pairs) -> data.Split:
    """(PIL image, label) pairs -> a Split."""
    pairs = [(np.array(image.convert("RGB")), int(np.asarray(label).item())) for image, label in pairs]
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
    return data.Split(images, torch.tensor([label for _, label in pairs]))


def same_set(a: data.Split, b: data.Split) -> bool:
    """Whether two splits hold the same labelled images, in any order."""
    sets = [sorted((int(y), x.contiguous().numpy().tobytes()) for x, y in zip(s.images, s.labels)) for s in (a, b)]
    return sets[0] == sets[1]


# --- round trips ---


def test_image_folder_by_torchvision(taken, finished, synthetic):
    from torchvision.datasets import ImageFolder

    for part, expected in (
        ("train", synthetic),
        ("val", finished.course.data.val),
        ("test", finished.course.data.test),
    ):
        read = ImageFolder(taken["folder"] / part)
        assert read.classes == list("0123456789")
        assert same_set(as_split(read), expected)


def test_npz_by_medmnist(taken, synthetic, finished, tmp_path):
    """medmnist's own reader, of the file under a name of its own."""
    import medmnist

    (tmp_path / "pathmnist.npz").write_bytes((taken["npz"] / "digits-100.npz").read_bytes())
    for part, expected in (("train", synthetic), ("test", finished.course.data.test)):
        read = as_split(medmnist.PathMNIST(part, root=tmp_path))
        assert torch.equal(read.images, expected.images) and torch.equal(read.labels, expected.labels)
    with np.load(taken["npz"] / "digits-100.npz", allow_pickle=False) as file:
        assert file["train_labels"].shape == (200, 1) and file["train_labels"].dtype == np.uint8


def test_parquet_by_datasets(taken, synthetic, finished, tmp_path):
    import datasets
    from PIL.Image import Image

    whole = datasets.load_dataset(str(taken["parquet"]), cache_dir=str(tmp_path))
    assert list(whole) == ["train", "validation", "test"]
    features = whole["train"].features
    assert isinstance(features["image"], datasets.Image) and isinstance(whole["train"][0]["image"], Image)
    assert features["label"] == datasets.ClassLabel(names=list("0123456789"))
    read = as_split((row["image"], row["label"]) for row in whole["train"])
    assert torch.equal(read.images, synthetic.images) and torch.equal(read.labels, synthetic.labels)
    files = {"test": str(taken["parquet"] / "data" / "test-*.parquet")}
    test = datasets.load_dataset("parquet", data_files=files, split="test", cache_dir=str(tmp_path))
    assert test.features == features
    assert same_set(as_split((row["image"], row["label"]) for row in test), finished.course.data.test)


@pytest.mark.parametrize("to", ["npz", "folder"])
def test_a_set_is_a_dataset_of_the_course(taken, synthetic, finished, to):
    read = data.load(taken[to] / "digits-100.npz" if to == "npz" else taken[to], image_size=16)
    assert read.class_names == finished.course.data.class_names
    assert same_set(read.train, synthetic) and same_set(read.test, finished.course.data.test)
    assert same_set(read.val, finished.course.data.val)


# --- the generator ---


def test_five_lines(taken, finished):
    """The saved generator draws the run's images, in a process that knows nothing of the run."""
    program = f"""
import sdgen_lib
generator = sdgen_lib.load({str(taken["generator"])!r}, device="cpu", precision="fp32")
images = generator([3, "0", 9], num_inference_steps=4, guidance_scale=1.5)
import numpy; numpy.save("images.npy", images.numpy())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], cwd=taken["generator"].parent, check=True, env=environment)
    read = torch.from_numpy(np.load(taken["generator"].parent / "images.npy", allow_pickle=False))
    point = {**finished.course.point("after 4"), "IS": 4, "UGS": 1.5}
    assert torch.equal(read, finished.course.draw(point, LABELS, generator.SET_NAME))


def test_the_best_point_is_the_default(taken, finished):
    loaded = generator.load(taken["generator"], "cpu", "fp32")
    point = finished.course.point("after 4")
    assert torch.equal(loaded(LABELS), finished.course.draw(point, LABELS, generator.SET_NAME))
    assert torch.equal(loaded(LABELS[1:], first_index=1), loaded(LABELS)[1:])
    assert not torch.equal(loaded(LABELS, seed=1), loaded(LABELS))


def test_diffusers_reads_the_generator(taken, finished):
    """As any Stable Diffusion; its UNet is the fine-tuned one."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(taken["generator"])
    epoch = finished.course.point("after 4")["finetune_epoch"]
    tuned = runs.load_tensors(finished.course.run.path / "3_finetune" / f"epoch_{epoch:03d}.safetensors")
    state = pipeline.unet.state_dict()
    assert set(state) == set(tuned) and all(torch.equal(state[name], tuned[name].float()) for name in tuned)
    kinds = {path.suffix for path in taken["generator"].rglob("*") if path.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt", ".md"}


def test_the_generator_of_an_earlier_row(finished, tmp_path):
    loaded = generator.load(export.export(finished.course, "generator", tmp_path / "two", row="after 2"), "cpu", "fp32")
    two = finished.course.point("after 2")
    assert (loaded.num_inference_steps, loaded.guidance_scale) == (two["IS"], two["UGS"])
    assert torch.equal(loaded(LABELS), finished.course.draw(two, LABELS, generator.SET_NAME))


@pytest.mark.parametrize(
    ("labels", "words"),
    [(["zero"], "'zero'.*Allowed: 0, 1"), ([10], "from 0 to 9.*not 10"), ([-1], "not -1"), ([0.5], "not 0.5"),
     ([], "empty"), ("3", r"\['3'\]")],
)  # fmt: skip
def test_wrong_labels(taken, labels, words):
    with pytest.raises(ValueError, match=words):
        generator.load(taken["generator"], "cpu")(labels)


def test_a_folder_that_is_no_generator(taken, tmp_path):
    with pytest.raises(FileNotFoundError, match="no generator.json.*--to generator"):
        generator.load(tmp_path)
    (tmp_path / "generator.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99.*up to 1"):
        generator.load(tmp_path)


def test_importing_the_package_is_light():
    program = "import sdgen_lib, sys; assert callable(sdgen_lib.load); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "False"


# --- cards ---


@pytest.mark.parametrize("to", ["folder", "npz", "parquet", "generator"])
def test_the_card(taken, finished, to):
    text = (taken[to] / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["license"] == "other"
    point = finished.course.point("after 4")
    assert f"| inference steps (IS) | {point['IS']} |" in body and f"{point['UGS']:.4f}"[:5] in body
    row = finished.rows["after 4"] if to == "generator" else finished.scaling["x2"]
    assert f"{100 * np.mean(row['test']):.1f} ±" in body
    for word in ("2405.02698", "CC BY 4.0", "Apache-2.0", "## Limits", "Made from 100 real"):
        assert word in body
    if to != "generator":
        assert "| train | 200 |" in body and "| test | 449 |" in body


@pytest.mark.parametrize("to", ["folder", "npz", "parquet", "generator"])
def test_the_lines_of_a_card_work_as_they_stand(taken, to, tmp_path):
    (program,) = re.findall(r"```python\n(.+?)```", (taken[to] / "README.md").read_text(encoding="utf-8"), re.S)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], cwd=taken[to].parent, check=True, env=environment)


# --- what is asked for ---


def test_without_real_images_and_fewer_blocks(finished, synthetic, tmp_path):
    out = export.export(finished.course, "npz", tmp_path / "out", multiple=1, real=False)
    with np.load(out / "digits-100.npz", allow_pickle=False) as file:
        assert set(file.files) == {"train_images", "train_labels", "class_names"}
        assert torch.equal(torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2), synthetic.images[:100])
    assert "No real image is in it." in (out / "README.md").read_text()


@pytest.mark.parametrize("multiple", [0, 3])
def test_more_than_there_is(finished, tmp_path, multiple):
    with pytest.raises(FileNotFoundError, match=rf"x1 \.\. x2 .* not x{multiple}: run chapter 07"):
        export.export(finished.course, "npz", tmp_path / "out", multiple=multiple)
    assert list(tmp_path.iterdir()) == []  # nor anything half made


def test_what_is_there_is_not_replaced(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already there"):
        export.export(finished.course, "npz", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unfinished_run(micro, tmp_path):
    from sdgen_lib.course import Course

    course = Course(micro(tmp_path / "runs"))
    with pytest.raises(FileNotFoundError, match="no finished 1_transfer: run chapter 02"):
        export.export(course, "generator", tmp_path / "out")
    with pytest.raises(ValueError, match="Unknown format 'zip'.*Allowed: folder, generator, npz, parquet"):
        export.export(course, "zip", tmp_path / "out")


def test_command_line(finished, tmp_path, capsys):
    export.main([str(finished.course.run.path), "--to", "parquet", str(tmp_path / "out"), "--multiple", "1"])
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert (tmp_path / "out/data/train-00000-of-00001.parquet").is_file()
    with pytest.raises(SystemExit, match="already there"):
        export.main([str(finished.course.run.path), "--to", "npz", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="no manifest.json"):
        export.main([str(tmp_path), "--to", "npz", str(tmp_path / "two")])


def test_course_of_a_folder_that_is_not_its_own(finished, tmp_path):
    path = finished.course.run.path
    assert dataclasses.replace(course_of(path).settings, runs_dir=None) == dataclasses.replace(
        finished.course.settings, runs_dir=None
    )
    moved = tmp_path / "elsewhere" / path.name
    moved.mkdir(parents=True)
    (moved / "manifest.json").write_text(json.dumps(finished.course.run.manifest))
    with pytest.raises(ValueError, match="belong in digits-100/tiny-demo-seed0"):
        course_of(moved)


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


def test_whole_folder_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(RuntimeError):
        with runs.whole_folder(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
