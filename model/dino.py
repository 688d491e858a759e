"""DINO ViT-S/16 (Caron et al., 2021, arXiv 2104.14294): image features that distinguish one dog from another.

Follows facebook/dino-vits16; modules are named after the file's keys (the ViT of transformers 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model.files.config import read_config
from model.files.tensors import load
from model.preprocess import Preprocessor


@dataclass(frozen=True)
class DINOConfig:
    """The defaults are facebook/dino-vits16's."""

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-12


@dataclass(frozen=True)
class DINOPreprocessor(Preprocessor):
    """Resize to a square, without a crop; the defaults are facebook/dino-vits16's.

    DINO's own evaluation code resizes the short edge to 256 (bicubic), cuts out the centre, and gives other scores.
    """

    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)


class Embeddings(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, width, patch, stride=patch)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, (config.image_size // patch) ** 2 + 1, width))
        for table in (self.cls_token, self.position_embeddings):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, s, s) -> (batch, 1 + patches, width)."""
        projection = self.patch_embeddings["projection"]
        patches = rearrange(projection(pixels.to(projection.weight.dtype)), "b c h w -> b (h w) c")
        first = self.cls_token.expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embeddings


class Layer(nn.Module):
    """Attention, then two linear layers, each normalised before and added to its input."""

    def __init__(self, config: DINOConfig):
        super().__init__()
        self.heads, width, hidden = config.num_attention_heads, config.hidden_size, config.intermediate_size
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": projections, "output": _dense(width, width)})
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = _dense(width, hidden)
        self.output = _dense(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) -> the same."""
        normed = self.layernorm_before(x)
        projected = (projection(normed) for projection in self.attention["attention"].values())
        heads = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in projected)
        attended = rearrange(F.scaled_dot_product_attention(*heads), "b h n d -> b n (h d)")
        x = x + self.attention["output"]["dense"](attended)
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class DINO(nn.Module):
    """A vision transformer. Features are not normalised: take cosines."""

    def __init__(self, config: DINOConfig, preprocess: Preprocessor | None = None):
        """`preprocess` makes pixels of PIL images; None for the default way at the config's image size."""
        super().__init__()
        self.config = config
        self.preprocess = preprocess or DINOPreprocessor(size=config.image_size)
        self.preprocess.check_side(config.image_size)
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> DINO:
        """Frozen, in eval mode, on the CPU. Raises CheckpointError if the folder's files are missing or do not fit."""
        config, preprocess = read_config(DINOConfig, folder / "config.json"), DINOPreprocessor.from_pretrained(folder)
        return load(partial(cls, preprocess=preprocess), config, folder, dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, image_size, image_size) from `preprocess` -> (batch, hidden_size), of the class token."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.layernorm(x[:, 0])


def _dense(width_in: int, width_out: int) -> nn.ModuleDict:
    """A linear layer under the name that the files give it."""
    return nn.ModuleDict({"dense": nn.Linear(width_in, width_out)})
