"""A trained generator: saved as one folder, loaded and used without the run it came from.

The folder is a Stable Diffusion checkpoint in the diffusers layout, with the generator's own UNet in it. Beside it lie
``conditioner.safetensors``, the context of each class and the unconditional one, and ``generator.json``: class names,
where and how it samples, what it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from ..config.messages import shown
from ..config.settings import FIELDS
from ..data.parts import check_class_names
from ..data.sources import IMAGE_SIZES
from ..diffusion import backbone as backbones
from ..diffusion.backbone import Backbone
from ..diffusion.conditions import ContextTable
from ..diffusion.generator import Generator, LatentGenerator
from ..diffusion.samplers import SAMPLERS
from ..store import files

FACTS, CONDITIONER, CLASS_ENCODER = "generator.json", "conditioner.safetensors", "class_encoder.safetensors"
# Of the folder: 1 held a Class-Encoder's weights where 2 has what it makes of each class; 3 has a vector for each
# training image instead (Diffusion Inversion). Each is written as the oldest one that can hold it.
FORMAT = 3

MOST_GUIDANCE = FIELDS["default_guidance"].metadata["high"]

# What is read of `FACTS`, and what each value must be.
READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (
        lambda v: isinstance(v, list) and v != [] and all(isinstance(n, str) for n in v) and len(set(v)) == len(v),
        "a list of different texts",
    ),
    "num_inference_steps": (lambda v: type(v) is int and 1 <= v <= 1000, "a whole number from 1 to 1000"),
    "guidance_scale": (lambda v: type(v) in (int, float) and 0 <= v <= MOST_GUIDANCE, f"from 0 to {MOST_GUIDANCE:g}"),
    "sampler": (lambda v: isinstance(v, str) and v in SAMPLERS, f"one of {', '.join(SAMPLERS)}"),
    "antialias": (lambda v: isinstance(v, bool), "true or false"),
    "image_size": (lambda v: type(v) is int and v in IMAGE_SIZES, "a whole number from 8 to 1024"),
}
READ_OF_FORMAT_1: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tokens": (lambda v: type(v) is int and v > 0, "a whole number above 0"),
    "rank": (lambda v: v is None or (type(v) is int and v > 0), "null or a whole number above 0"),
    "unconditional": (lambda v: v in ("zero", "empty_prompt", "class_mean"), "zero, empty_prompt or class_mean"),
}
VECTOR_TENSORS = ("vectors", "labels", "groups", "unconditional_contexts", "unconditional_of_vector")
READ_OF_FORMAT_3: dict[str, tuple[Callable[[Any], bool], str]] = {
    "noise": (lambda v: type(v) in (int, float) and 0 <= v <= 1e6, "a number from 0 to 1e6"),
    "interpolation": (lambda v: type(v) in (int, float) and 0 <= v <= 1, "a number from 0 to 1"),
    "partners": (lambda v: v in ("class", "released"), "class or released"),
}
READ_OF_FORMAT = {1: READ_OF_FORMAT_1, 2: {}, 3: READ_OF_FORMAT_3}


# --- saving ---


def save(generator: Generator, folder: str | Path, facts: Mapping[str, Any]) -> None:
    """Writes ``generator`` into ``folder``, which exists and is empty.

    ``facts``: what else `FACTS` is to say, as JSON can hold it: what the generator was trained on, with which settings.
    Weights are float32 safetensors, so that its images are the run's, bit for bit on the same machine.
    Raises ValueError for a generator whose condition is neither one fixed context for each class nor a vector for each
    training image.
    """
    folder = Path(folder)
    told, tensors = _told(generator)
    _save_pipeline(generator, folder)
    files.save_tensors(folder / CONDITIONER, tensors)
    own = {
        **told,
        "class_names": list(generator.class_names),
        "num_inference_steps": generator.num_inference_steps,
        "guidance_scale": generator.guidance_scale,
        "sampler": generator.sampler,
        "antialias": generator.antialias,
        "image_size": generator.image_size or generator.backbone.image_size,
        "fingerprint": generator.fingerprint,
    }
    files.save_json(folder / FACTS, {**facts, **own})


def _told(generator: Generator) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What its images are told, as facts and as tensors: a context for each class, or a vector for each image."""
    from ..methods.inversion import InvertedImages

    conditioner = getattr(generator, "conditioner", None)
    if not isinstance(conditioner, ContextTable) and callable(getattr(conditioner, "table", None)):
        conditioner = conditioner.table()
    if isinstance(generator, LatentGenerator) and isinstance(conditioner, ContextTable):
        return {"format": 2}, {"contexts": conditioner.contexts.float(), "empty": conditioner.empty.float()}
    if isinstance(generator, LatentGenerator) and isinstance(conditioner, InvertedImages):
        facts = {name: getattr(conditioner, name) for name in READ_OF_FORMAT_3}
        return {"format": 3, **facts}, {name: getattr(conditioner, name) for name in VECTOR_TENSORS}
    told = type(generator if conditioner is None else conditioner).__name__
    raise ValueError(
        "Only a generator with one fixed context for each class, or with a vector for each training image, can be "
        f"saved, and {told} has neither."
    )


def _save_pipeline(generator: LatentGenerator, folder: Path) -> None:
    backbone = generator.backbone
    if generator.unet:
        backbone.set_unet(generator.unet[1](), torch.float32)  # the next `put_unet` puts it in place anew
    else:
        backbone.unet_dtype(torch.float32)
    try:
        StableDiffusionPipeline(
            vae=backbone.vae,
            unet=backbone.unet,
            text_encoder=backbone.text_encoder,
            tokenizer=backbone.tokenizer,
            scheduler=DDIMScheduler.from_pretrained(backbone.source.folder, subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)
    finally:
        backbone.unet_dtype(backbone.dtype)
    for path in folder.rglob("*.json"):
        _without_path(path)


def _without_path(path: Path) -> None:
    """Takes out of a model's configuration where on this machine it was read from."""
    config = files.load_json(path)
    if isinstance(config, dict) and {"_name_or_path", "name_or_path"} & set(config):
        kept = {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}
        path.write_text(json.dumps(kept, indent=2) + "\n")


# --- loading ---


def load(folder: str | Path, device: str | None = None, precision: str = "auto") -> LatentGenerator:
    """The generator in ``folder``, as `save` left it; ``device`` and ``precision`` as `backbone.load`.

    Raises FileNotFoundError where the folder or a part of it is missing, and ValueError for one of a later format or
    one that is damaged. Nothing in the folder is ever changed.
    """
    folder = Path(folder).expanduser()
    if not (folder / FACTS).is_file():
        raise FileNotFoundError(
            f"{folder.absolute()} is no saved generator: it has no {FACTS}. "
            "Make one with: python -m sdgen_lib export RUN_FOLDER --to generator OUT"
        )
    facts = _facts(folder / FACTS)
    path = folder / (CLASS_ENCODER if facts["format"] == 1 else CONDITIONER)
    tensors = _tensors(path)  # before the backbone's gigabytes
    backbone = backbones.load(str(folder.absolute()), device, precision)
    read = {1: _table_of_class_encoder, 2: _table_of_contexts, 3: _inverted_images}[facts["format"]]
    return LatentGenerator(
        backbone,
        read(path, tensors, facts, backbone),
        tuple(facts["class_names"]),
        facts["num_inference_steps"],
        float(facts["guidance_scale"]),
        sampler=facts["sampler"],
        image_size=facts["image_size"],
        antialias=facts["antialias"],
        fingerprint=str(facts.get("fingerprint", "")),
    )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is damaged or not what sdgen wrote ({what}): copy the whole folder again.")


def _facts(path: Path) -> dict[str, Any]:
    """What `FACTS` says, checked. Raises ValueError, on one line, for anything that `load` cannot go by."""
    facts = files.load_json(path)
    if not isinstance(facts, dict):
        raise _damaged(path, "it is no JSON object")
    version = facts.get("format")
    if type(version) is not int or version < 1:
        raise _damaged(path, f'"format" is {shown(version)}')
    if version > FORMAT:
        raise ValueError(f"{path} is of format {version}; this version reads up to {FORMAT}: update sdgen.")
    for name, (is_right, what) in {**READ, **READ_OF_FORMAT[version]}.items():
        if not is_right(facts.get(name)):
            raise _damaged(path, f'"{name}" is {shown(facts.get(name))}, not {what}')
    check_class_names(tuple(facts["class_names"]), path)
    return facts


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole folder again.")
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _table_of_contexts(
    path: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, Any], backbone: Backbone
) -> ContextTable:
    contexts, empty = (tensors.get(name, torch.empty(0)).float() for name in ("contexts", "empty"))
    tokens = contexts.shape[1] if contexts.ndim == 3 and contexts.shape[1] else 1
    if contexts.shape != (len(facts["class_names"]), tokens, backbone.width) or empty.shape != (tokens, backbone.width):
        raise _damaged(path, "its contexts are not of these classes and this model")
    if not (torch.isfinite(contexts).all() and torch.isfinite(empty).all()):
        raise _damaged(path, "its contexts are not all finite numbers")
    return ContextTable(contexts.to(backbone.device), empty.to(backbone.device))


def _inverted_images(path: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, Any], backbone: Backbone):
    """Of a folder of format 3: an `InvertedImages`."""
    from ..methods.inversion import InvertedImages

    found = {name: tensors.get(name, torch.empty(0)) for name in VECTOR_TENSORS}
    vectors, away = found["vectors"], found["unconditional_contexts"]
    n, tokens = (len(vectors), vectors.shape[1]) if vectors.ndim == 3 else (0, 0)
    highest = {"labels": len(facts["class_names"]), "groups": n, "unconditional_of_vector": len(away)}
    right = n and tokens and vectors.shape[2] == backbone.width and away.shape[1:] == vectors.shape[1:]
    right = right and torch.isfinite(vectors).all() and torch.isfinite(away).all()
    for name, high in highest.items():
        numbers = found[name]
        right = right and numbers.dtype == torch.int64 and numbers.shape == (n,)
        right = right and 0 <= int(numbers.min()) <= int(numbers.max()) < high
    if not right:
        raise _damaged(path, "its vectors are not of these classes and this model")
    return InvertedImages(
        **{name: found[name].to(backbone.device) if found[name].ndim == 3 else found[name] for name in VECTOR_TENSORS},
        num_classes=len(facts["class_names"]),
        **{name: facts[name] for name in READ_OF_FORMAT_3},
    )


def _table_of_class_encoder(
    path: Path, tensors: dict[str, torch.Tensor], facts: Mapping[str, Any], backbone: Backbone
) -> ContextTable:
    """Of a folder of format 1."""
    from ..methods.class_encoder import ClassEncoder  # here: it brings Optuna, which format 2 needs not

    encoder = ClassEncoder(len(facts["class_names"]), facts["tokens"], backbone.width, rank=facts["rank"])
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        raise _damaged(path, "its weights are not of these classes and this model") from error
    kind = facts["unconditional"]
    empty = backbone.text_context([""])[0] if kind == "empty_prompt" else None
    if empty is not None and len(empty) != facts["tokens"]:
        raise _damaged(path, "the empty prompt has another number of tokens")
    return encoder.to(backbone.device).conditioner(kind, empty).table()
