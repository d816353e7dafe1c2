"""Folders of the true Stable Diffusion layout, offline: loading, prediction types, every step; the Hub's failures."""

import json
import shutil

import httpx
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import errors

from sdgen_lib.config import settings
from sdgen_lib.course import Course
from sdgen_lib.diffusion import backbone
from sdgen_lib.diffusion import weights as weight_files
from sdgen_lib.diffusion.conditions import Condition
from sdgen_lib.diffusion.loss import add_noise, diffusion_loss

from . import sd_layout


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def folder(request, tmp_path_factory):
    return sd_layout.write(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="session")
def velocity_folder(tmp_path_factory):
    return sd_layout.write(tmp_path_factory.mktemp("models") / "v", "sd2", "v_prediction")


def load(folder, precision="fp32"):
    return backbone.load(str(folder), device="cpu", precision=precision)


def a_batch(model, count=2):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(count, *model.latent_shape, generator=generator)
    context = torch.randn(count, model.tokens, model.width, generator=generator)
    return latents, torch.tensor([10, 700][:count]), Condition(context)


def test_it_loads_as_the_stock_pipeline_does(folder):
    model = load(folder)
    stock = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)
    assert (model.tokens, model.width) == (77, stock.unet.config.cross_attention_dim)
    assert model.image_size == 128 and model.latent_shape == (4, 16, 16)  # the paper's 128, not the model's 512
    assert model.vae.config.scaling_factor == 0.18215 and model.prediction == "epsilon"
    latents, t, condition = a_batch(model)
    with torch.no_grad():
        theirs = stock.unet(latents, t, encoder_hidden_states=condition.context).sample
        torch.testing.assert_close(model.predict_noise(latents, t, condition), theirs)
    prompts = ["cat", "a cat and more"]
    theirs, _ = stock.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    torch.testing.assert_close(model.text_context(prompts), theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.alphas_cumprod, stock.scheduler.alphas_cumprod)


def test_half_precision_files_are_taken_where_they_suffice(tmp_path):
    sd_layout.write(tmp_path, "sd2")
    both = sd_layout.write(tmp_path, "sd2", variant="fp16")
    assert set(weight_files.find(str(both), half=True).variants.values()) == {"fp16"}
    assert set(weight_files.find(str(both), half=False).variants.values()) == {None}
    (both / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert weight_files.find(str(both)).variants == {"unet": "fp16", "vae": None, "text_encoder": None}
    exact, rough = load(both), load(both, "bf16")
    assert exact.unet.dtype == torch.float32 and rough.unet.dtype == torch.bfloat16
    batch = a_batch(exact)
    with torch.no_grad():
        error = (exact.predict_noise(*batch) - rough.predict_noise(*batch)).abs().mean()
    assert 0 < error < 0.05


# --- v-prediction ---


def test_the_noise_of_a_velocity_model(velocity_folder):
    """diffusers' scheduler, told that the model predicts v, makes the same x_0 of its raw output."""
    model = load(velocity_folder)
    assert model.prediction == "v_prediction"
    scheduler = DDIMScheduler.from_pretrained(velocity_folder, subfolder="scheduler")
    scheduler.set_timesteps(1000)
    latents, _, condition = a_batch(model, 1)
    for t in (10, 700, 999):
        with torch.no_grad():
            raw = model.unet(latents, torch.tensor([t]), encoder_hidden_states=condition.context).sample
            noise = model.predict_noise(latents, torch.tensor([t]), condition)
        expected = scheduler.step(raw, t, latents).pred_original_sample
        alpha_bar = model.alphas_cumprod[t]
        found = (latents - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_the_loss_of_a_velocity_model_is_that_of_v(velocity_folder):
    model = load(velocity_folder)
    latents, t, condition = a_batch(model)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    scheduler = DDIMScheduler.from_pretrained(velocity_folder, subfolder="scheduler")
    with torch.no_grad():
        rest = (t, noise, model.alphas_cumprod, model.loss_weight(t))
        found = diffusion_loss(model.predict_noise, latents, condition, *rest)
        noisy = add_noise(latents, noise, model.alphas_cumprod[t])
        raw = model.unet(noisy, t, encoder_hidden_states=condition.context).sample
    expected = torch.nn.functional.mse_loss(raw, scheduler.get_velocity(latents, noise, t))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


# --- the whole course on them ---


SMALL = dict(
    dataset="digits:20",
    lora_rank=4,
    transfer_epochs=1,
    finetune_epochs=2,
    num_images=10,
    n_trials=2,
    steps_min=2,
    steps_max=3,
    default_steps=2,
    classifier_seeds=1,
    classifier_epochs=1,
    max_multiple=1,
    keep_unets="used",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "prediction", "method"),
    [("sd1", "epsilon", "full"), ("sd2", "v_prediction", "full"), ("sd2", "epsilon", "lora")],
)
def test_every_step_runs(micro, tmp_path, kind, prediction, method):
    small = sd_layout.write(tmp_path / "model", kind, prediction)
    # Latents of 8 a side instead of 16: the layout is what is tested, not the size.
    config = json.loads((small / "unet" / "config.json").read_text())
    (small / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 8}))
    run = Course(micro(tmp_path / "runs", backbone=str(small), finetune_method=method, **SMALL))
    rows, sets = {row: run.cas(row) for row in ("after 1", "after 4")}, run.scaling()
    assert set(sets) == {"real", "x1"} and all(0 <= row["test"][0] <= 1 for row in rows.values())
    checkpoints = sorted((run.run.path / "3_finetune").rglob("epoch_*"))
    sizes = [path.stat().st_size for path in checkpoints]
    unet = sum(p.numel() for p in run.backbone.unet.parameters())
    assert 1 <= len(sizes) <= 2
    assert all(size < 0.5 * unet if method == "lora" else 2 * unet < size < 2.5 * unet for size in sizes)


# --- what is refused ---


def test_an_inpainting_model_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    with pytest.raises(ValueError, match="9 input channels.*text-to-image.*inpainting"):
        load(tmp_path / "model")


SCHEDULES = [
    ({"prediction_type": "sample"}, "predicts 'sample'; 'epsilon' and 'v_prediction' work"),
    ({"rescale_betas_zero_snr": True}, "ends without any signal"),
]


@pytest.mark.parametrize(("changes", "message"), SCHEDULES)
def test_a_schedule_that_does_not_fit(folder, tmp_path, changes, message):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model")


class Hub:
    """Stands for the Hub: a folder of its files; counts what is fetched."""

    def __init__(self, tmp_path, source):
        self.source, self.cache, self.fetched = source, tmp_path / "snapshots" / ("c0ffee" * 7)[:40], []

    def fetch(self, name):
        if not (self.source / name).exists():
            raise errors.EntryNotFoundError(name)
        self.fetched.append(name)
        (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.source / name, self.cache / name)
        return str(self.cache / name)

    def snapshot_download(self, repository, revision=None, allow_patterns=()):
        self.asked = (repository, revision)
        for path in self.source.rglob("*"):
            name = path.relative_to(self.source)
            if path.is_file() and any(name.match(pattern) for pattern in allow_patterns):
                self.fetch(str(name))
        return str(self.cache)

    def hf_hub_download(self, repository, name, revision=None):
        assert revision == self.cache.name  # all of one commit
        return self.fetch(name)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    hub = Hub(tmp_path, folder)
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(huggingface_hub, name, getattr(hub, name))
    return hub


@pytest.mark.parametrize("name", ["sd2", "sd2@fp16-branch", "sd2.1", "sd1.4", "someone/their-model"])
def test_names_revisions_and_what_is_downloaded(hub, name):
    model = backbone.load(name, device="cpu", precision="bf16")
    plain, _, revision = name.partition("@")
    assert hub.asked[0] == weight_files.NAMES.get(plain, plain)
    assert model.source.revision == hub.cache.name and len(model.source.revision) == 40
    assert model.fingerprint == weight_files.fingerprint(
        weight_files.Source(None, model.source.variants, hub.cache.name)
    )
    weights = [name for name in hub.fetched if name.endswith(".safetensors")]
    assert len(weights) == 3 and not any(name.endswith((".bin", ".ckpt", ".pt")) for name in hub.fetched)
    assert model.image_size == 128


def test_the_revision_is_asked_for(hub, monkeypatch):
    asked, snapshot = [], huggingface_hub.snapshot_download

    def download(repository, revision=None, **options):
        asked.append(revision)
        return snapshot(repository, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    weight_files.find("sd2@1a2b3c")
    assert asked == ["1a2b3c"]


def of_status(kind, status):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("no", response=response)


ANSWERS = [
    (of_status(errors.GatedRepoError, 403), "accept a licence at https://huggingface.co/CompVis.*log in"),
    (of_status(errors.RepositoryNotFoundError, 404), "there is no model at https://huggingface.co/CompVis"),
    (of_status(errors.RevisionNotFoundError, 404), "has no revision 'main2'"),
    (errors.LocalEntryNotFoundError("offline"), r"the Hub was not reached and the cache does not hold it \(offline\)"),
    (errors.EntryNotFoundError("unet/model"), "lacks a file that is needed"),
    (ConnectionError("name resolution"), "the Hub was not reached.*name resolution"),
]


@pytest.mark.parametrize(("error", "message"), ANSWERS, ids=lambda value: type(value).__name__)
def test_what_the_hub_may_answer(monkeypatch, error, message):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    ways_out = "put a copy in a folder and give its path, set HF_HOME.*backbone='tiny'"
    with pytest.raises(OSError, match=f"'sd1.4@main2': .*{message}.*{ways_out}"):
        backbone.load("sd1.4@main2")


def test_a_repository_without_safetensors(hub, tmp_path):
    hub.source = shutil.copytree(hub.source, tmp_path / "pickled")
    weights = hub.source / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="lacks a file that is needed .unet/diffusion_pytorch_model.safetensors"):
        backbone.load("someone/their-model")
    assert not any(name.endswith(".bin") for name in hub.fetched)


def test_settings_pin_a_revision():
    assert settings.resolve(backbone="sd2@abc", recipe="paper").backbone == "sd2@abc"
