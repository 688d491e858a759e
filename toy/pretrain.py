"""Train every network of weights/toy from nothing, one command each, in this order:

    python -m toy.pretrain data            # draw the training pictures (2 minutes)
    python -m toy.pretrain vae             # the U-Net learns in its latents, so train it first and long
    python -m toy.pretrain vae-full        # whole pictures instead of crops
    python -m toy.pretrain clip            # its text tower conditions the U-Net
    python -m toy.pretrain align           # the reward
    python -m toy.pretrain dino            # a metric
    python -m toy.pretrain unet
    python -m toy.pretrain vae-decoder     # optional: sharper pictures from the same latents

Each command goes on where it was stopped (its state is in toy/cache) and writes its part of weights/toy in the public
layout, in half precision. On a GPU add `--device cuda` and a larger `--batch`. `--steps` sets the length.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.align import ALIGN, ALIGNConfig
from model.clip import CLIP, CLIPConfig, CLIPTextEncoder
from model.dino import DINO, DINOConfig
from model.scheduler import Scheduler
from model.tokenizer import BertTokenizer, CLIPTokenizer
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from model.weights import config_from, read_json
from toy import world
from toy.networks import (
    DINO_CONFIG,
    PREPROCESSORS,
    UNET_CONFIG,
    VAE_CONFIG,
    WEIGHTS,
    align_config,
    clip_config,
    text_encoder_config,
    write_bert_tokenizer,
    write_clip_tokenizer,
    write_part,
    write_scheduler,
)

CACHE = Path(__file__).parent / "cache"
CAPTIONS = 4  # different captions kept for each drawing


# ---------------------------------------------------------------------------------------------------- the drawings


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
    (CACHE / "captions.json").write_text(json.dumps(captions))
    os.replace(beside, path)


class Data:
    """The drawings, as they are on disk, and their captions. Four in a row show one subject."""

    def __init__(self, device: str = "cpu"):
        self.images = np.load(CACHE / "drawings.npy", mmap_mode="r")
        self.captions = json.loads((CACHE / "captions.json").read_text())
        self.device = device

    def __len__(self) -> int:
        return len(self.images)

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


# ---------------------------------------------------------------------------------------------------- one loop for all


class EMA:
    """A running average of the weights, with a warm-up."""

    def __init__(self, network: nn.Module, decay: float = 0.999):
        self.decay, self.count = decay, 0
        self.average = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - keep)
            else:
                self.average[name].copy_(tensor)


def fit(
    name: str,
    network: nn.Module,
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    lr: float,
    device: str,
    save: Callable[[dict[str, Tensor]], None],
    weight_decay: float = 0.01,
    decay: float = 0.999,
    minutes_between_saves: float = 4.0,
    fixed: Sequence[nn.Module] = (),
) -> None:
    """Train `network` with AdamW, warm-up and cosine decay, and an average of the weights; resumable; bf16 autocast.

    `loss_of(step)` draws its batch from the step number, so that a resumed run sees what an unbroken one would see.
    `fixed` names the modules inside `network` that are not trained.
    """
    network.to(device).train().requires_grad_(True)
    for module in fixed:
        module.requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99))
    ema, first, path = EMA(network, decay), 0, CACHE / f"{name}.pt"
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        ema.average, ema.count, first = state["ema"], state["count"], state["step"]

    def checkpoint(step: int) -> None:
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema.average,
            "count": ema.count,
            "step": step,
        }
        torch.save(state, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        save({key: tensor.cpu() for key, tensor in ema.average.items()})

    bar, saved, smooth = (
        tqdm(range(first, steps), desc=name, initial=first, total=steps, mininterval=5),
        time.time(),
        {},
    )
    for step in bar:
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast(device, torch.bfloat16):
            loss, parts = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        ema.update(network)
        for key, value in parts.items():
            smooth[key] = value if key not in smooth else 0.98 * smooth[key] + 0.02 * value
        if step % 25 == 0:
            bar.set_postfix({key: f"{value:.4f}" for key, value in smooth.items()})
        if time.time() - saved > 60 * minutes_between_saves:
            checkpoint(step + 1)
            saved = time.time()
    checkpoint(steps)


# ---------------------------------------------------------------------------------------------------- the VAE


def train_vae(steps: int, batch: int, device: str, stage: str = "vae") -> None:
    """L1 + MSE + a little KL, in stages. "vae": random 64-pixel crops, a quarter of the cost. "vae-full": goes on
    with whole pictures. "vae-decoder": goes on with the decoder alone, which leaves the latents, and the U-Net, valid.
    """
    data = Data(device)
    vae = VAE(config_from(VAEConfig, VAE_CONFIG))
    if stage != "vae":
        vae.load_state_dict(VAE.from_pretrained(WEIGHTS / "vae").state_dict())
    vae.to(memory_format=torch.channels_last)
    fixed = [vae.encoder, vae.quant_conv] if stage == "vae-decoder" else []
    scaling_factor = read_json(WEIGHTS / "vae" / "config.json")["scaling_factor"] if fixed else None

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(step)
        pixels = data.pixels([rng.randrange(len(data)) for _ in range(batch)], 64 if stage == "vae" else None, rng)
        with torch.set_grad_enabled(not fixed):
            mean, logvar = vae.encode(pixels)
        mean, logvar = mean.float(), logvar.float()
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = vae.decode(z).float() - pixels
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / batch
        mse = error.square().mean()
        psnr = float(10 * torch.log10(4 / mse.detach()))
        loss = error.abs().mean() + mse + (0 if fixed else 1e-6 * kl)
        return loss, {"psnr": psnr, "kl": float(kl)}

    def save(tensors: dict[str, Tensor]) -> None:
        average = VAE(config_from(VAEConfig, VAE_CONFIG))
        average.load_state_dict(tensors)
        average.eval().to(device)
        with torch.no_grad():
            latents = torch.cat([average.encode(data.pixels(range(i, i + 64)))[0] for i in range(0, 512, 64)])
        config = VAE_CONFIG | {"scaling_factor": scaling_factor or round(1 / latents.std().item(), 5)}
        write_part(WEIGHTS / "vae", config, tensors, "diffusion_pytorch_model.safetensors")

    lr = {"vae": 2e-3, "vae-full": 1e-3, "vae-decoder": 1e-3}[stage]
    fit(stage, vae, loss_of, steps, lr, device, save, fixed=fixed)


# ---------------------------------------------------------------------------------------------------- contrastive


def contrast(a: Tensor, b: Tensor, temperature: Tensor | float, same: Tensor | None = None) -> tuple[Tensor, float]:
    """InfoNCE both ways between rows of a and b (CLIP, arXiv 2103.00020), and how often the partner is nearest.

    same (n, n) bool: pairs that are not partners but might be, which are left out.
    """
    logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / temperature
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool, device=a.device), -torch.inf)
    target = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean().item()


def equal_texts(texts: list[str], device: str) -> Tensor:
    """(n, n) bool: which captions are the same words."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = torch.tensor([number[text] for text in texts], device=device)
    return rows[:, None] == rows


def standardized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[-1, 1] to what CLIP's and DINO's preprocessing gives."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    return (pixels / 2 + 0.5 - mean) / std


def train_clip(steps: int, batch: int, device: str) -> None:
    """Pictures against captions. Its text tower becomes the text encoder; the whole is a metric."""
    data = Data(device)
    write_clip_tokenizer(data.captions, WEIGHTS / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    config = clip_config(len(tokenizer.cutter.get_vocab()), tokenizer.last_id)
    clip = CLIP(config_from(CLIPConfig, config))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(step)
        chosen = [rng.randrange(len(data)) for _ in range(batch)]
        texts = [rng.choice(data.captions[i]) for i in chosen]
        pixels = standardized(data.pixels(chosen), clip.pictures.image_mean, clip.pictures.image_std)
        ids = tokenizer(texts).to(device)
        ids = ids[:, : int((ids != tokenizer.pad_id).sum(1).max()) + 1]  # causal: what follows the end changes nothing
        image, text = clip.image_features(pixels), clip.text_features(ids)
        temperature = torch.exp(-clip.logit_scale.clamp(max=math.log(100)))
        loss, right = contrast(image, text, temperature, equal_texts(texts, device))
        return loss, {"loss": loss.item(), "right": right}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "metrics" / "clip", config, tensors, "model.safetensors", PREPROCESSORS["clip"])
        shutil.copytree(WEIGHTS / "tokenizer", WEIGHTS / "metrics" / "clip", dirs_exist_ok=True)
        text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_model.")}
        write_part(WEIGHTS / "text_encoder", text_encoder_config(config), text, "model.safetensors")

    fit("clip", clip, loss_of, steps, 1e-3, device, save, weight_decay=0.05)


def two_of_each(data: Data, count: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Two different drawings of each of `count` subjects."""
    subjects = rng.sample(range(len(data) // 4), count)
    pairs = [rng.sample(range(4), 2) for _ in subjects]
    return [4 * s + p[0] for s, p in zip(subjects, pairs, strict=True)], [
        4 * s + p[1] for s, p in zip(subjects, pairs, strict=True)
    ]


def train_align(steps: int, batch: int, device: str) -> None:
    """Pictures against captions, and two drawings of one subject against other subjects."""
    data = Data(device)
    write_bert_tokenizer(data.captions, WEIGHTS / "reward")
    tokenizer = BertTokenizer.from_pretrained(WEIGHTS / "reward")
    config = align_config(len(tokenizer.cutter.get_vocab()))
    align = ALIGN(ALIGNConfig.from_json(config)).to(memory_format=torch.channels_last)
    side = PREPROCESSORS["align"]["crop_size"]["height"]

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(step)
        ones, others = two_of_each(data, batch // 2, rng)
        texts = [rng.choice(data.captions[i]) for i in ones + others]
        pixels = F.interpolate(data.pixels(ones + others), size=(side, side), mode="bilinear", antialias=True)
        image = align.image_features(pixels.contiguous(memory_format=torch.channels_last))
        ids, mask = tokenizer(texts)
        ids, mask = ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())]
        text = align.text_features(ids.to(device), mask.to(device))
        temperature = align.temperature.clamp(min=0.01)
        matching, right = contrast(image, text, temperature, equal_texts(texts, device))
        identity, same = contrast(*image.chunk(2), temperature)
        parts = {"loss": matching.item(), "right": right, "identity": identity.item(), "same": same}
        return matching + 0.5 * identity, parts

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "reward", config, tensors, "model.safetensors", PREPROCESSORS["align"])

    fit("align", align, loss_of, steps, 1e-3, device, save, weight_decay=0.05)


def train_dino(steps: int, batch: int, device: str) -> None:
    """Two drawings of one subject against other subjects. (DINO's own objective, self-distillation, is another.)"""
    data = Data(device)
    dino = DINO(config_from(DINOConfig, DINO_CONFIG))

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        ones, others = two_of_each(data, batch // 2, random.Random(step))
        pixels = standardized(data.pixels(ones + others), dino.pictures.image_mean, dino.pictures.image_std)
        loss, right = contrast(*dino(pixels).chunk(2), 0.1)
        return loss, {"loss": loss.item(), "right": right}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "metrics" / "dino", DINO_CONFIG, tensors, "model.safetensors", PREPROCESSORS["dino"])

    fit("dino", dino, loss_of, steps, 1e-3, device, save, weight_decay=0.05)


# ---------------------------------------------------------------------------------------------------- the U-Net


@torch.no_grad()
def encoded(data: Data, vae: VAE, device: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every drawing's latents, scaled, in half precision."""
    means, stds, scale = [], [], vae.config.scaling_factor
    for start in tqdm(range(0, len(data), 64), desc="encoding"):
        with torch.autocast(device, torch.bfloat16):
            mean, logvar = vae.encode(data.pixels(range(start, min(start + 64, len(data)))))
        means.append((scale * mean.float()).half())
        stds.append((scale * torch.exp(0.5 * logvar.float())).half())
    return torch.cat(means), torch.cat(stds)


def train_unet(steps: int, batch: int, device: str) -> None:
    """ε-prediction in the latents (DDPM, arXiv 2006.11239, eq. 14); one caption in ten is empty, for guidance.

    Min-SNR weights (arXiv 2303.09556): a small budget goes to the noise levels that decide what is drawn.
    """
    data = Data(device)
    vae = VAE.from_pretrained(WEIGHTS / "vae").to(device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae, device)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    text_encoder = CLIPTextEncoder.from_pretrained(WEIGHTS / "text_encoder").to(device)
    write_scheduler(WEIGHTS)
    scheduler = Scheduler.from_pretrained(WEIGHTS / "scheduler")
    unet = UNet(config_from(UNetConfig, UNET_CONFIG)).to(memory_format=torch.channels_last)
    snr = scheduler.alphas_cumprod.to(device) / (1 - scheduler.alphas_cumprod.to(device))
    weight = snr.clamp(max=5) / snr

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(step)
        chosen = [rng.randrange(len(data)) for _ in range(batch)]
        texts = ["" if rng.random() < 0.1 else rng.choice(data.captions[i]) for i in chosen]
        with torch.no_grad():
            context = text_encoder(tokenizer(texts).to(device))
        mean, std = means[chosen].float(), stds[chosen].float()
        x_0 = mean + std * torch.randn_like(mean)
        t = torch.randint(1000, (batch,), device=device)
        eps = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        error = (unet(x_t, t, context).float() - eps).square().mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "unet", UNET_CONFIG, tensors, "diffusion_pytorch_model.safetensors")

    fit("unet", unet, loss_of, steps, 6e-4, device, save)


# name: (function, steps on two CPU cores, batch)
PARTS = {
    "vae": (train_vae, 5200, 16),
    "vae-full": (partial(train_vae, stage="vae-full"), 1200, 4),
    "vae-decoder": (partial(train_vae, stage="vae-decoder"), 2000, 4),
    "clip": (train_clip, 1500, 96),
    "align": (train_align, 1200, 96),
    "dino": (train_dino, 1000, 96),
    "unet": (train_unet, 8000, 32),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["data", *PARTS])
    parser.add_argument("--steps", type=int, help="gradient steps (data: drawings)")
    parser.add_argument("--batch", type=int, help="samples a step")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    if args.part == "data":
        make_data(args.steps or 32000)
    else:
        train, steps, batch = PARTS[args.part]
        train(args.steps or steps, args.batch or batch, args.device)
