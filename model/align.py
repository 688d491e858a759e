"""ALIGN (Jia et al., arXiv 2102.05918), which the reward uses: an EfficientNet and a BERT that share a feature space.

Follows kakaobrain/align-base (EfficientNet-B7, arXiv 1905.11946, at 289 px; BERT base, arXiv 1810.04805). Module names
are that file's keys, hence the nested dictionaries of layers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
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
class ALIGNTextConfig:
    """`text_config` of config.json: BERT base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


@dataclass(frozen=True)
class ALIGNVisionConfig:
    """`vision_config` of config.json, the fields that change a number: EfficientNet-B7. Lists have an entry a stage."""

    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depthwise_padding: tuple[int, ...] = ()  # indices of blocks with symmetric padding
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.99  # weight of the NEW batch: one pass in train mode replaces the statistics

    def width(self, channels: int) -> int:
        """Channels times the width coefficient, as the nearest multiple of the divisor, but not 10 % less."""
        exact, divisor = channels * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(exact + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * exact else rounded

    def repeats(self, blocks: int) -> int:
        """The number of blocks times the depth coefficient, rounded up."""
        return math.ceil(self.depth_coefficient * blocks)


@dataclass(frozen=True)
class ALIGNConfig:
    """config.json; the defaults are kakaobrain/align-base."""

    text_config: ALIGNTextConfig = ALIGNTextConfig()
    vision_config: ALIGNVisionConfig = ALIGNVisionConfig()
    projection_dim: int = 640  # width of the shared feature space, and of the image tower's last stage
    temperature_init_value: float = 1.0


@dataclass(frozen=True)
class ALIGNPreprocessor(Preprocessor):
    """Resize to a square, cut out the centre, map to [-1, 1]."""

    size: int | dict = 346
    crop_size: int | dict | None = 289
    rescale_factor: float = 1 / 127.5
    rescale_offset: bool = True
    do_normalize: bool = False


class Block(nn.Module):
    """EfficientNet's inverted residual: widen, filter each channel in space, weigh the channels, narrow again.

    shape: input and output width, kernel, stride, expansion ratio. symmetric: pad as much before as after, else one
    pixel less before. residual: add the input.
    """

    def __init__(self, config: ALIGNVisionConfig, shape: Sequence[int], symmetric: bool, residual: bool):
        super().__init__()
        width_in, width_out, kernel, stride, ratio = shape
        wide, pad = width_in * ratio, kernel // 2
        squeezed = max(1, int(width_in * config.squeeze_expansion_ratio))  # a part of width_in, not of `wide`
        self.padding = None if symmetric else (pad - 1, pad, pad - 1, pad)
        self.expands, self.residual = ratio != 1, residual
        if self.expands:
            self.expansion = _conv_norm(config, "expand_conv", "expand_bn", width_in, wide, 1)
        spatial = {"stride": stride, "padding": pad if symmetric else 0, "groups": wide}
        self.depthwise_conv = _conv_norm(config, "depthwise_conv", "depthwise_norm", wide, wide, kernel, **spatial)
        reduce, expand = nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)
        self.squeeze_excite = nn.ModuleDict({"reduce": reduce, "expand": expand})
        self.projection = _conv_norm(config, "project_conv", "project_bn", wide, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width_out, H', W'); with stride 2, H' and W' are half of H and W."""
        h = F.silu(self.expansion(x)) if self.expands else x
        if self.padding:
            h = F.pad(h, self.padding)
        h = F.silu(self.depthwise_conv(h))
        weight = F.silu(self.squeeze_excite["reduce"](h.mean((2, 3), keepdim=True)))
        h = h * torch.sigmoid(self.squeeze_excite["expand"](weight))
        h = self.projection(h)
        return x + h if self.residual else h


def _conv_norm(config: ALIGNVisionConfig, conv: str, norm: str, *shape: int, **options: int) -> nn.Sequential:
    """A convolution without bias, then batch normalisation, under the names `conv` and `norm`."""
    convolution = nn.Conv2d(*shape, **options, bias=False)
    batch_norm = nn.BatchNorm2d(convolution.out_channels, config.batch_norm_eps, config.batch_norm_momentum)
    return nn.Sequential(OrderedDict({conv: convolution, norm: batch_norm}))


class VisionTower(nn.Module):
    """EfficientNet without its top convolution and its classifier."""

    def __init__(self, config: ALIGNVisionConfig):
        super().__init__()
        self.embeddings = _conv_norm(config, "convolution", "batchnorm", 3, config.width(32), 3, stride=2)
        blocks = nn.ModuleList()
        widths = map(config.width, config.in_channels), map(config.width, config.out_channels)
        stages = zip(*widths, config.kernel_sizes, config.strides, config.expand_ratios, strict=True)
        for (width_in, width_out, kernel, stride, ratio), repeats in zip(stages, config.num_block_repeats, strict=True):
            for repeat in range(config.repeats(repeats)):
                symmetric = stride == 1 or len(blocks) in config.depthwise_padding
                shape = width_in, width_out, kernel, stride, ratio
                blocks.append(Block(config, shape, symmetric, residual=repeat > 0))
                width_in, stride = width_out, 1
        self.encoder = nn.ModuleDict({"blocks": blocks})

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, width of the last stage)."""
        x = F.silu(self.embeddings(F.pad(pixels, (0, 1, 0, 1))))
        for block in self.encoder["blocks"]:
            x = block(x)
        return x.mean((2, 3))


class TextLayer(nn.Module):
    """BERT's transformer layer: attention, then a feed-forward net, each added to its input and normalised after."""

    def __init__(self, config: ALIGNTextConfig):
        super().__init__()
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.heads = config.num_attention_heads
        projections = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": projections, "output": _dense_norm(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _dense_norm(hidden, width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, L, width), mask (B, 1, 1, L) bool, True at keys that are attended to -> (B, L, width)."""
        projected = [self.attention["self"][name](x) for name in ("query", "key", "value")]
        q, k, v = (rearrange(each, "b l (h d) -> b h l d", h=self.heads) for each in projected)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        h = self.attention["output"]["dense"](rearrange(h, "b h l d -> b l (h d)"))
        x = self.attention["output"]["LayerNorm"](x + h)
        h = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + h)


def _dense_norm(width_in: int, width_out: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(width_in, width_out), "LayerNorm": nn.LayerNorm(width_out, eps=eps)})


class TextTower(nn.Module):
    """BERT."""

    def __init__(self, config: ALIGNTextConfig):
        super().__init__()
        width = config.hidden_size
        sizes = {"word": config.vocab_size, "position": config.max_position_embeddings}
        sizes |= {"token_type": config.type_vocab_size}
        self.embeddings = nn.ModuleDict({f"{name}_embeddings": nn.Embedding(n, width) for name, n in sizes.items()})
        self.embeddings["LayerNorm"] = nn.LayerNorm(width, eps=config.layer_norm_eps)
        layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})  # in the file; ALIGN does not use it

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L), nonzero at tokens that are not padding -> hidden states (B, L, width)."""
        x = self.embeddings["word_embeddings"](ids) + self.embeddings["position_embeddings"].weight[: ids.shape[1]]
        x = x + self.embeddings["token_type_embeddings"].weight[0]  # one sentence: every token is of type 0
        x = self.embeddings["LayerNorm"](x)
        keys = rearrange(mask.bool(), "b l -> b 1 1 l")
        for layer in self.encoder["layer"]:
            x = layer(x, keys)
        return x


class ALIGN(nn.Module):
    """Features of images and texts, not normalised: take cosines. For training: logits = cosine / temperature."""

    def __init__(self, config: ALIGNConfig = ALIGNConfig(), preprocess: Preprocessor | None = None):
        """`preprocess` makes pixels of PIL images; None for kakaobrain/align-base's way."""
        super().__init__()
        self.config = config
        self.preprocess = preprocess or ALIGNPreprocessor()
        self.text_model = TextTower(config.text_config)
        self.vision_model = VisionTower(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.temperature = nn.Parameter(torch.tensor(float(config.temperature_init_value)))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype=torch.float32) -> ALIGN:
        """Frozen, in eval mode, on the CPU. Raises CheckpointError if the folder's files are missing or do not fit."""
        config, preprocess = read_config(ALIGNConfig, folder / "config.json"), ALIGNPreprocessor.from_pretrained(folder)
        return load(partial(cls, preprocess=preprocess), config, folder, dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, H, W) from `preprocess`, of any size -> (B, projection_dim)."""
        return self.vision_model(pixels)

    def text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (B, L) int64, mask (B, L), 1 at tokens, 0 at padding -> (B, projection_dim), of [CLS]."""
        return self.text_projection(self.text_model(ids, mask)[:, 0])
