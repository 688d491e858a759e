"""How an image becomes the input of ALIGN, CLIP or DINO, as a checkpoint's preprocessor_config.json says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from model.files.config import read_config


@dataclass(frozen=True)
class Preprocessor:
    """Resize, cut out the centre, scale, normalise: bit for bit as transformers' processors for PIL images.

    Raises ValueError for a size of another form.
    """

    size: int | dict = 224  # a number, or {"shortest_edge": number}, or {"height": number, "width": the same}
    crop_size: int | dict | None = None  # the same forms; None: no crop
    keep_aspect: bool = False  # `size` is the short edge; else both edges
    resample: int = Image.Resampling.BILINEAR
    rescale_factor: float = 1 / 255
    rescale_offset: bool = False  # subtract 1 after scaling
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        edges = ["shortest_edge"] if self.keep_aspect else ["height", "width"]
        size = _one_size("size", self.size, edges)
        crop_size = size if self.crop_size is None else _one_size("crop_size", self.crop_size, ["height", "width"])
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "crop_size", crop_size)

    @classmethod
    def from_pretrained(cls, folder: Path) -> Preprocessor | None:
        """Read folder/preprocessor_config.json; None if there is none."""
        path = folder / "preprocessor_config.json"
        return read_config(cls, path) if path.is_file() else None

    def check_side(self, side: int) -> None:
        """Raise ValueError if a network that reads pictures of this side cannot use these settings."""
        if self.crop_size != side:
            raise ValueError(f"the preprocessor gives {self.crop_size} pixels, the network reads {side}")

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """PIL images of any size and mode -> fp32 (n, 3, crop_size, crop_size)."""
        return torch.stack([self._pixels(image) for image in images])

    def _pixels(self, image: Image.Image) -> Tensor:
        short = min(image.size)
        edges = [int(self.size * edge / short) if self.keep_aspect else self.size for edge in image.size]
        left, top = ((edge - self.crop_size) // 2 for edge in edges)
        image = image.convert("RGB").resize(edges, self.resample)
        image = image.crop((left, top, left + self.crop_size, top + self.crop_size))
        values = (np.asarray(image) * self.rescale_factor).astype(np.float32)  # the product is float64, then rounded
        if self.rescale_offset:
            values = values - 1
        if self.do_normalize:
            values = (values - np.float32(self.image_mean)) / np.float32(self.image_std)
        return torch.from_numpy(rearrange(values, "h w c -> c h w"))


def _one_size(name: str, value: int | dict, edges: list[str]) -> int:
    """A size: a number, or the same number for each of `edges`."""
    size = value if isinstance(value, int) else value.get(edges[0])
    if not isinstance(size, int) or value not in (size, dict.fromkeys(edges, size)):
        raise ValueError(f"{name} {value} should be one number, or hold it as {' and '.join(edges)}")
    return size
