"""The cards: what they say is of what they go with, and nothing in them is private."""

import ast
import dataclasses
import re
import shutil
from pathlib import Path

import mistune
import numpy as np
import pytest
import small as small_run
import strange_names
import torch
import yaml

from sdgen_lib.data import ImageData, Split
from sdgen_lib.diffusion import weights
from sdgen_lib.evaluate.cas import cas
from sdgen_lib.evaluate.scaling import scaling_step
from sdgen_lib.evaluate.sets import synthetic
from sdgen_lib.share import cards, export
from sdgen_lib.share.origin import Origin, cas_of_generator, cas_of_real, cas_of_set, public_backbone, public_dataset
from sdgen_lib.show.names import printable

ORIGIN = Origin(
    "digits:100",
    "tiny",
    "demo",
    3,
    "after 4",
    {"num_inference_steps": 7, "guidance_scale": 1.23456789, "transfer_epoch": 2, "finetune_epoch": None},
    {"seed": 3, "select_on": "val", "finetune_learning_rate": 1e-5, "n_trials": 14, "class_mix": "real"},
    ("latents", "1_transfer", "2_tune"),
)


def data_of(class_names=("ant", "bee"), slug="some-slug"):
    labels = torch.tensor([0, 1, 1, 1])
    split = Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), labels)
    return ImageData("some name", slug, tuple(class_names), split, split, split)


def measured(*accuracies):
    facts = {"test": list(accuracies), "balanced_test": [0.5 for _ in accuracies], "num_images": 40}
    return type("Result", (), {"facts": facts})


def card_of(origin=ORIGIN, data=None, row=None, **more):
    how = dict(form="npz", out="out", multiple=2, counts={"train": 8, "test": 4}, folders=["ant", "bee"], header={})
    return cards.dataset_card(origin, data or data_of(), {"generated, x2": row, "real": None}, **{**how, **more})


# --- what it says ---


def test_a_dataset_card():
    _, header, body = card_of(row=measured(0.5, 0.6), header={"configs": [{"config_name": "x"}]}).split("---\n", 2)
    header = yaml.safe_load(header)
    assert header["license"] == "other" and header["configs"] == [{"config_name": "x"}]
    assert header["size_categories"] == ["n<1K"] and header["pretty_name"].startswith("digits:100")
    for line in (
        "8 **generated** training images of 8x8 pixels in 2 classes: 2 times the real training set, with its class",
        "| train | 8 |",
        "| inference steps (IS) | 7 |",
        "| guidance scale (UGS) | 1.2346 |",
        "| recipe | demo |",
        "| seed | 3 |",
        "| epoch of the Class-Encoder | 2 |",
        "| changed: finetune_learning_rate | 1e-05 |",
        "| generated, x2 | 55.0 ± 7.1 % (2 classifiers) | 50.0 ± 0.0 % |",
        "| real | not measured in this run |",
        "would be right in 75.0 %",
        "CC BY 4.0",
        "Apache-2.0",
        "Made from 4 real",
        "| 0 | ant | ant |",
        'np.load("./out/some-slug.npz"',
        "2405.02698",
    ):
        assert line in body
    assert "changed: n_trials" not in body and "flatter" not in body and "epoch of the UNet" not in body
    assert "a Class-Encoder in the text encoder's place, the number of inference steps" in body
    assert "fine-tuned" not in body  # this one was not


def test_what_was_selected_on_test_images_is_said():
    settings = {**ORIGIN.settings, "select_on": "test", "class_mix": "balanced"}
    text = card_of(dataclasses.replace(ORIGIN, settings=settings))
    assert "selected on these same TEST images: the numbers flatter" in text and "as many of each class" in text


def test_a_generator_card():
    text = cards.generator_card(ORIGIN, data_of(), measured(0.25), out="here", point={"steps": 7, "guidance": 1.5})
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "diffusers"
    assert '("./here")' in text and "num_inference_steps=7, guidance_scale=1.50" in text
    assert "| generated, after 4, 40 images | 25.0 % (one classifier) | 50.0 % |" in text
    assert "Classes: ant, bee." in text


def rendered(text) -> strange_names.Page:
    """A card's body as a page on GitHub or the Hub: HTML let through, tables, bare links and mathematics read."""
    plugins = ["table", "strikethrough", "url", "math"]
    return strange_names.Page(mistune.create_markdown(escape=False, plugins=plugins)(text.split("---\n", 2)[2]))


@pytest.mark.parametrize("name", strange_names.ALL)
def test_class_names_stay_in_their_cells(name):
    plain, strange = data_of(("ant", "bee")), data_of((name, "bee"))
    folders = ["ant", "bee"]
    for card in (
        lambda data: card_of(data=data, folders=folders),
        lambda data: cards.generator_card(ORIGIN, data, None, out="x", point={"steps": 1, "guidance": 1}),
    ):
        page = rendered(card(strange))
        assert page.tags == rendered(card(plain)).tags
        assert name not in strange_names.SEEN[:2] or "<img" not in card(strange)
    cells = [cell.strip() for cell in rendered(card_of(data=strange, folders=folders)).cells]
    assert cells[-6:] == ["0", printable(name).strip(), "ant", "1", "bee", "bee"]


@pytest.mark.parametrize("name", strange_names.ALL)
def test_a_model_and_a_folder_may_be_called_anything(name):
    """`public_backbone` gives the last part of a path; OUT is the reader's own."""
    origin = dataclasses.replace(ORIGIN, backbone=f"{name} (a local folder)")
    plain = dataclasses.replace(ORIGIN, backbone="x (a local folder)")
    for card in (
        lambda origin, out: card_of(origin, out=out),
        lambda origin, out: card_of(origin, out=out, form="folder"),
        lambda origin, out: card_of(origin, out=out, form="parquet"),
        lambda origin, out: cards.generator_card(origin, data_of(), None, out=out, point={"steps": 1, "guidance": 1}),
    ):
        assert rendered(card(origin, name)).tags == rendered(card(plain, "x")).tags
        (program,) = re.findall(r"```python\n(.+?)\n```\n", card(origin, name), re.S)
        texts = [node.value for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Constant)]
        assert any(text == f"./{name}" or str(text).startswith(f"./{name}/") for text in texts)


def test_a_header_stays_a_header():
    for dataset in (*strange_names.ALL, "a: b", "x\n---\nlicense: mit"):
        text = card_of(dataclasses.replace(ORIGIN, dataset=dataset))
        (header, _) = list(yaml.safe_load_all(text.split("\n# ", 1)[0] + "\n"))[:2]
        assert header["license"] == "other" and header["pretty_name"] == f"{dataset}, drawn by sdgen (x2)"


def test_licences():
    mnist = dataclasses.replace(ORIGIN, dataset="pathmnist_64:500", backbone="sd2@abc")
    text = card_of(mnist)
    assert "pathmnist_64:500: CC BY 4.0" in text and "sd2@abc: CreativeML" in text
    own = dataclasses.replace(ORIGIN, dataset="digits-1a2b3c4d", backbone="sd2 (a local folder)")
    text = card_of(own)
    assert "digits-1a2b3c4d: see where it came from" in text and "folder): see where it came from" in text


# --- names without a path ---


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("tiny", "tiny"),
        ("sd2@1e2d3f4", "sd2@1e2d3f4"),
        ("owner/model", "owner/model"),
        ("owner/model@main", "owner/model@main"),
        ("/home/me/secret/model/", "model (a local folder)"),
        ("~/secret/sd2", "sd2 (a local folder)"),
        ("./sd2", "sd2 (a local folder)"),
        ("a/b/c", "c (a local folder)"),
        ("C:\\me\\model", "model (a local folder)"),
        ("/", "(a local folder)"),
    ],
)
def test_public_backbone(backbone, expected):
    assert public_backbone(backbone) == expected


def test_a_folder_with_the_look_of_a_hub_id(tmp_path, monkeypatch):
    (tmp_path / "secret/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_backbone("secret/model") == "model (a local folder)"


@pytest.mark.parametrize(
    ("name", "expected"), [("digits:100", "digits:100"), ("PathMNIST", "PathMNIST"), ("/me/digits", "some-slug")]
)
def test_public_dataset(name, expected):
    assert public_dataset(dataclasses.replace(data_of(), name=name)) == expected


def test_nothing_that_is_taken_away_says_where_data_and_model_were(small, prompts, tmp_path):
    private = tmp_path / "private-place"
    model = shutil.copytree(weights.TINY, private / "model")
    dataset = small_run.write_dataset(private / "set.npz")
    ws = small(private / "runs", dataset=str(dataset), backbone=str(model)).workspace
    source = prompts(ws)
    synthetic(ws, source, 1)
    for to in ("folder", "npz", "parquet", "generator"):
        out = export.export(ws, source, to, tmp_path / to)
        found = [path for path in out.rglob("*") if path.is_file()]
        assert found and [path for path in found if b"private-place" in path.read_bytes()] == []
        text = (out / "README.md").read_text()
        assert f"| trained on | {ws.data.slug} |" in text and "| backbone | model (a local folder) |" in text


# --- what was measured is of this very source ---


def test_the_rows_of_a_card_are_its_own(course, tmp_path):
    ws, source = course.workspace, course.source()
    rows = course.scaling()
    for multiple in (1, 2):
        text = Path(export.export(ws, source, "npz", tmp_path / str(multiple), multiple) / "README.md").read_text()
        for name, row in ((f"generated, x{multiple}", rows[f"x{multiple}"]), ("real", rows["real"])):
            assert f"| {name} | {100 * np.mean(row['test']):.1f} ± " in text
    text = (export.export(ws, source, "generator", tmp_path / "out") / "README.md").read_text()
    assert f"| generated, after 4, 6 images | {100 * np.mean(course.cas('after 4')['test']):.1f} ± " in text


def test_rows_of_another_set_are_not_shown(small, prompts, tmp_path):
    nested = small(tmp_path / "runs", max_multiple=3).workspace
    random = small(tmp_path / "runs", max_multiple=3, larger_sets="random").workspace
    fewer = small(tmp_path / "runs", max_multiple=2, larger_sets="random").workspace
    source = prompts(nested)
    made = {}
    for name, ws in (("nested", nested), ("random", random), ("fewer", fewer)):
        assert cas_of_set(ws, prompts(ws), 1) is None or name == "fewer"  # x1 is apart in both
        for row in ("x1", "x2"):
            step = scaling_step(ws, prompts(ws), row)
            made[name, int(row[1:])] = ws.run.result(step)
    for name, ws in (("nested", nested), ("random", random), ("fewer", fewer)):
        for multiple in (1, 2):
            found = cas_of_set(ws, prompts(ws), multiple)
            assert found.fingerprint == made[name, multiple].fingerprint
            assert cas_of_set(ws, prompts(ws, "other words"), multiple) is None
    assert made["random", 1].fingerprint == made["fewer", 1].fingerprint != made["nested", 1].fingerprint
    assert len({made[name, 2].fingerprint for name in ("nested", "random", "fewer")}) == 3
    assert cas_of_set(nested, source, 3) is None
    # Measured with other classifiers, it is still this set: the newest counts, and the real row beside it is alike.
    more = small(tmp_path / "runs", max_multiple=3, classifier_seeds=3).workspace
    assert cas_of_real(nested, source, made["nested", 1]) is None
    newest = more.run.result(scaling_step(more, prompts(more), "x1"))
    real = more.run.result(scaling_step(more, prompts(more), "real"))
    assert cas_of_set(nested, source, 1).fingerprint == newest.fingerprint
    assert (
        cas_of_real(nested, source, newest).fingerprint
        == real.fingerprint
        == cas_of_real(nested, source, None).fingerprint
    )
    assert cas_of_real(nested, source, made["nested", 1]) is None


def test_the_row_of_a_generator_is_its_own(small, prompts, tmp_path):
    ws = small(tmp_path / "runs").workspace
    facts = cas(ws, prompts(ws))
    assert cas_of_generator(ws, prompts(ws)).facts == facts
    other = small(tmp_path / "runs", precision="bf16").workspace
    assert cas_of_generator(other, prompts(other)) is None
    changed = dataclasses.replace(prompts(ws), step=dataclasses.replace(prompts(ws).step, inputs={"words": "others"}))
    assert cas_of_generator(ws, changed) is None
    later = small(tmp_path / "runs", classifier_seeds=1, num_images=4).workspace
    assert cas_of_generator(later, prompts(later)).facts == facts
