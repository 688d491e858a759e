"""The drawings from which all networks of weights/toy learn, and the files of toy/cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from model.files.tensors import read_metadata
from model.files.write import save_tensors
from model.vae import VAE
from toy import world

CACHE = Path(__file__).parent / "cache"
CAPTIONS = 4  # different captions stored for each drawing
CPU_LATENTS = 64_000  # drawings encoded for the trainings in latents; on a GPU all of them


def autocast(device: str):
    """bf16 where the hardware computes it; a CPU that only emulates it is 2 to 4 times slower than in fp32."""
    fast = device != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device, torch.bfloat16, enabled=fast)


def draw_block(first: int, last: int) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Drawings first .. last - 1 of the training stream, and the captions of each.

    Pictures are (n, 128, 128, 3) uint8, the masks of their subjects (n, 128, 128) uint8: 255 at the subject, else 0.
    """
    pictures, masks, captions = [], [], []
    for index in range(first, last):
        named, picture, rng = world.sample(index)
        captions.append([world.caption(named, picture, rng) for _ in range(CAPTIONS)])
        drawing, mask = world.draw_with_mask(named, picture, rng)
        pictures.append(np.asarray(drawing))
        masks.append(np.asarray(mask))
    return np.stack(pictures), np.stack(masks), captions


def make_data(count: int, cache: Path = CACHE) -> None:
    """Draw `count` pictures into the cache, on all CPU cores: drawings.npy, masks.npy and captions.json."""
    cache.mkdir(parents=True, exist_ok=True)
    names = ("drawings.npy", "masks.npy", "captions.json")
    partial, side = [cache / f"{name}.partial" for name in names], world.SIZE
    images = np.lib.format.open_memmap(partial[0], "w+", np.uint8, (count, side, side, 3))
    masks = np.lib.format.open_memmap(partial[1], "w+", np.uint8, (count, side, side))
    captions, block = [], 128
    firsts = range(0, count, block)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(draw_block, firsts, [min(first + block, count) for first in firsts])
        for first, (pictures, subjects, texts) in tqdm(zip(firsts, jobs, strict=True), "drawing", len(firsts)):
            images[first : first + block], masks[first : first + block] = pictures, subjects
            captions += texts
    images.flush()
    masks.flush()
    partial[2].write_text(json.dumps(captions), encoding="utf-8")
    for file, name in zip(partial, names, strict=True):
        os.replace(file, cache / name)


class Data:
    """The drawings, mapped from disk, and their captions. Four in a row show one subject.

    Raises FileNotFoundError if they have not been drawn yet.
    """

    def __init__(self, cache: Path = CACHE, device: str = "cpu"):
        self.cache, self.device = cache, device
        self.images = np.load(self.file("drawings.npy"), mmap_mode="r")
        self.captions = json.loads(self.file("captions.json").read_text(encoding="utf-8"))

    def file(self, name: str) -> Path:
        """A file of the cache. Raises FileNotFoundError if it is missing."""
        if not (self.cache / name).exists():
            raise FileNotFoundError(f"{self.cache / name} is missing: run python -m toy.pretrain data first")
        return self.cache / name

    def __len__(self) -> int:
        return len(self.images)

    def by_kind(self, count: int | None = None) -> list[list[int]]:
        """The indices of the first `count` drawings (default: all), one list a kind, in the order of world.KINDS."""
        groups = [[] for _ in world.KINDS]
        for index in range(0, count or len(self), 4):
            kind = world.training_subject(index // 4).subject.kind
            groups[world.KINDS.index(kind)] += range(index, index + 4)
        return [group for group in groups if group]

    def by_phrase(self) -> dict[tuple[str, str], dict[str, list[int]]]:
        """The indices of all drawings by kind, skill and phrase: {("dog", "mood"): {"joyous": [4, ...]}}."""
        groups = defaultdict(lambda: defaultdict(list))
        for index in range(len(self)):
            named, picture, _ = world.sample(index)
            groups[named.subject.kind, picture.part][picture.phrase].append(index)
        return groups

    def pixels(self, indices) -> Tensor:
        """Drawings as (n, 3, 128, 128) in [-1, 1]."""
        return self._pixels(self.images[np.asarray(indices)])

    def crops(self, count: int, side: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Random squares of random drawings: pixels (n, 3, side, side) in [-1, 1], masks (n, 1, side, side) in [0, 1].

        Raises FileNotFoundError if there are no masks.
        """
        masks = np.load(self.file("masks.npy"), mmap_mode="r")
        room = self.images.shape[1] - side + 1
        places = [(rng.randrange(len(self)), rng.randrange(room), rng.randrange(room)) for _ in range(count)]
        squares = [(i, slice(y, y + side), slice(x, x + side)) for i, y, x in places]
        subject = torch.from_numpy(np.stack([masks[square] for square in squares])).to(self.device)
        return self._pixels(np.stack([self.images[square] for square in squares])), subject[:, None].float() / 255

    def _pixels(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)  # channels-last, as it is in memory
        return pixels.float() / 127.5 - 1


@torch.no_grad()
def encoded(data: Data, vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the drawings' scaled latents, (n, 8, 16, 16) each, in half precision.

    On a CPU of the first CPU_LATENTS drawings. The cache keeps them until the first 64 drawings or the encoder change.
    """
    count = len(data) if data.device != "cpu" else min(len(data), CPU_LATENTS)
    path, scale = data.cache / "latents.safetensors", vae.config.scaling_factor
    made_by = hashlib.sha256(f"{count} {scale}".encode() + data.images[:64].tobytes())
    for module in (vae.encoder, vae.quant_conv):
        for tensor in module.state_dict().values():
            made_by.update(tensor.cpu().contiguous().numpy().tobytes())
    key = {"made_by": made_by.hexdigest()}
    if not path.exists() or read_metadata(path) != key:
        means, stds = [], []
        for start in tqdm(range(0, count, 64), desc="encoding"):
            with autocast(data.device):
                mean, logvar = vae.encode(data.pixels(range(start, min(start + 64, count))))
            means.append((scale * mean.float()).half())
            stds.append((scale * torch.exp(0.5 * logvar.float())).half())
        save_tensors({"mean": torch.cat(means), "std": torch.cat(stds)}, path, key)
    latents = load_file(path, data.device)
    return latents["mean"], latents["std"]
