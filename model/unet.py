"""The denoiser of Stable Diffusion 1.x and 2.x (arXiv 2112.10752): a U-Net that reads the prompt by cross-attention.

    latents ── conv_in ─┬─ down 0 ─┬─ down 1 ─┬─ down 2 ─┬─ down 3 ─┐
                        │          │          │          │         mid
    output ─ conv_out ──┴── up 3 ──┴── up 2 ──┴── up 1 ──┴── up 0 ──┘

The vertical bars are skip connections, one after conv_in, after each layer and after each downsampling. Modules carry
the names of the public `unet/diffusion_pytorch_model.safetensors`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.files.config import read_config
from model.files.tensors import load

RESNET_EPS = 1e-5  # GroupNorm of the resnets and before conv_out
TRANSFORMER_EPS = 1e-6  # GroupNorm at the start of a transformer

# The kinds of blocks; True: they read the prompt.
BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclass(frozen=True)
class UNetConfig:
    """The fields of the public unet/config.json that size the network."""

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64  # side of the latents in training: the default image size / 8
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8  # the NUMBER of heads, despite its name
    use_linear_projection: bool = False
    norm_num_groups: int = 32

    @property
    def heads(self) -> tuple[int, ...]:
        """The number of attention heads of each level, the largest map first."""
        heads = self.attention_head_dim
        return (heads,) * len(self.block_out_channels) if isinstance(heads, int) else heads


class UNet(nn.Module):
    """Predicts what the base model was trained to predict: the noise ε or the velocity v."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, heads, last = config.block_out_channels, config.heads, len(config.block_out_channels) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])

        self.down_blocks = nn.ModuleList()
        channels, skips = widths[0], [widths[0]]  # of the current map, of every map kept for a skip connection
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            inputs = [channels] + [width] * (config.layers_per_block - 1)
            self.down_blocks.append(DownBlock(config, inputs, width, heads[i], BLOCKS[kind], downsample=i < last))
            skips += [width] * (config.layers_per_block + (i < last))
            channels = width

        self.mid_block = MidBlock(config, channels, heads[-1])

        self.up_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths[::-1], config.up_block_types, strict=True)):
            inputs = [below + skips.pop() for below in [channels] + [width] * config.layers_per_block]
            self.up_blocks.append(UpBlock(config, inputs, width, heads[last - i], BLOCKS[kind], upsample=i < last))
            channels = width

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], RESNET_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32, variant: str | None = None) -> UNet:
        """Frozen, in eval mode, on the CPU; `variant`: as for `find_weights`. Raises CheckpointError."""
        return load(cls, read_config(UNetConfig, folder / "config.json"), folder, dtype, variant=variant)

    def checkpoint_gradients(self) -> None:
        """Keep only the inputs of resnets and transformers; backward() computes the rest again (arXiv 1604.06174)."""
        for layer in self.modules():
            if isinstance(layer, (ResNet, Transformer)):  # no dropout, so no random state to restore
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)

    def forward(self, latents: Tensor, timestep: int | Tensor, context: Tensor) -> Tensor:
        """latents (B, C, H, W), any H and W; timestep in 0..999: a number, or a tensor () or (B,);
        context (B, T, cross_attention_dim), the encoded prompt -> ε or v (B, C, H, W)."""
        t = torch.as_tensor(timestep, device=latents.device).expand(len(latents))
        t = F.silu(self.time_embedding(t))  # the first step of every resnet's time_emb_proj
        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, kept = block(x, t, context)
            skips += kept
        x = self.mid_block(x, t, context)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets]
            x = block(x, taken, t, context, size=skips[-1].shape[2:] if skips else None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownBlock(nn.Module):
    """A level on the way down: resnets, each with a transformer if the level reads the prompt, then half the size."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, heads: int, attends: bool, downsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(config, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(Transformer(config, width, heads) for _ in inputs if attends)
        self.downsamplers = nn.ModuleList([_conv(width, stride=2)] if downsample else [])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (B, C_in, H, W), t (B, 4·C_0), context (B, T, D) -> (B, C, ⌈H/2⌉, ⌈W/2⌉), and every layer's output."""
        kept = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, t)
            if self.attentions:
                x = self.attentions[i](x, context)
            kept.append(x)
        for downsample in self.downsamplers:
            x = downsample["conv"](x)
            kept.append(x)
        return x, kept


class MidBlock(nn.Module):
    def __init__(self, config: UNetConfig, width: int, heads: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer(config, width, heads)])

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), t (B, 4·C_0), context (B, T, D) -> (B, C, H, W)."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x, t), context), t)


class UpBlock(nn.Module):
    """A level on the way up: each resnet also reads a map kept on the way down; then twice the size."""

    def __init__(self, config: UNetConfig, inputs: list[int], width: int, heads: int, attends: bool, upsample: bool):
        super().__init__()
        self.resnets = nn.ModuleList(ResNet(config, channels, width) for channels in inputs)
        self.attentions = nn.ModuleList(Transformer(config, width, heads) for _ in inputs if attends)
        self.upsamplers = nn.ModuleList([_conv(width)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], t: Tensor, context: Tensor, size: torch.Size | None) -> Tensor:
        """x (B, C_in, H, W), skips (B, C_i, H, W) for each resnet, t (B, 4·C_0), context (B, T, D) -> (B, C, *size).
        size: (height, width) of the level above, odd where halving rounded up; None at the top, which keeps H and W."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), t)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample["conv"](F.interpolate(x, size=size, mode="nearest"))
        return x


def _conv(width: int, stride: int = 1) -> nn.ModuleDict:
    return nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride, padding=1)})


class ResNet(nn.Module):
    def __init__(self, config: UNetConfig, in_channels: int, channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_num_groups, in_channels, RESNET_EPS)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.block_out_channels[0], channels)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, channels, RESNET_EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """x (B, C_in, H, W), t (B, 4·C_0) -> (B, C, H, W)."""
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(t)[:, :, None, None]
        return residual + self.conv2(F.silu(self.norm2(x)))


class Transformer(nn.Module):
    """Self-attention between the positions of the map, then cross-attention to the prompt."""

    def __init__(self, config: UNetConfig, width: int, heads: int):
        super().__init__()
        self.linear = config.use_linear_projection  # SD 2.x; SD 1.x projects with 1x1 convolutions, before flattening
        self.norm = nn.GroupNorm(config.norm_num_groups, width, TRANSFORMER_EPS)
        self.proj_in = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, config.cross_attention_dim, heads)])
        self.proj_out = nn.Linear(width, width) if self.linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, T, D) -> (B, C, H, W)."""
        residual, height = x, x.shape[2]
        x = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        tokens = rearrange(x, "b c h w -> b (h w) c")  # a view, if x is channels_last
        tokens = self.proj_in(tokens) if self.linear else tokens
        tokens = self.transformer_blocks[0](tokens, context)
        tokens = self.proj_out(tokens) if self.linear else tokens
        x = rearrange(tokens, "b (h w) c -> b c h w", h=height)
        return residual + (x if self.linear else self.proj_out(x))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads)
        self.norm3 = nn.LayerNorm(width)
        feed_forward = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.ModuleDict({"net": feed_forward})

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, C), context (B, T, D) -> (B, N, C)."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff["net"](self.norm3(x))


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries from x (B, N, C), keys and values from context (B, T, D) -> (B, N, C)."""
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](rearrange(attended, "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TimeEmbedding(nn.Module):
    """A timestep as cosines and sines of many wavelengths, then two layers."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.half = width // 2
        self.linear_1, self.linear_2 = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, t: Tensor) -> Tensor:
        """t (B,) in 0..999 -> (B, hidden)."""
        exponents = torch.arange(self.half, device=t.device, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10_000) / self.half * exponents)
        angles = t[:, None].float() * frequencies  # float32 always: bf16 rounds 999 to 1000
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_2(F.silu(self.linear_1(waves.to(next(self.parameters()).dtype))))
