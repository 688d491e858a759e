"""The contrastive trainings: CLIP, ALIGN, and a ViT in DINO's layout. Commands of toy/pretrain.py."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.align import ALIGN, ALIGNConfig
from model.clip import CLIP, CLIPConfig
from model.dino import DINO, DINOConfig
from model.files.config import config_from
from model.tokenizer import BertTokenizer, CLIPTokenizer
from toy.contrastive import NAMES, contrast, equal_texts, other_kinds, tell_kinds
from toy.data import Data
from toy.loop import Job, fit, initialized
from toy.networks import (
    DINO_CONFIG,
    PREPROCESSORS,
    align_config,
    clip_config,
    text_encoder_config,
    write_bert_tokenizer,
    write_clip_tokenizer,
    write_part,
)

FILE = "model.safetensors"


def train_clip(job: Job) -> None:
    """Pictures against captions. The text tower becomes the text encoder; the whole CLIP is a metric."""
    if not job.go_on:
        write_clip_tokenizer(Data(job.cache).captions, job.weights / "tokenizer")
    _fit_clip(job, "clip", train_text=True)


def train_clip_pictures(job: Job) -> None:
    """The same from the weights in weights/toy, without the text tower: text encoder and U-Net stay valid."""
    _fit_clip(replace(job, go_on=True), "clip-pictures", train_text=False)


def _fit_clip(job: Job, name: str, train_text: bool) -> None:
    data, tokenizer = Data(job.cache, job.device), CLIPTokenizer.from_pretrained(job.weights / "tokenizer")
    config = clip_config(len(tokenizer.backend.get_vocab()), tokenizer.last_id)
    clip = initialized(job, CLIP(config_from(CLIPConfig, config)), "metrics/clip")
    phrases = data.by_phrase()

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        chosen = crowd(phrases, job.batch, rng)
        texts = [rng.choice(data.captions[i]) for i in chosen]
        pixels = standardized(data.pixels(chosen), "clip")
        ids = tokenizer(texts + other_kinds(texts, rng) + NAMES).to(job.device)
        ids = ids[:, : int((ids != tokenizer.pad_id).sum(1).max()) + 1]  # the mask is causal: padding changes nothing
        image = clip.image_features(pixels)
        text, swapped, names = clip.text_features(ids).split([job.batch, job.batch, len(NAMES)])
        temperature = torch.exp(-clip.logit_scale.clamp(max=math.log(100)))
        loss, right = contrast(image, text, temperature, equal_texts(texts, job.device))
        kinds, named = tell_kinds(image, text, swapped, names, texts, temperature)
        return loss + kinds, {"loss": loss.item(), "right": right, "kinds": kinds.item(), "named": named}

    def save(tensors: dict[str, Tensor]) -> None:
        folder = job.weights / "metrics" / "clip"
        write_part(folder, config, tensors, FILE, PREPROCESSORS["clip"])
        shutil.copytree(job.weights / "tokenizer", folder, dirs_exist_ok=True)
        text = {key: tensor for key, tensor in tensors.items() if key.startswith("text_model.")}
        write_part(job.weights / "text_encoder", text_encoder_config(config), text, FILE)

    fixed = [] if train_text else [clip.text_model]
    fit(job, name, clip, loss_of, save, lr=1e-3, weight_decay=0.05, fixed=fixed)


def crowd(phrases: dict[tuple[str, str], dict[str, list[int]]], count: int, rng: random.Random) -> list[int]:
    """A batch of drawings; phrases: of Data.by_phrase.

    Half of it has two kinds in one skill each, so that its phrases must be distinguished, a quarter has four phrases,
    so that subjects must be, and the rest is of any kind.
    """
    kinds, skills = [sorted({key[i] for key in phrases}) for i in (0, 1)]
    batch = []
    for skill in rng.choices(skills, k=2):
        group = rng.choice([group for key, group in phrases.items() if key[1] == skill])
        batch += [rng.choice(group[phrase]) for phrase in rng.choices(list(group), k=count // 4)]
    for _ in range(4):
        few = rng.choice([*rng.choice([*phrases.values()]).values()])
        batch += rng.choices(few, k=count // 16)
    for kind in rng.choices(kinds, k=count - len(batch)):
        group = rng.choice([group for key, group in phrases.items() if key[0] == kind])
        batch.append(rng.choice(rng.choice([*group.values()])))
    return batch


def standardized(pixels: Tensor, network: str) -> Tensor:
    """[-1, 1] to what the preprocessing of "clip" or "dino" gives."""
    means = [PREPROCESSORS[network][name] for name in ("image_mean", "image_std")]
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in means)
    return (pixels / 2 + 0.5 - mean) / std


def subjects_by_kind(data: Data) -> list[list[int]]:
    """The subjects of the drawings, one list a kind; subject s has the drawings 4s to 4s + 3."""
    return [sorted({index // 4 for index in kind}) for kind in data.by_kind()]


def two_of_each(subjects: list[list[int]], count: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """Two different drawings of each of `count` subjects, half of them of one kind. subjects: by kind."""
    chosen = rng.sample(one := rng.choice(subjects), min(count // 2, len(one)))
    others = [subject for kind in subjects if kind is not one for subject in kind]
    chosen += rng.sample(others, count - len(chosen))
    pairs = [[4 * s + k for k in rng.sample(range(4), 2)] for s in chosen]
    return [a for a, _ in pairs], [b for _, b in pairs]


def train_align(job: Job) -> None:
    """Pictures against captions, and two drawings of one subject against other subjects."""
    data = Data(job.cache, job.device)
    if not job.go_on:
        write_bert_tokenizer(data.captions, job.weights / "reward")
    tokenizer = BertTokenizer.from_pretrained(job.weights / "reward")
    config = align_config(len(tokenizer.backend.get_vocab()))
    align = initialized(job, ALIGN(config_from(ALIGNConfig, config)), "reward").to(memory_format=torch.channels_last)
    subjects, side = subjects_by_kind(data), PREPROCESSORS["align"]["crop_size"]["height"]

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(number)
        ones, others = two_of_each(subjects, job.batch // 2, rng)
        texts = [rng.choice(data.captions[i]) for i in ones + others]
        pixels = F.interpolate(data.pixels(ones + others), size=(side, side), mode="bilinear", antialias=True)
        image = align.image_features(pixels.contiguous(memory_format=torch.channels_last))
        ids, mask = tokenizer(texts + other_kinds(texts, rng) + NAMES)
        longest = int(mask.sum(1).max())
        text = align.text_features(ids[:, :longest].to(job.device), mask[:, :longest].to(job.device))
        text, swapped, names = text.split([job.batch, job.batch, len(NAMES)])
        temperature = align.temperature.clamp(min=0.01)
        matching, right = contrast(image, text, temperature, equal_texts(texts, job.device))
        kinds, named = tell_kinds(image, text, swapped, names, texts, temperature)
        identity, same = contrast(*image.chunk(2), temperature)
        terms = {"loss": matching.item(), "right": right, "kinds": kinds.item(), "named": named, "same": same}
        return matching + kinds + identity, terms

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(job.weights / "reward", config, tensors, FILE, PREPROCESSORS["align"])

    fit(job, "align", align, loss_of, save, lr=1e-3, weight_decay=0.05)


def train_dino(job: Job) -> None:
    """Two drawings of one subject against other subjects. (DINO's own objective is self-distillation.)"""
    data = Data(job.cache, job.device)
    subjects = subjects_by_kind(data)
    dino = initialized(job, DINO(config_from(DINOConfig, DINO_CONFIG)), "metrics/dino")

    def loss_of(number: int) -> tuple[Tensor, dict[str, float]]:
        ones, others = two_of_each(subjects, job.batch // 2, random.Random(number))
        pixels = standardized(data.pixels(ones + others), "dino")
        loss, right = contrast(*dino(pixels).chunk(2), 0.1)
        return loss, {"loss": loss.item(), "right": right}

    def save(tensors: dict[str, Tensor]) -> None:
        write_part(job.weights / "metrics" / "dino", DINO_CONFIG, tensors, FILE, PREPROCESSORS["dino"])

    fit(job, "dino", dino, loss_of, save, lr=1e-3, weight_decay=0.05)
