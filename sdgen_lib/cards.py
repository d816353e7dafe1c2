"""Cards: the README.md of what is taken away, with the YAML header that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from . import backbone_files, data_named, report, runs
from .course import Course

PAPER = "https://arxiv.org/abs/2405.02698"
DATA_LICENCES = {
    "digits": "CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI repository)",
    **dict.fromkeys(data_named.CIFAR, "none stated by its authors"),
}
UNKNOWN = "see where it came from"
LOADING = {
    "folder": """from torchvision.datasets import ImageFolder

train = ImageFolder("./{out}/train")""",
    "npz": """import numpy as np

with np.load("./{out}/{slug}.npz", allow_pickle=False) as file:
    train_images, train_labels = file["train_images"], file["train_labels"]""",
    "parquet": """from datasets import load_dataset

train = load_dataset("./{out}", split="train")""",
    "generator": """import sdgen_lib

generator = sdgen_lib.load("./{out}")
images = generator([0, 1, 2], num_inference_steps={IS}, guidance_scale={UGS:.2f})  # uint8 (3, 3, H, W)""",
}


def dataset_card(
    course: Course, form: str, out: str, multiple: int, counts: dict[str, int], folders: Sequence[str],
    **header: Any,
) -> str:  # fmt: skip
    """The card of a generated set; ``counts`` images of each part, ``folders`` the classes' folder names."""
    c, point = course, course.point("after 4")
    total = sum(counts.values())
    yaml = DatasetCardData(
        pretty_name=f"{c.settings.dataset}, drawn by sdgen (x{multiple})", license="other",
        task_categories=["image-classification"], tags=["synthetic", "diffusion", "sdgen"],
        size_categories=[_size_category(total)], **header,
    ).to_yaml()  # fmt: skip
    mix = "with its class counts" if c.settings.class_mix == "real" else "as many of each class"
    real = "`val` and `test` are **real** images, copied unchanged from the source, to choose and to measure with."
    classes = "\n".join(
        f"| {i} | {name} | {folder} |" for i, (name, folder) in enumerate(zip(c.data.class_names, folders))
    )
    return f"""---
{yaml}
---
# {c.settings.dataset}, drawn by a diffusion model

{counts["train"]} **generated** training images of {c.data.image_size}x{c.data.image_size} pixels in \
{c.data.num_classes} classes: {multiple} times the real training set, {mix}. \
{real if len(counts) > 1 else "No real image is in it."}

| part | images |
|---|---|
{_rows(counts)}

```python
{LOADING[form].format(out=out, slug=c.data.slug)}
```

{_method(c, point)}

## CAS

The accuracy on real test images of a ResNet20 trained on the generated images alone.

{_cas(c, multiple)}

## Licence

{_licence(c)}

## Limits

{_limits(c)}
- The pictures repeat what the model believes of a class. Rare kinds within a class are likely to be missing.
- Not for diagnosis, and not evidence of how a classifier does on images of another source.

## Classes

| label | class | folder name |
|---|---|---|
{classes}
"""


def generator_card(course: Course, out: str, row: str) -> str:
    """The card of a saved generator."""
    c, point = course, course.point(row)
    found = runs.load_json(c.run.path / "table_1.json", {}).get(row)
    cas = f"{_percent(found['test'])} with {found['num_images']} images" if found else "not measured in this run"
    yaml = ModelCardData(
        license="other", library_name="diffusers", pipeline_tag="unconditional-image-generation",
        tags=["class-conditional", "sdgen"],
    ).to_yaml()  # fmt: skip
    return f"""---
{yaml}
---
# A generator of {c.settings.dataset}, class by class

A latent diffusion model with a linear Class-Encoder: labels in, uint8 images of {c.data.image_size}x\
{c.data.image_size} pixels out.

```python
{LOADING["generator"].format(out=out, **point)}
```

The folder is also a Stable Diffusion checkpoint in the diffusers layout, with the UNet that the Class-Encoder steers.

Classes: {", ".join(c.data.class_names)}.

{_method(c, point)}

## CAS

{cas} (table 1, row "{row}").

## Licence

{_licence(c)}

## Limits

{_limits(c)}
"""


def _method(course: Course, point: dict[str, Any]) -> str:
    s = course.settings
    settings = {
        "trained on": s.dataset, "backbone": s.backbone, "recipe": s.recipe, "seed": s.seed, "sampler": s.sampler,
        "inference steps (IS)": point["IS"], "guidance scale (UGS)": round(point["UGS"], 4),
        "unconditional context": s.unconditional, "epoch of the Class-Encoder": point["transfer_epoch"],
        "epoch of the UNet": point["finetune_epoch"] or "not fine-tuned", "searched on": f"real {s.select_on} images",
        **{f"changed: {name}": getattr(s, name) for name in s.given if name != "backbone"},
    }  # fmt: skip
    return f"""## Method and settings

*Stable Diffusion Dataset Generation for Downstream Classification Tasks* ([arXiv 2405.02698]({PAPER})), by `sdgen`: a
Class-Encoder in the text encoder's place, the number of steps and the guidance searched for the best CAS, the UNet
fine-tuned, and searched again.

| setting | value |
|---|---|
{_rows(settings)}"""


def _cas(course: Course, multiple: int) -> str:
    rows = runs.load_json(course.run.path / "table_2.json", {})
    shown = {f"generated, x{multiple}": rows.get(f"x{multiple}"), "real": rows.get("real")}
    table = {name: _percent(row["test"]) if row else "not measured in this run" for name, row in shown.items()}
    chosen = course.settings.select_on
    note = "" if chosen == "val" else "\n\nThe search selected on these same TEST images: the numbers flatter."
    return f"| trained on | accuracy on real test images |\n|---|---|\n{_rows(table)}{note}"


def _licence(course: Course) -> str:
    s = course.settings
    name = s.dataset.lower().split(":")[0]
    source = DATA_LICENCES.get(name, UNKNOWN)
    if name in data_named.names() and (flag := name.split("_")[0]) in data_named.MEDMNIST:
        import medmnist  # slow, and makes a folder in the home: see `data_named`

        source = medmnist.INFO[flag]["license"]
    return f"""No licence is granted here. What was made from others' work stays under their terms:

- the training data, {s.dataset}: {source};
- the pretrained model, {s.backbone}: {backbone_files.LICENCES.get(s.backbone.partition("@")[0], UNKNOWN)}."""


def _limits(course: Course) -> str:
    return f"""- Made from {len(course.data.train)} real training images. A diffusion model can come close \
to single ones: before publishing, check private data for near copies.
- Drawn at the model's own size and resized to {course.data.image_size}x{course.data.image_size} pixels: \
no finer detail is in it."""


def _rows(table: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in table.items())


def _percent(values: Sequence[float]) -> str:
    classifiers = "one classifier" if len(values) == 1 else f"{len(values)} classifiers"
    return f"{report.percent(values)} % ({classifiers})"


def _size_category(count: int) -> str:
    """The Hub's name for a number of images."""
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if count < limit:
            return name
    return "1M<n<10M"
