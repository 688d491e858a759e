"""The autoencoder of Stable Diffusion (arXiv 2112.10752): an image to a latent Gaussian, latents back to an image.

Modules carry the names of the public `vae/diffusion_pytorch_model.safetensors`. `encode` and `decode` do not apply
`config.scaling_factor`: the U-Net sees scaling_factor * z, so the caller multiplies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.files.config import read_config
from model.files.tensors import load

EPS = 1e-6  # of every GroupNorm here; the U-Net's resnets have 1e-5


@dataclass(frozen=True)
class VAEConfig:
    """The fields of the public vae/config.json that change a number."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # absent from SD 1.x's own file


class VAE(nn.Module):
    """An image to a diagonal Gaussian, `downscale` times smaller on each side, and back."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self.encoder = _encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = _decoder(config)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32, variant: str | None = None) -> VAE:
        """Frozen, in eval mode, on the CPU; `variant`: as for `find_weights`. Raises CheckpointError."""
        return load(cls, read_config(VAEConfig, folder / "config.json"), folder, dtype, rename_old_attention, variant)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) in [-1, 1] -> mean and log variance of z, each (B, C, H/8, W/8), unscaled."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # exp of an untrained logvar would overflow

    def decode(self, latents: Tensor) -> Tensor:
        """latents z (B, C, h, w), unscaled -> images (B, 3, 8h, 8w), in [-1, 1] or slightly beyond."""
        return self.decoder(self.post_quant_conv(latents))


def _encoder(config: VAEConfig) -> nn.Sequential:
    """Images (B, 3, H, W) -> (B, 8, H/8, W/8): the mean's channels, then the log variance's."""
    widths, groups = config.block_out_channels, config.norm_num_groups
    return _chain(
        conv_in=nn.Conv2d(config.in_channels, widths[0], 3, padding=1),
        down_blocks=_blocks(widths, groups, config.layers_per_block, "downsamplers", _downsample),
        mid_block=MidBlock(widths[-1], groups),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], EPS),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1),
    )


def _decoder(config: VAEConfig) -> nn.Sequential:
    """Latents (B, C, h, w) -> images (B, 3, 8h, 8w)."""
    widths, groups = config.block_out_channels[::-1], config.norm_num_groups
    return _chain(
        conv_in=nn.Conv2d(config.latent_channels, widths[0], 3, padding=1),
        mid_block=MidBlock(widths[0], groups),
        up_blocks=_blocks(widths, groups, config.layers_per_block + 1, "upsamplers", _upsample),
        conv_norm_out=nn.GroupNorm(groups, widths[-1], EPS),
        activation=nn.SiLU(),
        conv_out=nn.Conv2d(widths[-1], config.out_channels, 3, padding=1),
    )


def _chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after another, each under its name in the public file."""
    return nn.Sequential(OrderedDict(layers))


def _blocks(widths: Sequence[int], groups: int, count: int, name: str, resample: Callable) -> nn.Sequential:
    """A block for each width: `count` resnets and, in all but the last, `resample` under this name."""
    blocks, channels = [], widths[0]
    for i, width in enumerate(widths):
        resnets = [ResNet(inputs, width, groups) for inputs in [channels] + [width] * (count - 1)]
        channels = width
        resamplers = [resample(width)] if i < len(widths) - 1 else []
        blocks.append(_chain(resnets=nn.Sequential(*resnets), **{name: nn.Sequential(*resamplers)}))
    return nn.Sequential(*blocks)


def _downsample(channels: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, C, H/2, W/2), rounded down. Padded right and bottom: symmetric padding shifts the image."""
    return _chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def _upsample(channels: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, C, 2H, 2W)."""
    return _chain(nearest=nn.Upsample(scale_factor=2.0), conv=nn.Conv2d(channels, channels, 3, padding=1))


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
        return residual + self.conv2(F.silu(self.norm2(x)))


class Attention(nn.Module):
    """One head as wide as the map, over all its positions."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        tokens = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        attended = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + rearrange(self.to_out[0](attended), "b 1 (h w) c -> b c h w", h=x.shape[2])


def rename_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the attention's layers in files from before 2023, as every original SD upload is; weights (C, C, 1, 1), of
    1x1 convolutions, become matrices (C, C)."""
    names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
    renamed = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            for old, new in names.items():
                name = name.replace(old, new)
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed
