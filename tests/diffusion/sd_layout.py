"""Writes folders of Stable Diffusion's own layout: the real structure, with narrow layers and random weights."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

DOWN = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
UP = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
# What differs between the two families. SD 1.x: 8 heads everywhere, convolutions around the attention, CLIP ViT-L's
# last layer. SD 2.x: heads of 64 channels (16 here), linear layers around the attention, OpenCLIP-H, "!" as padding.
KINDS = {
    "sd1": dict(
        unet=dict(attention_head_dim=8, cross_attention_dim=48, use_linear_projection=False),
        text=dict(hidden_act="quick_gelu", projection_dim=48, hidden_size=48, num_attention_heads=4),
        pad="<|endoftext|>",
    ),
    "sd2": dict(
        unet=dict(attention_head_dim=[2, 4, 4, 4], cross_attention_dim=64, use_linear_projection=True),
        text=dict(hidden_act="gelu", projection_dim=32, hidden_size=64, num_attention_heads=4),
        pad="!",
    ),
}
SCHEDULER = dict(
    _class_name="PNDMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
    clip_sample=False,
)
UNET = dict(
    sample_size=64, block_out_channels=(32, 64, 64, 64), layers_per_block=2, down_block_types=DOWN, up_block_types=UP
)
VAE = dict(
    block_out_channels=[32] * 4,
    layers_per_block=2,
    latent_channels=4,
    sample_size=512,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
)
TEXT = dict(
    vocab_size=192,
    intermediate_size=64,
    num_hidden_layers=2,
    max_position_embeddings=77,
    bos_token_id=190,
    eos_token_id=191,
)


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokenizer(folder: Path, pad: str) -> None:
    """vocab.json and merges.txt as CLIP's: bytes, bytes that end a word, a merge, the two special tokens."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    pieces = [*letters, *(f"{c}</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token=pad)
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True},
    )


def write(folder: Path, kind: str = "sd2", prediction: str = "epsilon", variant: str | None = None) -> Path:
    """A pipeline folder of ``kind`` "sd1" or "sd2"; ``variant`` "fp16" writes weights under that name, in float16."""
    parts, dtype = KINDS[kind], torch.float16 if variant else torch.float32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**UNET, **parts["unet"])
        vae = AutoencoderKL(**VAE)
        text = CLIPTextModel(CLIPTextConfig(**TEXT, **parts["text"]))
    for name, part in (("unet", unet), ("vae", vae)):
        part.to(dtype).save_pretrained(folder / name, variant=variant)
    text.to(dtype).save_pretrained(folder / "text_encoder", variant=variant)
    write_tokenizer(folder / "tokenizer", parts["pad"])
    v = {"prediction_type": "v_prediction", "_class_name": "DDIMScheduler"} if prediction == "v_prediction" else {}
    write_json(folder / "scheduler" / "scheduler_config.json", {**SCHEDULER, **v})
    classes = {
        "scheduler": ["diffusers", v.get("_class_name", "PNDMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.8.0", **classes}
    write_json(folder / "model_index.json", index)
    return folder
