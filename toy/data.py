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
CPU_LATENTS = 32_000  # drawings encoded for the trainings in latents; on a GPU all of them


def autocast(device: str):
    """bf16 where the hardware computes it; a CPU that only emulates it is 2 to 4 times slower than in fp32."""
    fast = device != "cpu" or getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return torch.autocast(device, torch.bfloat16, enabled=fast)


def draw_block(first: int, last: int) -> tuple[np.ndarray, list[list[str]]]:
    """Drawings first .. last - 1 of the training stream, (n, 128, 128, 3) uint8, and the captions of each."""
    pictures, captions = [], []
    for index in range(first, last):
        named, picture, rng = world.sample(index)
        captions.append([world.caption(named, picture, rng) for _ in range(CAPTIONS)])
        pictures.append(np.asarray(world.draw(named, picture, rng)))
    return np.stack(pictures), captions


def make_data(count: int, cache: Path = CACHE) -> None:
    """Draw `count` pictures into the cache, on all CPU cores."""
    cache.mkdir(parents=True, exist_ok=True)
    images = np.lib.format.open_memmap(
        cache / "drawings.partial.npy", "w+", np.uint8, (count, world.SIZE, world.SIZE, 3)
    )
    captions, block = [], 128
    firsts = range(0, count, block)
    with ProcessPoolExecutor() as pool:
        jobs = pool.map(draw_block, firsts, [min(first + block, count) for first in firsts])
        for first, (pictures, texts) in tqdm(zip(firsts, jobs, strict=True), total=len(firsts), desc="drawing"):
            images[first : first + len(pictures)] = pictures
            captions += texts
    images.flush()
    (cache / "captions.partial.json").write_text(json.dumps(captions), encoding="utf-8")
    os.replace(cache / "drawings.partial.npy", cache / "drawings.npy")
    os.replace(cache / "captions.partial.json", cache / "captions.json")


class Data:
    """The drawings, mapped from disk, and their captions. Four in a row show one subject.

    Raises FileNotFoundError if they have not been drawn yet.
    """

    def __init__(self, cache: Path = CACHE, device: str = "cpu"):
        for name in ("drawings.npy", "captions.json"):
            if not (cache / name).exists():
                raise FileNotFoundError(f"{cache / name} is missing: run python -m toy.pretrain data first")
        self.images = np.load(cache / "drawings.npy", mmap_mode="r")
        self.captions = json.loads((cache / "captions.json").read_text(encoding="utf-8"))
        self.cache, self.device = cache, device

    def __len__(self) -> int:
        return len(self.images)

    def by_kind(self, count: int | None = None) -> list[list[int]]:
        """The indices of the first `count` drawings (default: all), one list a kind, in the order of world.KINDS."""
        groups = [[] for _ in world.KINDS]
        for index in range(0, count or len(self), 4):
            kind = world.training_subject(index // 4).subject.kind
            groups[world.KINDS.index(kind)] += range(index, index + 4)
        return [group for group in groups if group]

    def by_phrase(self) -> list[list[int]]:
        """The indices of all drawings, one list for each phrase of a scene, an outfit or a look."""
        groups = defaultdict(list)
        for index in range(len(self)):
            picture = world.sample(index)[1]
            groups[picture.outfit or picture.look or picture.scene or str(picture.van_gogh)].append(index)
        return list(groups.values())

    def pixels(self, indices, crop: int | None = None, rng: random.Random | None = None) -> Tensor:
        """Drawings as (n, 3, side, side) in [-1, 1]. crop: the side of a random square of each (default: all of it)."""
        if crop is None:
            batch = self.images[np.asarray(indices)]
        else:
            corners = [(rng.randrange(world.SIZE - crop + 1), rng.randrange(world.SIZE - crop + 1)) for _ in indices]
            squares = zip(indices, corners, strict=True)
            batch = np.stack([self.images[i, y : y + crop, x : x + crop] for i, (y, x) in squares])
        batch = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # channels-last, as it is in memory
        return batch.float() / 127.5 - 1


@torch.no_grad()
def encoded(data: Data, vae: VAE) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the drawings' scaled latents, (n, 4, 16, 16) each, in half precision.

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
