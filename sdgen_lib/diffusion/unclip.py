"""What an unCLIP model has beside a text-to-image one: an image encoder, and noise on what that encoder says.

Its UNet is told of an image by a vector [embedding, noise level], which an MLP adds to the embedding of the timestep
(Ramesh et al. 2022; diffusers' ``StableUnCLIPImg2ImgPipeline``). Nothing in particular is the vector of zeros.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from .weights import UNCLIP_PARTS

NOISING = dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=1000)  # of Stable unCLIP


@dataclasses.dataclass
class ImageEncoder:
    """Images -> embeddings -> what the UNet is told. Build it with `load_image_encoder`."""

    encoder: CLIPVisionModelWithProjection
    processor: CLIPImageProcessor
    normalizer: StableUnCLIPImageNormalizer
    alphas_cumprod: torch.Tensor  # float (1000,): of the noise on an embedding
    device: str

    @property
    def width(self) -> int:
        """d, the numbers of an embedding; the UNet is told 2 d."""
        return self.encoder.config.projection_dim

    @torch.no_grad()
    def embeddings(self, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
        """uint8 images (N, 3, h, w), any size -> float32 embeddings (N, d), on the device."""
        found = [torch.empty(0, self.width, device=self.device)]
        for part in images.split(batch_size) if len(images) else ():
            pixels = self.processor(images=list(part), return_tensors="pt", input_data_format="channels_first")
            found.append(self.encoder(pixels.pixel_values.to(self.device)).image_embeds.float())
        return torch.cat(found)

    def told(self, embeddings: torch.Tensor, noise_level: int | torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the UNet is told: noisy embeddings, and beside them the level of noise. (N, d) -> float32 (N, 2 d).

        ``noise_level``: 0..999, one for all or int64 (N,); ``noise`` float (N, d), standard normal. Level 0 still adds
        a little (standard deviation 0.0064 of the embeddings' own), as in diffusers' pipeline.
        """
        level = torch.as_tensor(noise_level, device=self.device).expand(len(embeddings))
        if len(level) and not 0 <= int(level.min()) <= int(level.max()) < len(self.alphas_cumprod):
            raise ValueError(
                f"noise_level must be from 0 to {len(self.alphas_cumprod) - 1}, not {int(level.min())} or "
                f"{int(level.max())}."
            )
        alpha_bar = self.alphas_cumprod[level][:, None]
        scaled = self.normalizer.scale(embeddings.to(self.device))
        noisy = self.normalizer.unscale(alpha_bar.sqrt() * scaled + (1 - alpha_bar).sqrt() * noise.to(self.device))
        stated = get_timestep_embedding(level, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([noisy, stated], 1)


def load_image_encoder(folder: Path, device: str) -> ImageEncoder:
    """Reads ``UNCLIP_PARTS`` from a diffusers folder. Raises FileNotFoundError for a model that has none: no unCLIP."""
    if missing := [part for part in UNCLIP_PARTS if not (folder / part).is_dir()]:
        raise FileNotFoundError(
            f"{folder} is no unCLIP model: its {', '.join(missing)} are missing. Use backbone='tiny-unclip' or "
            "'sd2.1-unclip', or a folder that diffusers' StableUnCLIPImg2ImgPipeline opens."
        )
    encoder = CLIPVisionModelWithProjection.from_pretrained(
        folder, subfolder="image_encoder", use_safetensors=True, dtype=torch.float32
    )
    normalizer = StableUnCLIPImageNormalizer.from_pretrained(folder, subfolder="image_normalizer", use_safetensors=True)
    noising = DDPMScheduler.from_pretrained(folder, subfolder="image_noising_scheduler")
    return ImageEncoder(
        encoder.requires_grad_(False).eval().to(device),
        CLIPImageProcessor.from_pretrained(folder, subfolder="feature_extractor"),
        normalizer.requires_grad_(False).to(device),
        noising.alphas_cumprod.to(device),
        device,
    )
