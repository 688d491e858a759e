"""A tiny random base model and a tiny subject on disk, for the tests of the commands: a whole run takes a second."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from model import align, clip, unet, vae
from model.files.config import config_from
from model.files.write import save_tensors
from subject import TRAINING_PROMPTS
from toy import networks

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = networks.UNET_CONFIG | {
    "block_out_channels": [16, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 4,
    "in_channels": 4,  # as Stable Diffusion's; weights/toy has 8
    "out_channels": 4,
    "sample_size": 8,
}
VAE = networks.VAE_CONFIG | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}


def text_encoder(vocab_size: int) -> dict:
    config = networks.text_encoder_config(networks.clip_config(vocab_size, vocab_size - 1))
    return config | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}


def reward(vocab_size: int) -> dict:
    config = networks.align_config(vocab_size) | {"projection_dim": 24}
    config["text_config"] |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    stages = {"kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2]}
    stages |= {"num_block_repeats": [1, 1], "expand_ratios": [1, 2]}
    config["vision_config"] |= stages
    return config


def write_base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """A base in the public layout, ALIGN in reward/, that draws 16 px pictures of nothing."""
    prompts = [p.format(V="", noun="dog") for kind in TRAINING_PROMPTS.values() for p in kind]
    networks.write_clip_tokenizer([prompts] * 30, folder / "tokenizer")
    networks.write_bert_tokenizer([prompts], folder / "reward")
    networks.write_scheduler(folder)
    scheduler = networks.SCHEDULER | {"prediction_type": prediction_type}
    networks.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)

    torch.manual_seed(0)
    text = text_encoder(len(json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))))
    look = reward(len((folder / "reward" / "vocab.txt").read_text(encoding="utf-8").splitlines()))
    autoencoder = vae.VAE(config_from(vae.VAEConfig, VAE))
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight *= 10  # else every picture is the same grey
    size = {"height": 16, "width": 16}
    pictures = networks.PREPROCESSORS["align"] | {"size": size, "crop_size": size}
    denoiser = unet.UNet(config_from(unet.UNetConfig, UNET))
    encoder = clip.CLIPTextEncoder(config_from(clip.CLIPTextConfig, text))
    eyes = align.ALIGN(config_from(align.ALIGNConfig, look))
    networks.write_part(folder / "unet", UNET, denoiser.state_dict(), WEIGHTS)
    networks.write_part(folder / "vae", VAE, autoencoder.state_dict(), WEIGHTS)
    networks.write_part(folder / "text_encoder", text, encoder.state_dict(), "model.safetensors")
    networks.write_part(folder / "reward", look, eyes.state_dict(), "model.safetensors", pictures)
    return folder


def write_metrics(folder, tokenizer):
    """A random CLIP and a random ViT as transformers saves them, with sizes at which no resize is the identity."""
    vocab = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    end = vocab["<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": len(vocab), "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    vision = small | {"image_size": 24, "patch_size": 8}
    torch.manual_seed(1)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    dino = transformers.ViTModel(transformers.ViTConfig(**vision), add_pooling_layer=False)
    with torch.no_grad():  # the libraries' first weights are so small that all features are alike
        for name, parameter in [*clip.named_parameters(), *dino.named_parameters()]:
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.copy_(torch.randn(parameter.shape) / parameter[0].numel() ** 0.5)
        clip.text_projection.weight.neg_()  # with this seed most cosines of a picture and a text are then above 0
    clip.save_pretrained(folder / "clip")
    dino.save_pretrained(folder / "dino")
    shutil.copytree(tokenizer, folder / "clip", dirs_exist_ok=True)
    square = {"height": 24, "width": 24}
    sizes = {"clip": {"size": {"shortest_edge": 24}, "crop_size": square}, "dino": {"size": square}}
    for name, size in sizes.items():
        networks.write_json(folder / name / "preprocessor_config.json", networks.PREPROCESSORS[name] | size)


def write_photos(folder: Path, count: int = 3) -> Path:
    """Random pictures, as the photos of a subject."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for i in range(count):
        pixels = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((20, 20), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


def write_ckpt(base: Path, path: Path, factor: float = 1.5, /, **header: str) -> Path:
    """As train.py writes it: a U-Net with other weights than the base's, and a header."""
    tensors = {name: tensor.float() * factor for name, tensor in load_file(base / "unet" / WEIGHTS).items()}
    facts = {"base": str(base), "token": "[V]", "noun": "dog", "live": "True", "step": "40", "guidance": "3.0"}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path, facts | header)
    return path


def parameters(path: Path) -> dict[str, str]:
    """What a picture's file says of it, as A1111 reads it: its "prompt", and its settings by name."""
    with Image.open(path) as picture:
        *lines, settings = picture.text["parameters"].split("\n")
    assert lines.pop() == "Negative prompt:"
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', settings)
    return {"prompt": "\n".join(lines)} | {k: json.loads(v) if v.startswith('"') else v for k, v in pairs}


def call(module, monkeypatch, *arguments) -> int:
    """What `python MODULE.py arguments` would exit with, in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        return module.main()
    except SystemExit as error:
        return error.code


def error_line(capsys) -> str:
    """The one line on stderr of a command that refused its input."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "error: " in lines[0] and "Traceback" not in lines[0]
    return lines[0]


def files_in(folder: Path) -> list[str]:
    """Every file and folder below `folder`, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
