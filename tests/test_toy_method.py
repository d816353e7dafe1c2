"""A new method is one conditioner and one source: tables, sets, exports and estimates take it as it is."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from sdgen_lib.diffusion.conditions import Condition, ContextTable
from sdgen_lib.diffusion.generator import LatentGenerator
from sdgen_lib.evaluate import cas, rows, scaling, sets
from sdgen_lib.share import export
from sdgen_lib.store import files
from sdgen_lib.store.run import Step
from sdgen_lib.work import cost
from sdgen_lib.work.workspace import Source, Workspace


class Prompts:
    """The toy method: the text encoder's context for "class 0", "class 1", .., kept as a result of its own."""

    def __init__(self, ws: Workspace):
        self.ws = ws
        self.step = Step("toy/contexts", self.make, roots=("data", "model"), title="Writing prompts")

    def make(self, folder: Path, settings) -> dict:
        prompts = [f"class {c}" for c in range(self.ws.data.num_classes)]
        files.save_tensors(folder / "contexts.safetensors", {"contexts": self.ws.backbone.text_context(prompts)})
        return {"prompts": prompts}

    def generator(self) -> LatentGenerator:
        contexts = files.load_tensors(self.ws.run.file(self.step, "contexts.safetensors"))["contexts"]
        table = ContextTable(contexts, self.ws.backbone.text_context([""])[0])
        return LatentGenerator(
            self.ws.backbone, table, self.ws.data.class_names, 2, 1.5, image_size=self.ws.data.image_size
        )

    def source(self) -> Source:
        step = Step("generator/toy", lambda *_: {}, topics=("seed", "precision"), needs=(self.step,))
        point = {"num_inference_steps": 2, "guidance_scale": 1.5}
        return Source("toy", step, self.generator, lambda: point, lambda n: self.generator().work(n))


@pytest.mark.parametrize("name", ["", "a/b", "../../evil", "con", "a."])
def test_a_name_that_no_folder_can_have_is_refused(name):
    step = Step("generator/toy", lambda *_: {})
    with pytest.raises(ValueError, match="A source's name"):
        Source(name, step, lambda: None, dict, lambda images: {})


def test_a_toy_method_gets_all_that_the_papers_method_has(small, tmp_path):
    ws = small(tmp_path / "runs").workspace
    source = Prompts(ws).source()

    row = cas.cas(ws, source)
    assert len(row["test"]) == 2 and row["num_images"] == 6 and row["point"]["guidance_scale"] == 1.5
    assert (ws.run.path / "table_1" / "toy").is_dir()

    one, two = sets.synthetic(ws, source, 1), sets.synthetic(ws, source, 2)
    assert len(one) == 6 and torch.equal(two.images[:6], one.images)
    rows = scaling.scaling(ws, source)
    assert list(rows) == ["real", "x1", "x2"] and rows["x2"]["num_images"] == 12

    step = sets.block_step(ws, source, 3)
    seconds = cost.seconds(ws.backbone, step.work())
    assert 0 < seconds < 60 and sum(n for kind, n in step.work().items() if kind.kind == "unet") == 6 * 2 * 2

    out = export.export(ws, source, "npz", tmp_path / "out", multiple=1)
    with np.load(out / f"{ws.data.slug}.npz", allow_pickle=False) as file:
        exported = torch.from_numpy(file["train_images"]).permute(0, 3, 1, 2)
    assert torch.equal(exported, one.images)


def test_its_conditioner_says_something_else_for_each_image(small, tmp_path):
    """The loop, the sampler and the sets hand every image's index to the conditioner."""
    ws = small(tmp_path).workspace
    asked = []

    class Indexed:
        def __call__(self, labels, indices, seed):
            asked.append((labels.tolist(), indices.tolist(), seed))
            return Condition(torch.zeros(len(labels), ws.backbone.tokens, ws.backbone.width))

        def unconditional(self):
            return Condition(torch.zeros(1, ws.backbone.tokens, ws.backbone.width))

    generator = LatentGenerator(ws.backbone, Indexed(), ws.data.class_names, 1, 1.0, batch_size=4)
    generator([0, 1, 1, 0, 1], seed=7, first_index=10)
    assert asked == [([0, 1, 1, 0], [10, 11, 12, 13], 7), ([1], [14], 7)]


def test_two_sources_that_read_the_same_are_not_mistaken_for_each_other(small, tmp_path):
    """By name or by version: neither rows nor blocks are shared."""
    ws = small(tmp_path).workspace
    toy = Prompts(ws).source()
    others = [
        dataclasses.replace(toy, step=dataclasses.replace(toy.step, name="generator/other")),
        dataclasses.replace(toy, step=dataclasses.replace(toy.step, version=2)),
    ]
    for step_of in (lambda source: cas.cas_step(ws, source), lambda source: sets.block_step(ws, source, 1)):
        assert len({ws.run.fingerprint(step_of(source)) for source in (toy, *others)}) == 3


def test_a_generator_without_a_unet_of_its_own_draws_with_the_pretrained_one(small, tmp_path):
    """Whatever was put in place before."""
    ws = small(tmp_path).workspace
    generator = Prompts(ws).generator()
    expected = generator([0, 1])
    ws.backbone.put_unet("louder", lambda: {k: 1.2 * v for k, v in ws.backbone.unet.state_dict().items()})
    assert torch.equal(generator([0, 1]), expected)


def test_a_source_need_not_declare_the_seed(small, tmp_path):
    ws = small(tmp_path).workspace
    source = Prompts(ws).source()
    source = dataclasses.replace(source, step=dataclasses.replace(source.step, topics=()))
    assert len(sets.synthetic(ws, source, 1)) == 6


def test_a_row_is_told_by_its_options_its_images_and_its_tests(small, tmp_path):
    ws = small(tmp_path).workspace

    def fingerprint(num_images=6, **options):
        return ws.run.fingerprint(rows.row_step(ws, "table_3/mix", None, num_images, **options))

    inverted = dataclasses.replace(ws.data.test, images=255 - ws.data.test.images)
    told = [
        fingerprint(),
        fingerprint(num_images=7),
        fingerprint(options={"width": 8}),
        fingerprint(options={"dtype": torch.float32}),
        fingerprint(inputs={"network": "a"}, options={"network": "resnet18"}),
        fingerprint(inputs={"network": "b"}, options={"network": "resnet18"}),
        fingerprint(tests={"inverted": inverted}),
    ]
    assert len(set(told)) == len(told)
    with pytest.raises(ValueError, match='"test" is the name'):
        fingerprint(tests={"test": inverted})
