"""DINO ViT-S/16 (Caron et al., 2021, arXiv 2104.14294): image features that tell one dog from another.

Follows facebook/dino-vits16; modules are named after the file's keys (the ViT of transformers 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from model.files.config import check_heads, config_from, one_size, read_json, refuse
from model.files.errors import CheckpointError
from model.files.tensors import load


@dataclass(frozen=True)
class DINOConfig:
    """The defaults are facebook/dino-vits16's."""

    hidden_size: int = 384
    intermediate_size: int = 1536
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True

    def __post_init__(self):
        if self.hidden_act != "gelu":
            raise CheckpointError(f"hidden_act {self.hidden_act!r} is not DINO's gelu")
        check_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class DINOPictures:
    """preprocessor_config.json: how a photo becomes the network's input."""

    size: int | dict = 224  # both edges: a number, or {"height": number, "width": the same}
    resample: int = Image.Resampling.BILINEAR
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self):
        object.__setattr__(self, "size", one_size("size", self.size, "height", "width"))


class Embeddings(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        projection = nn.Conv2d(config.num_channels, width, patch, stride=patch)
        self.patch_embeddings = nn.ModuleDict({"projection": projection})
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


class SelfAttention(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) -> the same."""
        heads = (rearrange(p(x), "b n (h d) -> b h n d", h=self.heads) for p in (self.query, self.key, self.value))
        return rearrange(F.scaled_dot_product_attention(*heads), "b h n d -> b n (h d)")


class Layer(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = nn.ModuleDict({"attention": SelfAttention(config), "output": _dense(width, width)})
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = _dense(width, hidden)
        self.output = _dense(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) -> the same."""
        x = x + self.attention["output"]["dense"](self.attention["attention"](self.layernorm_before(x)))
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class Encoder(nn.Module):
    def __init__(self, config: DINOConfig):
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) -> the same."""
        for layer in self.layer:
            x = layer(x)
        return x


class DINO(nn.Module):
    """A vision transformer. Features are not normalised: take cosines."""

    def __init__(self, config: DINOConfig, pictures: DINOPictures | None = None):
        """`pictures`: how `preprocess` treats a photo; None for the default way at the config's image size."""
        super().__init__()
        self.config = config
        self.image_size = config.image_size
        self.pictures = pictures or DINOPictures(size=self.image_size)
        if self.pictures.size != self.image_size:
            raise CheckpointError(f"{self.pictures} does not give the {self.image_size} pixels the network sees")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> DINO:
        """Frozen, in eval mode, on the CPU; reads preprocessor_config.json too, if there is one. A pooler in the file,
        which ViT copies may carry and DINO never had, is passed over.
        Raises CheckpointError if the folder's files are missing or do not fit."""
        folder = Path(folder)
        path = folder / "config.json"
        config = config_from(DINOConfig, read_json(path), path)
        pictures = None
        path = folder / "preprocessor_config.json"
        if path.is_file():
            values = read_json(path)
            refuse(values, dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True), path)
            pictures = config_from(DINOPictures, values, path)
        return load(lambda config: cls(config, pictures), config, folder, dtype, _without_pooler)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, image_size, image_size) from `preprocess` -> (batch, hidden_size), the class token's."""
        return self.layernorm(self.encoder(self.embeddings(pixels))[:, 0])

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """PIL images -> fp32 (n, 3, image_size, image_size): resized to a square without a crop, mean and std out.

        This is the published checkpoint's own preprocessing; DINO's evaluation code resizes the short edge to 256
        (bicubic) and cuts out the centre, and gives other scores."""
        return torch.stack([_pixels(image, self.pictures) for image in images])


def _without_pooler(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.dense.")}


def _dense(width_in: int, width_out: int) -> nn.ModuleDict:
    """A linear layer under the name that the files give it."""
    return nn.ModuleDict({"dense": nn.Linear(width_in, width_out)})


def _pixels(image: Image.Image, pictures: DINOPictures) -> Tensor:
    image = image.convert("RGB").resize((pictures.size, pictures.size), pictures.resample)
    values = (np.asarray(image) / 255).astype(np.float32)
    values = (values - np.float32(pictures.image_mean)) / np.float32(pictures.image_std)
    return torch.from_numpy(rearrange(values, "h w c -> c h w"))
