"""CLIP (Radford et al., 2021, arXiv 2103.00020): a text tower and a vision tower that meet in one feature space.

`CLIPTextEncoder` is the text tower alone, whose last hidden state conditions Stable Diffusion: text_encoder/ of SD 1.x
(openai/clip-vit-large-patch14) and of SD 2.x (OpenCLIP ViT-H, with its 24th layer already dropped from the file).
`CLIP` is the whole, for the CLIP-I and CLIP-T scores: openai/clip-vit-base-patch16 and its sizes.
Modules are named after those files' keys.
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
from model.files.errors import CheckpointError, error_context
from model.files.tensors import load

ACTIVATIONS = {
    "gelu": F.gelu,  # OpenCLIP, so SD 2.x
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),  # OpenAI, so SD 1.x; 1e-2 away from gelu in the end
}


@dataclass(frozen=True)
class CLIPTextConfig:
    """The text tower; the defaults are CLIP ViT-B's, as public config.json files leave out what equals them."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class CLIPVisionConfig:
    """The vision tower; the defaults are CLIP ViT-B/32's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        check_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the width of the space they share."""

    text_config: CLIPTextConfig = CLIPTextConfig()
    vision_config: CLIPVisionConfig = CLIPVisionConfig()
    projection_dim: int = 512


@dataclass(frozen=True)
class CLIPPictures:
    """preprocessor_config.json: how a photo becomes the vision tower's input."""

    size: int | dict = 224  # the short edge: a number, or {"shortest_edge": number}
    crop_size: int | dict = 224  # a number, or {"height": number, "width": the same}
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self):
        for name, keys in (("size", ["shortest_edge"]), ("crop_size", ["height", "width"])):
            object.__setattr__(self, name, one_size(name, getattr(self, name), *keys))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, n, width) -> the same; `causal`: position i sees 0..i only."""
        heads = (rearrange(p(x), "b n (h d) -> b h n d", h=self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(*heads, is_causal=causal)
        return self.out_proj(rearrange(x, "b h n d -> b n (h d)"))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise CheckpointError(f"hidden_act {activation!r} is none of {', '.join(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, n, width) -> the same."""
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.self_attn = Attention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, n, width) -> the same; `causal`: as for Attention."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The transformer that both towers are built of."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(batch, n, width) -> the same."""
        for layer in self.layers:
            x = layer(x, causal)
        return x


class TextEmbeddings(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        for table in (self.token_embedding, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)  # as CLIP was trained; torch's N(0, 1) would drown the layers

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, n) -> (batch, n, width)."""
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class TextTower(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, n) -> (batch, n, width). The mask is causal only: padding is attended to, as it was in training."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids), causal=True))


class VisionEmbeddings(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
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
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 3, s, s) -> (batch, width), the class token's."""
        x = self.encoder(self.pre_layrnorm(self.embeddings(pixels)))
        return self.post_layernorm(x[:, 0])


class CLIPTextEncoder(nn.Module):
    """The text encoder of Stable Diffusion."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32, variant: str | None = None) -> CLIPTextEncoder:
        """Frozen, in eval mode, on the CPU; `variant`: as for `find_weights`.
        Raises CheckpointError if the folder's files are missing or do not fit."""
        path = Path(folder) / "config.json"
        config = config_from(CLIPTextConfig, read_json(path), path)
        return load(cls, config, folder, dtype, _with_prefix, variant)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 (batch, 77) -> last hidden state (batch, 77, width), after the final layer norm."""
        return self.text_model(ids)


class CLIP(nn.Module):
    """The dual encoder. Features are not normalised: take cosines."""

    def __init__(self, config: CLIPConfig, pictures: CLIPPictures | None = None):
        """`pictures`: how `preprocess` treats a photo; None for CLIP's own way at the config's image size."""
        super().__init__()
        self.config = config
        self.image_size = config.vision_config.image_size
        self.pictures = pictures or CLIPPictures(size=self.image_size, crop_size=self.image_size)
        if self.pictures.crop_size != self.image_size or self.pictures.size < self.image_size:
            raise CheckpointError(f"{self.pictures} does not give the {self.image_size} pixels the network sees")
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log(1 / 0.07)

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> CLIP:
        """Frozen, in eval mode, on the CPU; reads preprocessor_config.json too, if there is one.
        Raises CheckpointError if the folder's files are missing or do not fit."""
        folder = Path(folder)
        path = folder / "config.json"
        values = read_json(path)
        with error_context(f"{path} should hold a configuration of each tower"):
            for tower in ("text_config", "vision_config"):  # files of 2022 say it again, or only, under *_dict
                values[tower] = {**(values.get(tower) or {}), **(values.get(f"{tower}_dict") or {})}
        config = config_from(CLIPConfig, values, path)
        pictures = None
        path = folder / "preprocessor_config.json"
        if path.is_file():
            values = read_json(path)
            always = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
            refuse(values, dict.fromkeys(always, True), path)
            pictures = config_from(CLIPPictures, values, path)
        return load(lambda config: cls(config, pictures), config, folder, dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 3, image_size, image_size) from `preprocess` -> (batch, projection_dim)."""
        return self.visual_projection(self.vision_model(pixels))

    def text_features(self, ids: Tensor) -> Tensor:
        """ids int64 (batch, n) from CLIPTokenizer -> (batch, projection_dim), read off at the end token.

        Old files say eos_token_id 2, which is no end token: there the end is the row's largest id."""
        eos = self.config.text_config.eos_token_id
        end = ids.argmax(dim=-1) if eos == 2 else (ids == eos).int().argmax(dim=-1)  # argmax: the first of equals
        hidden = self.text_model(ids)
        return self.text_projection(hidden[torch.arange(len(ids), device=ids.device), end])

    def preprocess(self, images: list[Image.Image]) -> Tensor:
        """PIL images -> fp32 (n, 3, image_size, image_size): short edge resized, centre cut out, mean and std out."""
        return torch.stack([_pixels(image, self.pictures) for image in images])


def _with_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 leaves out the prefix when it writes a text tower alone."""
    if any(name.startswith("text_model.") for name in tensors):
        return tensors
    return {f"text_model.{name}": tensor for name, tensor in tensors.items()}


def _pixels(image: Image.Image, pictures: CLIPPictures) -> Tensor:
    width, height = (int(pictures.size * edge / min(image.size)) for edge in image.size)
    image = image.convert("RGB").resize((width, height), pictures.resample)
    left, top = (width - pictures.crop_size) // 2, (height - pictures.crop_size) // 2
    image = image.crop((left, top, left + pictures.crop_size, top + pictures.crop_size))
    values = (np.asarray(image) / 255).astype(np.float32)
    values = (values - np.float32(pictures.image_mean)) / np.float32(pictures.image_std)
    return torch.from_numpy(rearrange(values, "h w c -> c h w"))
