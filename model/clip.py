"""CLIP (Radford et al., 2021, arXiv 2103.00020): a text tower and a vision tower that share one feature space.

`CLIPTextEncoder` is the text tower alone, whose last hidden state conditions Stable Diffusion: text_encoder/ of SD 1.x
(openai/clip-vit-large-patch14) and of SD 2.x (OpenCLIP ViT-H without its 24th layer). `CLIP` is both towers, for the
CLIP-I and CLIP-T scores: openai/clip-vit-base-patch16 and other sizes. Modules are named after those files' keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from model.files.config import read_config
from model.files.tensors import load
from model.preprocess import Preprocessor

# OpenCLIP and SD 2.x have gelu, OpenAI's CLIP and SD 1.x quick_gelu. The other one changes the features by 1e-2.
ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower; the defaults are CLIP ViT-B's, which public config.json files leave out."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision tower; the defaults are CLIP ViT-B/32's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the shared feature space."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512


@dataclass(frozen=True)
class CLIPPreprocessor(Preprocessor):
    """Resize the short edge, cut out the centre; the defaults are openai's."""

    crop_size: int | dict | None = 224
    keep_aspect: bool = True
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)


class Layer(nn.Module):
    """Attention, then two linear layers, each normalised before and added to its input."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.heads, width, hidden = config.num_attention_heads, config.hidden_size, config.intermediate_size
        self.activation = ACTIVATIONS[config.hidden_act]
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, n, width) -> the same; `causal`: position i attends to 0..i only."""
        normed = self.layer_norm1(x)
        projected = (self.self_attn[f"{name}_proj"](normed) for name in "qkv")
        heads = (rearrange(each, "b n (h d) -> b h n d", h=self.heads) for each in projected)
        attended = F.scaled_dot_product_attention(*heads, is_causal=causal)
        x = x + self.self_attn["out_proj"](rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


def _layers(config: CLIPTextConfig | CLIPVisionConfig) -> nn.ModuleDict:
    return nn.ModuleDict({"layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))})


class TextTower(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        sizes = {"token_embedding": config.vocab_size, "position_embedding": config.max_position_embeddings}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(n, config.hidden_size) for name, n in sizes.items()})
        for table in self.embeddings.values():
            nn.init.normal_(table.weight, std=0.02)  # as CLIP was trained; torch's N(0, 1) is far too large
        self.encoder = _layers(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, n) -> (batch, n, width). The mask is causal only: padding is attended to, as in training."""
        positions = self.embeddings["position_embedding"].weight[: ids.shape[1]]
        x = self.embeddings["token_embedding"](ids) + positions
        for layer in self.encoder["layers"]:
            x = layer(x, causal=True)
        return self.final_layer_norm(x)


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // patch) ** 2 + 1, width)
        for table in (self.class_embedding, self.position_embedding.weight):
            nn.init.normal_(table, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, s, s) -> (batch, 1 + patches, width)."""
        patches = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype))
        patches = rearrange(patches, "b c h w -> b (h w) c")
        first = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([first, patches], dim=1) + self.position_embedding.weight


class VisionTower(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled so in the files
        self.encoder = _layers(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, s, s) -> (batch, width), of the class token."""
        x = self.pre_layrnorm(self.embeddings(pixels))
        for layer in self.encoder["layers"]:
            x = layer(x, causal=False)
        return self.post_layernorm(x[:, 0])


class CLIPTextEncoder(nn.Module):
    """The text encoder of Stable Diffusion."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32, variant: str | None = None) -> CLIPTextEncoder:
        """Frozen, in eval mode, on the CPU; `variant`: as for `find_weights`. Raises CheckpointError."""
        return load(cls, read_config(CLIPTextConfig, folder / "config.json"), folder, dtype, add_prefix, variant)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 (batch, 77) -> last hidden state (batch, 77, width), after the final layer norm."""
        return self.text_model(ids)


class CLIP(nn.Module):
    """Both towers. Features are not normalised: take cosines."""

    def __init__(self, config: CLIPConfig, preprocess: Preprocessor | None = None):
        """`preprocess` makes pixels of PIL images; None for openai's way at the config's image size."""
        super().__init__()
        self.config = config
        side = config.vision_config.image_size
        self.preprocess = preprocess or CLIPPreprocessor(size=side, crop_size=side)
        self.preprocess.check_side(side)
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> CLIP:
        """Frozen, in eval mode, on the CPU. Raises CheckpointError if the folder's files are missing or do not fit."""
        config, preprocess = read_config(CLIPConfig, folder / "config.json"), CLIPPreprocessor.from_pretrained(folder)
        return load(partial(cls, preprocess=preprocess), config, folder, dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, image_size, image_size) from `preprocess` -> (batch, projection_dim)."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Tensor) -> Tensor:
        """ids int64 (batch, n) from CLIPTokenizer -> (batch, projection_dim), of the first end token."""
        eos = self.config.text_config.eos_token_id  # old files say 2, which is wrong: the end token is the largest id
        end = ids.argmax(dim=-1) if eos == 2 else (ids == eos).int().argmax(dim=-1)
        hidden = self.text_model(ids)
        return self.text_projection(hidden[torch.arange(len(ids), device=ids.device), end])


def add_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 leaves out the prefix text_model. when it writes a text encoder."""
    if any(name.startswith("text_model.") for name in tensors):
        return tensors
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}
