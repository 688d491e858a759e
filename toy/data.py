"""The drawings that every network of weights/toy learns from, and what is kept of them in toy/cache."""

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
CAPTIONS = 4  # different captions kept for each drawing


def autocast(device: str):
    """bf16 arithmetic where the hardware has it: a CPU that only imitates it is 2 to 4 times slower than fp32."""
    fast = device != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device, torch.bfloat16, enabled=fast)


def draw_block(first: int, last: int) -> tuple[np.ndarray, list[list[str]]]:
    """Drawings first..last-1 of the training stream, (n, 128, 128, 3) uint8, and their captions."""
    pictures, captions = [], []
    for index in range(first, last):
        named, picture, rng = world.sample(index)
        captions.append([world.caption(named, picture, rng) for _ in range(CAPTIONS)])
        pictures.append(np.asarray(world.draw(named, picture, rng)))
    return np.stack(pictures), captions


def make_data(count: int) -> None:
    """Draw `count` pictures into toy/cache, on all cores."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / "drawings.npy"
    beside = CACHE / "drawings.partial.npy"
    images = np.lib.format.open_memmap(beside, "w+", np.uint8, (count, world.SIZE, world.SIZE, 3))
    captions, block = [], 128
    firsts = range(0, count, block)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(draw_block, firsts, [min(f + block, count) for f in firsts])
        for first, (pictures, texts) in tqdm(zip(firsts, jobs, strict=True), total=len(firsts), desc="drawing"):
            images[first : first + len(pictures)] = pictures
            captions += texts
    images.flush()
    (CACHE / "captions.partial.json").write_text(json.dumps(captions))
    os.replace(beside, path)
    os.replace(CACHE / "captions.partial.json", CACHE / "captions.json")


class Data:
    """The drawings, as they are on disk, and their captions. Four in a row show one subject.

    Raises FileNotFoundError if there are none yet.
    """

    def __init__(self, device: str = "cpu"):
        for name in ("drawings.npy", "captions.json"):
            if not (CACHE / name).exists():
                raise FileNotFoundError(f"toy/cache/{name} is missing: run python -m toy.pretrain data first")
        self.images = np.load(CACHE / "drawings.npy", mmap_mode="r")
        self.captions = json.loads((CACHE / "captions.json").read_text())
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

    def by_kind(self, count: int | None = None) -> list[list[int]]:
        """The first `count` drawings (default: all) sorted by what they show, in the order of world.KINDS."""
        groups = [[] for _ in world.KINDS]
        for index in range(0, count or len(self), 4):
            groups[world.KINDS.index(world.training_subject(index // 4).subject.kind)] += range(index, index + 4)
        return groups

    def by_phrase(self) -> list[list[int]]:
        """The drawings sorted by what their captions say of the scene, the clothes or the look."""
        groups = defaultdict(list)
        for index in range(len(self)):
            picture = world.sample(index)[1]
            groups[picture.outfit or picture.look or picture.scene or str(picture.van_gogh)].append(index)
        return list(groups.values())

    def pixels(self, indices, crop: int | None = None, rng: random.Random | None = None) -> Tensor:
        """(n, 3, size, size) in [-1, 1]; with `crop`, a random square of that side of each."""
        if crop is None:
            batch = self.images[np.asarray(indices)]
        else:
            corners = [(rng.randrange(world.SIZE - crop + 1), rng.randrange(world.SIZE - crop + 1)) for _ in indices]
            batch = np.stack(
                [self.images[i, y : y + crop, x : x + crop] for i, (y, x) in zip(indices, corners, strict=True)]
            )
        batch = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # channels-last, as it is in memory
        return batch.float() / 127.5 - 1


@torch.no_grad()
def encoded(data: Data, vae: VAE, device: str, count: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the first `count` drawings' latents, scaled, in half precision.

    Kept in toy/cache for as long as the drawings, told by the first 64, and the encoder that made them are the same.
    """
    path, scale = CACHE / "latents.safetensors", vae.config.scaling_factor
    made_by = hashlib.sha256(f"{count} {scale}".encode() + data.images[:64].tobytes())
    for module in (vae.encoder, vae.quant_conv):
        for tensor in module.state_dict().values():
            made_by.update(tensor.cpu().contiguous().numpy().tobytes())
    key = {"made_by": made_by.hexdigest()}
    if not path.exists() or read_metadata(path) != key:
        means, stds = [], []
        for start in tqdm(range(0, count, 64), desc="encoding"):
            with autocast(device):
                mean, logvar = vae.encode(data.pixels(range(start, min(start + 64, count))))
            means.append((scale * mean.float()).half())
            stds.append((scale * torch.exp(0.5 * logvar.float())).half())
        save_tensors({"mean": torch.cat(means), "std": torch.cat(stds)}, path, key)
    latents = load_file(path, device)
    return latents["mean"], latents["std"]
