"""A finished run of seconds, and a generator that is not the paper's: each class told by a prompt."""

import dataclasses

import pytest

from sdgen_lib.diffusion.conditions import ContextTable
from sdgen_lib.diffusion.generator import LatentGenerator
from sdgen_lib.store.run import Step
from sdgen_lib.work.workspace import Source


@pytest.fixture(scope="session")
def course(small, tmp_path_factory):
    """The smallest run through every step, both tables too. No test changes its folder."""
    course = small(tmp_path_factory.mktemp("share") / "runs")
    course.scaling()
    for row in ("after 1", "after 4"):
        course.cas(row)
    return course


@dataclasses.dataclass
class Prompts:
    """A `Conditioner` by the text encoder: class k is told "class k"."""

    backbone: object
    count: int

    def table(self):
        contexts = self.backbone.text_context([f"class {k}" for k in range(self.count)] + [""])
        return ContextTable(contexts[:-1], contexts[-1])

    def __call__(self, labels, indices=None, seed=0):
        return self.table()(labels)

    def unconditional(self):
        return self.table().unconditional()


@pytest.fixture(scope="session")
def prompts():
    """``prompts(workspace)`` -> a `Source` that needs no step, has no search and is drawn at one inference step."""

    def source(ws, name="prompts"):
        def build():
            conditioner, fingerprint = Prompts(ws.backbone, ws.data.num_classes), ws.run.fingerprint(step)
            return LatentGenerator(
                ws.backbone,
                conditioner,
                ws.data.class_names,
                1,
                1.5,
                image_size=ws.data.image_size,
                fingerprint=fingerprint,
            )

        step = Step(f"generator/{name}", None, topics=("seed", "precision"), roots=("model",), inputs={"words": name})
        point = {"num_inference_steps": 1, "guidance_scale": 1.5}
        return Source(name, step, build, lambda: point, lambda images: {})

    return source
