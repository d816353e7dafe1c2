"""Cards: the README.md of what is taken away, with the YAML header that the Hugging Face Hub reads.

What they say was used is read from the run's records, see `origin`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from ..data import ImageData, named
from ..diffusion import weights
from ..show.names import printable
from ..show.tables import BY_TEST_IMAGES, percent, standard_error, taught_too_little
from ..store.run import Result
from .origin import Origin

PAPER = "https://arxiv.org/abs/2405.02698"
INVERSION_PAPER = "https://arxiv.org/abs/2305.15316"
DATA_LICENCES = {
    "digits": "CC BY 4.0 (Optical Recognition of Handwritten Digits, UCI repository)",
    **dict.fromkeys(named.CIFAR, "none stated by its authors"),
}
UNKNOWN = "see where it came from"
# Characters with which markup begins; "_" only at the edge of a word, so that settings keep their names.
MARKUP = re.compile(r"[&<>|`*\[\]\\$~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?i:(?<=http)|(?<=https)):|(?i:(?<=www))\.")
LOADING = {  # a text in it is written as Python writes one: a folder may be called anything
    "folder": """from torchvision.datasets import ImageFolder

train = ImageFolder({part})""",
    "npz": """import numpy as np

with np.load({file}, allow_pickle=False) as file:
    train_images, train_labels = file["train_images"], file["train_labels"]""",
    "parquet": """from datasets import load_dataset

train = load_dataset({folder}, split="train")""",
    "generator": """import sdgen_lib

generator = sdgen_lib.load({folder})
images = generator([0, 1, 0], num_inference_steps={steps}, guidance_scale={guidance:.2f})  # uint8 (3, 3, H, W)""",
}
# What the steps of the paper's method did, for those that something was made from.
STEPS = {
    "1_transfer": "a Class-Encoder in the text encoder's place",
    "2_tune": "the number of inference steps and the guidance searched for the best CAS",
    "3_finetune": "the UNet fine-tuned",
    "4_retune": "the search repeated",
}
SHOWN = {  # of a point and of the settings used, where there are such
    "num_inference_steps": "inference steps (IS)",
    "guidance_scale": "guidance scale (UGS)",
    "sampler": "sampler",
    "unconditional": "unconditional context",
    "transfer_epoch": "epoch of the Class-Encoder",
    "finetune_epoch": "epoch of the UNet",
    "select_on": "real images that the search chose with",
    "class_mix": "class mix",
}


def dataset_card(
    origin: Origin,
    data: ImageData,
    measured: Mapping[str, Result | None],
    *,
    form: str,
    out: str,
    multiple: int,
    counts: Mapping[str, int],
    folders: Sequence[str],
    header: Mapping[str, Any],
    kept: str = "",
) -> str:
    """The card of a generated set of ``multiple`` times the real one's size, in folder ``out``.

    ``data``: the real images. ``measured``: the rows of the CAS table, by what they are trained on. ``form``: of
    `formats.WRITERS`. ``counts``: images of each part. ``folders``: the classes' folder names. ``kept``: the filter.
    """
    yaml = DatasetCardData(
        pretty_name=f"{origin.dataset}, drawn by sdgen (x{multiple})",
        license="other",
        task_categories=["image-classification"],
        tags=["synthetic", "diffusion", "sdgen"],
        size_categories=[_size_category(sum(counts.values()))],
        **header,
    ).to_yaml()
    mix = "as many of each class" if origin.settings.get("class_mix") == "balanced" else "with its class counts"
    size = f"{multiple} times the real training set, {mix}."
    if kept:
        size = f"what the filter `{kept}` (score, share of each class) kept of a set drawn like the real training set."
    real = "`val` and `test` are **real** images, copied unchanged from the source, to choose and to measure with."
    classes = zip(range(data.num_classes), data.class_names, folders)
    return f"""---
{yaml}
---
# {_cell(origin.dataset)}, drawn by a diffusion model

{counts["train"]} **generated** training images of {data.image_size}x{data.image_size} pixels in \
{data.num_classes} classes: {size} \
{real if len(counts) > 1 else "No real image is in it."}

{_table(("part", "images"), counts.items())}

```python
{_loading(form, out, data)}
```

{_method(origin)}

`records.csv` has a row for each generated image, in order: its class number, its place in the set and the set's seed, \
which together give its starting noise; which real training images it was drawn from, by their rows, if any; and its \
scores by a classifier of real images, where these were measured.

## CAS

The accuracy on real test images of a classifier trained on the generated images alone.

{_cas(origin, data, measured)}

## Licence

{_licence(origin)}

## Limits

{_limits(origin, data)}
- The pictures repeat what the model believes of a class. Rare kinds within a class are likely to be missing.
- Not for diagnosis, and not evidence of how a classifier does on images of another source.

## Classes

{_table(("label", "class", "folder name"), classes)}
"""


def generator_card(
    origin: Origin, data: ImageData, measured: Result | None, *, out: str, point: Mapping[str, float]
) -> str:
    """The card of a saved generator in folder ``out``.

    ``measured``: its row of table 1. ``point``: its own "steps" and "guidance".
    """
    yaml = ModelCardData(
        license="other",
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["class-conditional", "sdgen"],
    ).to_yaml()
    images = f", {measured.facts['num_images']} images" if measured else ""
    told = "the class by a context of its own"
    if _inverted(origin):
        told = "a vector that was learned from one real training image of the class"
    return f"""---
{yaml}
---
# A generator of {_cell(origin.dataset)}, class by class

A latent diffusion model that is told {told}: labels in, uint8 images of {data.image_size}x\
{data.image_size} pixels out.

```python
{_loading("generator", out, data, **point)}
```

The folder is also a Stable Diffusion checkpoint in the diffusers layout, with the UNet that these contexts steer.

Classes: {_cell(", ".join(data.class_names))}.

{_method(origin)}

## CAS

The accuracy on real test images of a classifier trained on generated images alone.

{_cas(origin, data, {f"generated, {origin.row}{images}": measured})}

## Licence

{_licence(origin)}

## Limits

{_limits(origin, data)}
"""


def _inverted(origin: Origin) -> bool:
    """Whether it is drawn from vectors of training images."""
    return any(step.startswith("inversion/") for step in origin.steps)


def _loading(form: str, out: str, data: ImageData, **values: Any) -> str:
    """The lines of Python that load what lies in folder ``out``."""
    paths = {"folder": f"./{out}", "part": f"./{out}/train", "file": f"./{out}/{data.slug}.npz"}
    return LOADING[form].format(**{name: _quoted(path) for name, path in paths.items()}, **values)


def _quoted(text: str) -> str:
    """As Python writes a text, on one line, with nothing in it that cannot be seen."""
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in quoted)


def _method(origin: Origin) -> str:
    done = [text for step, text in STEPS.items() if step in origin.steps]
    how = f"Made by `sdgen`, with its generator {_cell(repr(origin.row))}."
    if done:
        how = (
            "*Stable Diffusion Dataset Generation for Downstream Classification Tasks* "
            f"([arXiv 2405.02698]({PAPER})), by `sdgen`, {_cell(origin.row)}: {', '.join(done)}."
        )
    if _inverted(origin):
        how = (
            "*Training on Thin Air: Improve Image Classification with Generated Data* "
            f"([arXiv 2305.15316]({INVERSION_PAPER})), by `sdgen`: Diffusion Inversion, a vector for each of the "
            "training images, disturbed and mixed."
        )
    known = {**origin.settings, **origin.point}
    rows = {
        "trained on": origin.dataset,
        "backbone": origin.backbone,
        "recipe": origin.recipe,
        "seed": origin.seed,
        **{text: known[name] for name, text in SHOWN.items() if known.get(name) is not None},
        **{name: value for name, value in origin.point.items() if name not in SHOWN},
        **{f"changed: {name}": value for name, value in origin.changed.items()},
    }
    shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in rows.items()}
    return f"## Method and settings\n\n{how}\n\n{_table(('setting', 'value'), shown.items())}"


def _cas(origin: Origin, data: ImageData, measured: Mapping[str, Result | None]) -> str:
    rows = [(name, *_accuracies(row)) for name, row in measured.items()]
    table = _table(("trained on", "accuracy", "balanced accuracy", BY_TEST_IMAGES), rows)
    largest = data.test.labels.bincount().max().item() / len(data.test)
    table += f"\n\nAlways naming the largest class would be right in {100 * largest:.1f} %."
    for line in taught_too_little({name: row.facts for name, row in measured.items() if row is not None}):
        table += f"\n\n{_cell(line)}"
    if origin.settings.get("select_on") == "test":
        table += "\n\nThe search selected on these same TEST images: the numbers flatter."
    return table


def _accuracies(row: Result | None) -> tuple[str, str, str]:
    if row is None:
        return "not measured in this run", "", ""
    count = len(row.facts["test"])
    classifiers = "one classifier" if count == 1 else f"{count} classifiers"
    mean, images = sum(row.facts["test"]) / count, row.facts.get("num_test")
    error = f"{100 * standard_error(mean, images):.1f}" if images else ""
    return f"{percent(row.facts['test'])} % ({classifiers})", f"{percent(row.facts['balanced_test'])} %", error


def _licence(origin: Origin) -> str:
    name = origin.dataset.lower().split(":")[0]
    source = DATA_LICENCES.get(name, UNKNOWN)
    if named.known(name) and (flag := name.split("_")[0]) in named.MEDMNIST:
        import medmnist  # slow, and makes a folder in the home: see `data.named`

        source = medmnist.INFO[flag]["license"]
    model = weights.LICENCES.get(origin.backbone.partition("@")[0], UNKNOWN)
    return f"""No licence is granted here. What was made from others' work stays under their terms:

- the training data, {_cell(origin.dataset)}: {_cell(source)};
- the pretrained model, {_cell(origin.backbone)}: {_cell(model)}."""


def _limits(origin: Origin, data: ImageData) -> str:
    private = """- **Privacy:** each image was drawn from a vector that was learned from one real training image, to \
predict just that image. Treat the vectors, and near copies among the images, as you would treat the real ones.
"""
    warning = private if _inverted(origin) else ""
    return f"""{warning}- Made from {len(data.train)} real training images. A diffusion model can come close \
to single ones: before publishing, check private data for near copies.
- Drawn at the model's own size and resized to {data.image_size}x{data.image_size} pixels: \
no finer detail is in it."""


def _table(head: Sequence[str], rows: Any) -> str:
    """Markdown; ``rows`` hold as many cells as ``head``."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: Any) -> str:
    """Text on one line that Markdown shows as it is: class names are the dataset's, and a card is a web page.

    What begins markup (a tag, a link or picture, stress, code, mathematics, the next cell) is written by its number.
    """
    text = MARKUP.sub(lambda found: f"&#{ord(found[0])};", printable(value))
    return text.replace("&#60;", "&lt;").replace("&#38;", "&amp;")


def _size_category(count: int) -> str:
    """The Hub's name for a number of images."""
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if count < limit:
            return name
    return "1M<n<10M"
