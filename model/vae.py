"""The autoencoder of Stable Diffusion (arXiv 2112.10752): pictures to a latent Gaussian, latents back to pictures.

Modules carry the names of the public `vae/diffusion_pytorch_model.safetensors` (SD 1.x, 2.x and XL share the layout).
Neither `encode` nor `decode` applies `config.scaling_factor`: what is diffused is scaling_factor * z, and the caller
says so where it diffuses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.files.config import config_from, read_json, refuse
from model.files.errors import CheckpointError
from model.files.tensors import load

EPS = 1e-6  # of every GroupNorm here; the U-Net's resnets have 1e-5

# What other VAEs (Flux's, SD 3's) set otherwise. SD's have these values, leave them out, or say null.
FIXED = {
    "act_fn": "silu",
    "down_block_types": "DownEncoderBlock2D",
    "mid_block_add_attention": True,
    "shift_factor": 0,
    "up_block_types": "UpDecoderBlock2D",
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


@dataclass(frozen=True)
class VAEConfig:
    """The fields of the public vae/config.json that change a number. Raises CheckpointError for a bad scale."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # absent from SD 1.x's own file

    def __post_init__(self):
        if not 0 < self.scaling_factor < math.inf:
            raise CheckpointError(f"scaling_factor is {self.scaling_factor} and should be a number above 0")


class VAE(nn.Module):
    """A convolutional autoencoder with a diagonal Gaussian bottleneck, `downscale` times smaller on each side."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32, variant: str | None = None) -> VAE:
        """The VAE of a checkpoint's `vae` folder, frozen, on the CPU; `variant`: as for `find_weights`.

        Raises CheckpointError if config.json asks for another kind of VAE, or if a tensor does not fit.
        """
        path = Path(folder) / "config.json"
        values = read_json(path)
        refuse(values, FIXED, path)
        config = config_from(VAEConfig, values, path)
        return load(cls, config, folder, dtype, rename_old_attention, variant)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean and log variance of z, each (B, 4, H/8, W/8), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # exp of an untrained logvar would overflow

    def decode(self, latents: Tensor) -> Tensor:
        """latents z (B, 4, h, w), unscaled -> images (B, 3, 8h, 8w), in [-1, 1] up to a little overshoot."""
        return self.decoder(self.post_quant_conv(latents))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, config.layers_per_block, groups, downsample=i < last)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 8, H/8, W/8): the mean's channels, then the log variance's."""
        x = self.conv_in(images)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups, upsample=i < last)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 8h, 8w)."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(channels if i else in_channels, channels, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Downsample(channels)] if downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H/2, W/2)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, layers: int, groups: int, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(channels if i else in_channels, channels, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([Upsample(channels)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, 2H, 2W)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class ResNet(nn.Module):
    def __init__(self, in_channels: int, channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C, H, W)."""
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)))
        x = self.conv2(F.silu(self.norm2(x)))
        return residual + x


class Attention(nn.Module):
    """One head as wide as the map, over all its positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](attended), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H/2, W/2), rounded down."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: symmetric padding shifts the picture


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The attention of files written before 2023 (every original SD upload) under its present names.

    query, key, value, proj_attn become to_q, to_k, to_v, to_out.0; a weight stored as a 1x1 convolution (C, C, 1, 1)
    becomes the matrix (C, C) it is. Other tensors, and files that have the present names, are returned as they are.
    """
    present = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            module, _, last = name.rpartition(".")
            parent, _, layer = module.rpartition(".")
            name = f"{parent}.{present.get(layer, layer)}.{last}"
            if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
                tensor = tensor[:, :, 0, 0]
        renamed[name] = tensor
    return renamed
