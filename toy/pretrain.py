"""Train every network of weights/toy from nothing, one command each, in this order:

    python -m toy.pretrain data            # draw the training pictures (minutes)
    python -m toy.pretrain vae             # the U-Net learns in its latents, so train it first and long
    python -m toy.pretrain vae-full        # whole pictures instead of crops
    python -m toy.pretrain clip            # its text tower conditions the U-Net
    python -m toy.pretrain clip-pictures   # optional: a better metric, the same text tower
    python -m toy.pretrain align           # the reward
    python -m toy.pretrain dino            # a metric
    python -m toy.pretrain unet
    python -m toy.pretrain vae-refine      # optional: better pictures from almost the same latents
    python -m toy.pretrain vae-sharpen     # clear lines, from the very same latents

Each command but the first goes on where it was stopped (its state is in toy/cache) and writes its part of weights/toy
in the public layout, in half precision. `--go-on` starts from the weights that are there, as `vae-full`, `vae-refine`,
`vae-sharpen` and `clip-pictures` always do; with the same `--seed` they see the same batches again. On a GPU add
`--device cuda` and a larger `--batch`; `--steps` sets the length. After `vae`, `vae-full` or `clip` the U-Net must be
trained anew: it has learned other latents or other words.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import shutil
import sys
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.align import ALIGN, ALIGNConfig
from model.clip import CLIP, CLIPConfig, CLIPTextEncoder
from model.dino import DINO, DINOConfig
from model.files.config import config_from, read_json
from model.files.write import save_tensors
from model.scheduler import Scheduler
from model.tokenizer import BertTokenizer, CLIPTokenizer
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig
from support import flags
from support.settings import count, seed_number
from toy.adversary import Adversary, sharpened
from toy.contrastive import NAMES, contrast, equal_texts, other_kinds, tell_kinds
from toy.data import CACHE, Data, encoded, make_data
from toy.loop import fit
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

# ---------------------------------------------------------------------------------------------------- the VAE


def begun(network: nn.Module, part: str, go_on: bool) -> nn.Module:
    """The network as it is, or with the weights that weights/toy has, to go on from there without toy/cache."""
    if go_on:
        network.load_state_dict(type(network).from_pretrained(WEIGHTS / part).state_dict())
    return network


def anchor_of(vae: VAE) -> VAE:
    """The VAE as vae-refine began with it: kept in toy/cache, for a resumed run finds a newer one in weights/toy."""
    path = CACHE / "vae-refine.anchor.safetensors"
    if not (CACHE / "vae-refine.pt").exists():  # fit's state: there is nothing to resume
        save_tensors(vae.state_dict(), path, {})
    anchor = copy.deepcopy(vae)
    anchor.load_state_dict(load_file(path))
    return anchor


def share_of(data: Data, device: str) -> int:
    """How many of the drawings are encoded for what learns from latents: on a GPU all."""
    return len(data) if device != "cpu" else min(len(data), 32_000)


def mean_psnr(error: Tensor) -> Tensor:
    """The mean over pictures (B, 3, H, W), whose values reach from -1 to 1, of the PSNR in dB; 0-d."""
    return 10 * math.log10(4) - 10 * error.square().mean((1, 2, 3)).log10().mean()


def train_vae(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0, stage: str = "vae") -> None:
    """L1 + MSE + a little KL, in stages. "vae": random 64-pixel crops, a quarter of the cost. "vae-full": goes on
    with whole pictures. "vae-refine": goes on with log MSE a picture, that is PSNR, so that a plain picture counts as
    much as a crowded one, and with an anchor in KL's place: the encoder may move its posteriors only a little, so that
    the U-Net stays valid.
    """
    data = Data(device)
    vae = begun(VAE(config_from(VAEConfig, VAE_CONFIG)), "vae", go_on or stage != "vae")
    vae.to(memory_format=torch.channels_last)
    refine = stage == "vae-refine"
    before = anchor_of(vae).requires_grad_(False).to(device) if refine else None
    scaling_factor = read_json(WEIGHTS / "vae" / "config.json")["scaling_factor"] if refine else None

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        pixels = data.pixels([rng.randrange(len(data)) for _ in range(batch)], 64 if stage == "vae" else None, rng)
        mean, logvar = (part.float() for part in vae.encode(pixels))
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        error = vae.decode(z).float() - pixels
        if refine:
            moved = torch.cat([mean, logvar], 1) - torch.cat(before.encode(pixels), 1).float()
            psnr = mean_psnr(error)
            anchor = moved.square().mean()
            return 10 * anchor - psnr / 4, {"psnr": psnr.item(), "moved": anchor.item() ** 0.5}
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / batch
        mse = error.square().mean()
        psnr = float(10 * torch.log10(4 / mse.detach()))
        return error.abs().mean() + mse + 1e-6 * kl, {"psnr": psnr, "kl": float(kl)}

    @torch.no_grad()
    def measured_scale(tensors: dict[str, Tensor]) -> float:
        average = VAE(config_from(VAEConfig, VAE_CONFIG))
        average.load_state_dict(tensors)
        average.eval().to(device)
        latents = torch.cat([average.encode(data.pixels(range(i, i + 64)))[0] for i in range(0, 512, 64)])
        return round(1 / latents.std().item(), 5)

    def save(tensors: dict[str, Tensor]) -> None:
        config = VAE_CONFIG | {"scaling_factor": scaling_factor or measured_scale(tensors)}
        write_part(WEIGHTS / "vae", config, tensors, "diffusion_pytorch_model.safetensors")

    lr = {"vae": 2e-3, "vae-full": 1e-3, "vae-refine": 1e-3}[stage]
    fit(stage, vae, loss_of, steps, lr, device, save, seed=seed)


def train_decoder(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0) -> None:
    """Log MSE a picture, as in "vae-refine", and an adversary; the encoder stays, and with it the U-Net's latents.

    Every other picture's latents, of variance 1 or so, get noise: those that the U-Net draws are not exact either.
    """
    data = Data(device)
    vae = VAE.from_pretrained(WEIGHTS / "vae").to(device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae, device, count := share_of(data, device))
    pair = nn.ModuleDict({"vae": vae, "adversary": Adversary().to(memory_format=torch.channels_last)})

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = [rng.randrange(count) for _ in range(batch)]
        drawings, mean, std = data.pixels(chosen), means[chosen].float(), stds[chosen].float()
        noise = 0.15 * torch.rand(batch, 1, 1, 1, device=device)
        noise[::2] = 0
        z = mean + std * torch.randn_like(mean) + noise * torch.randn_like(mean)
        decoded = vae.decode(z / vae.config.scaling_factor).float()
        psnr = mean_psnr(decoded - drawings)
        loss, hinge = sharpened(-psnr / 4, decoded, drawings, pair["adversary"])
        return loss + hinge, {"psnr": psnr.item(), "hinge": hinge.item()}

    def save(tensors: dict[str, Tensor]) -> None:
        config = read_json(WEIGHTS / "vae" / "config.json")
        vae_alone = {name.removeprefix("vae."): tensor for name, tensor in tensors.items() if name.startswith("vae.")}
        write_part(WEIGHTS / "vae", config, vae_alone, "diffusion_pytorch_model.safetensors")

    fixed = [vae.encoder, vae.quant_conv]
    fit("vae-sharpen", pair, loss_of, steps, 8e-4, device, save, fixed=fixed, seed=seed)


# ---------------------------------------------------------------------------------------------------- contrastive


def crowd(phrases: list[list[int]], kinds: list[list[int]], count: int, rng: random.Random) -> list[int]:
    """A batch of drawings: half are of four phrases only, so that the subjects must be told apart; half of any kind."""
    few = [rng.choice(group) for group in rng.sample(phrases, 4) for _ in range(count // 8)]
    return few + [rng.choice(rng.choice(kinds)) for _ in range(count - len(few))]


def standardized(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[-1, 1] to what CLIP's and DINO's preprocessing gives."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (mean, std))
    return (pixels / 2 + 0.5 - mean) / std


def train_clip(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0, stage: str = "clip") -> None:
    """Pictures against captions. Its text tower becomes the text encoder; the whole is a metric.

    Stage "clip-pictures" goes on with all but the text tower, which leaves the text encoder, and the U-Net, valid.
    """
    data = Data(device)
    go_on = go_on or stage == "clip-pictures"
    if not go_on:
        write_clip_tokenizer(data.captions, WEIGHTS / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    config = clip_config(len(tokenizer.cutter.get_vocab()), tokenizer.last_id)
    clip = begun(CLIP(config_from(CLIPConfig, config)), "metrics/clip", go_on)
    phrases, all_kinds = data.by_phrase(), data.by_kind()

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = crowd(phrases, all_kinds, batch, rng)
        texts = [rng.choice(data.captions[i]) for i in chosen]
        pixels = standardized(data.pixels(chosen), clip.preprocess.image_mean, clip.preprocess.image_std)
        ids = tokenizer(texts + other_kinds(texts, rng) + NAMES).to(device)
        ids = ids[:, : int((ids != tokenizer.pad_id).sum(1).max()) + 1]  # causal: what follows the end changes nothing
        image = clip.image_features(pixels)
        text, swapped, names = clip.text_features(ids).split([batch, batch, len(NAMES)])
        temperature = torch.exp(-clip.logit_scale.clamp(max=math.log(100)))
        loss, right = contrast(image, text, temperature, equal_texts(texts, device))
        kinds, named = tell_kinds(image, text, swapped, names, texts, temperature)
        return loss + kinds, {"loss": loss.item(), "right": right, "kinds": kinds.item(), "named": named}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "metrics" / "clip", config, tensors, "model.safetensors", PREPROCESSORS["clip"])
        shutil.copytree(WEIGHTS / "tokenizer", WEIGHTS / "metrics" / "clip", dirs_exist_ok=True)
        text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_model.")}
        write_part(WEIGHTS / "text_encoder", text_encoder_config(config), text, "model.safetensors")

    fixed = [clip.text_model] if stage == "clip-pictures" else []
    fit(stage, clip, loss_of, steps, 1e-3, device, save, weight_decay=0.05, fixed=fixed, seed=seed)


def two_of_each(data: Data, count: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Two different drawings of each of `count` subjects."""
    subjects = rng.sample(range(len(data) // 4), count)
    pairs = [[4 * s + k for k in rng.sample(range(4), 2)] for s in subjects]
    return [a for a, _ in pairs], [b for _, b in pairs]


def train_align(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0) -> None:
    """Pictures against captions, and two drawings of one subject against other subjects."""
    data = Data(device)
    if not go_on:
        write_bert_tokenizer(data.captions, WEIGHTS / "reward")
    tokenizer = BertTokenizer.from_pretrained(WEIGHTS / "reward")
    config = align_config(len(tokenizer.cutter.get_vocab()))
    align = begun(ALIGN(config_from(ALIGNConfig, config)), "reward", go_on).to(memory_format=torch.channels_last)
    side = PREPROCESSORS["align"]["crop_size"]["height"]

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        ones, others = two_of_each(data, batch // 2, rng)
        texts = [rng.choice(data.captions[i]) for i in ones + others]
        pixels = F.interpolate(data.pixels(ones + others), size=(side, side), mode="bilinear", antialias=True)
        image = align.image_features(pixels.contiguous(memory_format=torch.channels_last))
        ids, mask = tokenizer(texts + other_kinds(texts, rng) + NAMES)
        ids, mask = ids[:, : int(mask.sum(1).max())], mask[:, : int(mask.sum(1).max())]
        text = align.text_features(ids.to(device), mask.to(device))
        text, swapped, names = text.split([batch, batch, len(NAMES)])
        temperature = align.temperature.clamp(min=0.01)
        matching, right = contrast(image, text, temperature, equal_texts(texts, device))
        kinds, named = tell_kinds(image, text, swapped, names, texts, temperature)
        identity, same = contrast(*image.chunk(2), temperature)
        parts = {"loss": matching.item(), "right": right, "kinds": kinds.item(), "named": named, "same": same}
        return matching + kinds + identity, parts

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "reward", config, tensors, "model.safetensors", PREPROCESSORS["align"])

    fit("align", align, loss_of, steps, 1e-3, device, save, weight_decay=0.05, seed=seed)


def train_dino(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0) -> None:
    """Two drawings of one subject against other subjects. (DINO's own objective, self-distillation, is another.)"""
    data = Data(device)
    dino = begun(DINO(config_from(DINOConfig, DINO_CONFIG)), "metrics/dino", go_on)

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        ones, others = two_of_each(data, batch // 2, random.Random(number))
        pixels = standardized(data.pixels(ones + others), dino.preprocess.image_mean, dino.preprocess.image_std)
        loss, right = contrast(*dino(pixels).chunk(2), 0.1)
        return loss, {"loss": loss.item(), "right": right}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "metrics" / "dino", DINO_CONFIG, tensors, "model.safetensors", PREPROCESSORS["dino"])

    fit("dino", dino, loss_of, steps, 1e-3, device, save, weight_decay=0.05, seed=seed)


# ---------------------------------------------------------------------------------------------------- the U-Net


def train_unet(steps: int, batch: int, device: str, go_on: bool = False, seed: int = 0) -> None:
    """ε-prediction in the latents (DDPM, arXiv 2006.11239, eq. 14); one caption in ten is empty, for guidance.

    Half of a batch is drawn evenly from the kinds: the stream shows a dog four times as often as a boot.
    Min-SNR weights (arXiv 2303.09556): a small budget goes to the noise levels that decide what is drawn. The levels of
    a batch are spread evenly (as in arXiv 2107.00630), for a less noisy gradient.
    """
    data = Data(device)
    vae = VAE.from_pretrained(WEIGHTS / "vae").to(device, memory_format=torch.channels_last)
    means, stds = encoded(data, vae, device, count := share_of(data, device))
    kinds = data.by_kind(count)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer")
    text_encoder = CLIPTextEncoder.from_pretrained(WEIGHTS / "text_encoder").to(device)
    write_scheduler(WEIGHTS)
    scheduler = Scheduler.from_pretrained(WEIGHTS / "scheduler")
    unet = begun(UNet(config_from(UNetConfig, UNET_CONFIG)), "unet", go_on).to(memory_format=torch.channels_last)
    snr = scheduler.alphas_cumprod.to(device) / (1 - scheduler.alphas_cumprod.to(device))
    weight = snr.clamp(max=5) / snr

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = [rng.choice(rng.choice(kinds)) if i % 2 else rng.randrange(count) for i in range(batch)]
        texts = ["" if rng.random() < 0.1 else rng.choice(data.captions[i]) for i in chosen]
        with torch.no_grad():
            context = text_encoder(tokenizer(texts).to(device))
        mean, std = means[chosen].float(), stds[chosen].float()
        x_0 = mean + std * torch.randn_like(mean)
        t = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) * 1000 / batch
        t = t.long().clamp(max=999)  # 31 + 0.99999999 is 32
        eps = torch.randn_like(x_0)
        x_t = scheduler.add_noise(x_0, eps, t).contiguous(memory_format=torch.channels_last)
        with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():  # measured: faster on so small maps
            error = (unet(x_t, t, context).float() - eps).square().mean((1, 2, 3))
        loss = (weight[t] * error).mean()
        return loss, {"loss": loss.item(), "mse": error.mean().item()}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(WEIGHTS / "unet", UNET_CONFIG, tensors, "diffusion_pytorch_model.safetensors")

    fit("unet", unet, loss_of, steps, 4e-4 if go_on else 6e-4, device, save, seed=seed)


# name: (function, steps on two CPU cores, batch)
PARTS = {
    "vae": (train_vae, 5200, 16),
    "vae-full": (partial(train_vae, stage="vae-full"), 1200, 4),
    "vae-refine": (partial(train_vae, stage="vae-refine"), 3000, 4),
    "vae-sharpen": (train_decoder, 4000, 4),
    "clip": (train_clip, 2500, 96),
    "clip-pictures": (partial(train_clip, stage="clip-pictures"), 2000, 96),
    "align": (train_align, 1350, 96),
    "dino": (train_dino, 2000, 96),
    "unet": (train_unet, 4000, 32),
}


def run(args: argparse.Namespace) -> int:
    if args.part == "data":
        make_data(args.steps or 128_000)
    else:
        train, steps, batch = PARTS[args.part]
        train(args.steps or steps, args.batch or batch, args.device, args.go_on, args.seed)
    return 0


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("part", choices=["data", *PARTS])
    add("--steps", type=count, help="gradient steps (data: drawings)")
    add("--batch", type=count, help="samples a step")
    add("--go-on", action="store_true", help="start from the weights in weights/toy, not from nothing")
    add("--seed", type=seed_number, default=0, help="of batches and noise; going on, give another (default: 0)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    args = parser.parse_args()
    return flags.guarded(lambda: run(args), lambda: "use a smaller --batch", interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
