"""ALIGN (Jia et al., arXiv 2102.05918), the reward's eyes: an EfficientNet and a BERT that share a feature space.

Follows kakaobrain/align-base (EfficientNet-B7, arXiv 1905.11946, at 289 px; BERT base, arXiv 1810.04805), and any
smaller one of the same layout. Module names are that file's keys, hence the nested dictionaries of layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from model.files.config import check_heads, config_from, read_json
from model.files.errors import CheckpointError
from model.files.tensors import load

STEM_WIDTH = 32  # EfficientNet's stem, before the width coefficient


@dataclass(frozen=True)
class ALIGNTextConfig:
    """`text_config` of config.json: BERT base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    position_embedding_type: str = "absolute"

    def __post_init__(self):
        _require("text_config.hidden_act", self.hidden_act, "gelu")
        _require("text_config.position_embedding_type", self.position_embedding_type, "absolute")
        check_heads(self.hidden_size, self.num_attention_heads)


@dataclass(frozen=True)
class ALIGNVisionConfig:
    """`vision_config` of config.json: EfficientNet-B7. Each list has one entry a stage.

    The file's `hidden_dim` and `image_size` change no number: there is no top convolution, the pool is a plain mean,
    and any image size goes in. Neither does `num_hidden_layers` (64 in public files, which have 55 blocks).
    """

    num_channels: int = 3
    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depthwise_padding: tuple[int, ...] = ()  # blocks with symmetric padding
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    pooling_type: str = "mean"
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.99  # weight of the NEW batch: one pass in train mode replaces the statistics

    def __post_init__(self):
        _require("vision_config.hidden_act", self.hidden_act, "swish", "silu")
        _require("vision_config.pooling_type", self.pooling_type, "mean")
        stages = ("kernel_sizes", "in_channels", "out_channels", "strides", "num_block_repeats", "expand_ratios")
        if len({len(getattr(self, name)) for name in stages}) != 1:
            raise CheckpointError(f"ALIGN config: vision_config's {', '.join(stages)} differ in length")
        for stride in self.strides:
            _require("vision_config.strides", stride, 1, 2)

    def width(self, channels: int) -> int:
        """Channels times the width coefficient, to the nearest multiple of the divisor, but never 10 % below."""
        exact, divisor = channels * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * exact else rounded

    def repeats(self, blocks: int) -> int:
        """The number of blocks times the depth coefficient, rounded up."""
        return math.ceil(self.depth_coefficient * blocks)


@dataclass(frozen=True)
class ALIGNImageConfig:
    """preprocessor_config.json: resize to `size`, cut out the middle `crop_size`, scale. Both are (height, width)."""

    size: tuple[int, int] | dict | int = (346, 346)  # or {"height", "width"}, or one number for a square
    crop_size: tuple[int, int] | dict | int = (289, 289)
    resample: int = 2  # PIL's number for bilinear
    rescale_factor: float = 1 / 127.5
    # Only these values are known.
    do_center_crop: bool = True
    do_resize: bool = True
    do_rescale: bool = True
    rescale_offset: bool = True  # subtract 1 after scaling
    do_normalize: bool = False
    include_top: bool = False

    def __post_init__(self):
        for name in ("size", "crop_size"):
            object.__setattr__(self, name, _height_width(name, getattr(self, name)))
        known = dict.fromkeys(("do_center_crop", "do_resize", "do_rescale", "rescale_offset"), True)
        for name, value in (known | {"do_normalize": False, "include_top": False}).items():
            _require(f"preprocessor {name}", getattr(self, name), value)
        _require("preprocessor resample", self.resample, *[int(filter) for filter in Image.Resampling])
        if self.crop_size[0] > self.size[0] or self.crop_size[1] > self.size[1]:
            raise CheckpointError(f"ALIGN config: preprocessor crop_size {self.crop_size} is above size {self.size}")


@dataclass(frozen=True)
class ALIGNConfig:
    """config.json, plus how images are prepared. The defaults are kakaobrain/align-base. `projection_dim` is the
    width of the shared feature space; the image tower has no projection, so its last stage must be that wide."""

    text_config: ALIGNTextConfig = field(default_factory=ALIGNTextConfig)
    vision_config: ALIGNVisionConfig = field(default_factory=ALIGNVisionConfig)
    projection_dim: int = 640
    temperature_init_value: float = 1.0
    images: ALIGNImageConfig = field(default_factory=ALIGNImageConfig)

    def __post_init__(self):
        width = self.vision_config.width(self.vision_config.out_channels[-1])
        _require("projection_dim (with this vision_config)", self.projection_dim, width)

    @classmethod
    def from_json(cls, values: dict, preprocessor: dict | None = None, folder: Path | None = None) -> ALIGNConfig:
        """From the objects in config.json and preprocessor_config.json; what they leave out keeps its default.

        Raises CheckpointError, naming their folder, for a value that is not supported.
        """
        return config_from(cls, {**values, "images": preprocessor or {}}, folder)


def _require(name: str, value: object, *supported: object) -> None:
    if value not in supported:
        expected = " or ".join(repr(choice) for choice in supported)
        raise CheckpointError(f"ALIGN config: {name} is {value!r}, supported: {expected}")


def _height_width(name: str, value: object) -> tuple[int, int]:
    """(height, width), whole numbers above 0, from any of the forms in which ALIGNImageConfig takes a size."""
    pair = (value.get("height"), value.get("width")) if isinstance(value, dict) else value
    pair = (pair, pair) if isinstance(pair, int) else pair
    if isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair):
        return pair
    raise CheckpointError(f"ALIGN config: preprocessor {name} is {value!r}, supported: height and width")


class Block(nn.Module):
    """EfficientNet's inverted residual: widen, filter each channel in space, weigh the channels, narrow again."""

    def __init__(
        self,
        config: ALIGNVisionConfig,
        width_in: int,
        width_out: int,
        kernel: int,
        stride: int,
        expand_ratio: int,
        index: int,
        first: bool,
    ):
        super().__init__()
        wide = width_in * expand_ratio
        squeezed = max(1, int(width_in * config.squeeze_expansion_ratio))  # of the input's width, not of the wide one's

        def norm(width: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(width, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum)

        # A stride of 2 pads one less before than after, whatever the parity of the image: the weights were made so.
        lopsided = stride == 2 and index not in config.depthwise_padding
        after = kernel // 2
        self.padding = (after - 1, after, after - 1, after) if lopsided else None
        padding = 0 if lopsided else after

        if expand_ratio != 1:
            self.expansion = nn.ModuleDict(
                {"expand_conv": nn.Conv2d(width_in, wide, 1, bias=False), "expand_bn": norm(wide)}
            )
        self.depthwise_conv = nn.ModuleDict(
            {
                "depthwise_conv": nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide, bias=False),
                "depthwise_norm": norm(wide),
            }
        )
        self.squeeze_excite = nn.ModuleDict(
            {"reduce": nn.Conv2d(wide, squeezed, 1), "expand": nn.Conv2d(squeezed, wide, 1)}
        )
        self.projection = nn.ModuleDict(
            {"project_conv": nn.Conv2d(wide, width_out, 1, bias=False), "project_bn": norm(width_out)}
        )
        self.expands = expand_ratio != 1
        self.residual = not first  # the first block of a stage may change stride and width

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H', W')"""
        h = x
        if self.expands:
            h = F.silu(self.expansion["expand_bn"](self.expansion["expand_conv"](h)))
        if self.padding:
            h = F.pad(h, self.padding)
        h = F.silu(self.depthwise_conv["depthwise_norm"](self.depthwise_conv["depthwise_conv"](h)))
        weight = F.silu(self.squeeze_excite["reduce"](h.mean((2, 3), keepdim=True)))
        h = h * torch.sigmoid(self.squeeze_excite["expand"](weight))
        h = self.projection["project_bn"](self.projection["project_conv"](h))
        return x + h if self.residual else h


class VisionTower(nn.Module):
    """EfficientNet without its top convolution and its classifier."""

    def __init__(self, config: ALIGNVisionConfig):
        super().__init__()
        stem = config.width(STEM_WIDTH)
        self.embeddings = nn.ModuleDict(
            {
                "convolution": nn.Conv2d(config.num_channels, stem, 3, stride=2, bias=False),
                "batchnorm": nn.BatchNorm2d(stem, eps=config.batch_norm_eps, momentum=config.batch_norm_momentum),
            }
        )
        blocks = []
        stages = (config.in_channels, config.out_channels, config.kernel_sizes, config.strides, config.expand_ratios)
        for *stage, repeats in zip(*stages, config.num_block_repeats, strict=True):
            channels_in, channels_out, kernel, stride, ratio = stage
            width_in, width_out = config.width(channels_in), config.width(channels_out)
            for repeat in range(config.repeats(repeats)):
                first, index = repeat == 0, len(blocks)
                widths = (width_in if first else width_out, width_out)
                stride = stride if first else 1
                blocks.append(Block(config, *widths, kernel, stride, ratio, index, first))
        self.encoder = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, width of the last stage)"""
        x = self.embeddings["convolution"](F.pad(pixels, (0, 1, 0, 1)))
        x = F.silu(self.embeddings["batchnorm"](x))
        for block in self.encoder["blocks"]:
            x = block(x)
        return x.mean((2, 3))


class TextLayer(nn.Module):
    """BERT's transformer layer: attention, then a feed-forward net, each added to its input and normalised after."""

    def __init__(self, config: ALIGNTextConfig):
        super().__init__()
        width = config.hidden_size

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(width, eps=config.layer_norm_eps)

        heads = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict(
            {"self": heads, "output": nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": norm()})}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, config.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.intermediate_size, width), "LayerNorm": norm()})
        self.heads = config.num_attention_heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, width), mask (B, 1, 1, L) bool, True where a key may be looked at -> (B, L, width)"""
        q, k, v = (
            rearrange(self.attention["self"][name](x), "b l (h d) -> b h l d", h=self.heads)
            for name in ("query", "key", "value")
        )
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = self.attention["output"]["dense"](rearrange(h, "b h l d -> b l (h d)"))
        x = self.attention["output"]["LayerNorm"](x + h)
        h = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + h)


class TextTower(nn.Module):
    """BERT."""

    def __init__(self, config: ALIGNTextConfig):
        super().__init__()
        width = config.hidden_size
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, width),
                "position_embeddings": nn.Embedding(config.max_position_embeddings, width),
                "token_type_embeddings": nn.Embedding(config.type_vocab_size, width),
                "LayerNorm": nn.LayerNorm(width, eps=config.layer_norm_eps),
            }
        )
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))}
        )
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})  # in the file; ALIGN does not use it

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L), nonzero at tokens that are not padding -> hidden states (B, L, width)"""
        x = self.embeddings["word_embeddings"](ids)
        x = x + self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = x + self.embeddings["token_type_embeddings"].weight[0]  # one sentence, so every token is of type 0
        x = self.embeddings["LayerNorm"](x)
        keys = rearrange(mask.bool(), "b l -> b 1 1 l")
        for layer in self.encoder["layer"]:
            x = layer(x, keys)
        return x


class ALIGN(nn.Module):
    """Images and texts become comparable features. The reward takes their cosine; `temperature` is for training:
    logits = cosine / temperature, with no exponential (unlike CLIP)."""

    def __init__(self, config: ALIGNConfig = ALIGNConfig()):
        super().__init__()
        self.config = config
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value)))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> ALIGN:
        """Read config.json, the weights and, if there is one, preprocessor_config.json; frozen and in eval mode.

        Raises CheckpointError for anything missing, left over, misshapen or unsupported.
        """
        folder = Path(folder)
        preprocessor = folder / "preprocessor_config.json"
        images = read_json(preprocessor) if preprocessor.is_file() else {}
        return load(cls, ALIGNConfig.from_json(read_json(folder / "config.json"), images, folder), folder, dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) from `preprocess`, of any size -> (B, projection_dim), not normalised.

        They are the pooled map itself: ALIGN has no image projection.
        """
        return self.vision_model(pixels)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64 and mask (B, L), 1 at tokens and 0 at padding -> (B, projection_dim), not normalised.

        They are the projected last hidden state of [CLS]; BERT's tanh pooler is passed by.
        """
        return self.text_projection(self.text_model(ids, mask)[:, 0])

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images of any size and mode -> (B, 3, crop height, crop width) fp32, in [-1, 1] with the public numbers.

        The resize does not keep the aspect ratio, as in the public checkpoint.
        """
        config = self.config.images
        height, width = config.size
        crop_height, crop_width = config.crop_size
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        box = (left, top, left + crop_width, top + crop_height)
        batch = [
            np.asarray(image.convert("RGB").resize((width, height), Image.Resampling(config.resample)).crop(box))
            for image in images
        ]
        # The product in float64, and only then rounded: exactly the public numbers.
        scaled = torch.from_numpy((np.stack(batch) * config.rescale_factor).astype(np.float32)) - 1
        return rearrange(scaled, "b h w c -> b c h w").contiguous()
