"""Contrastive losses between pictures and captions: CLIP's, and one that makes the kind of subject count."""

from __future__ import annotations

import random
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from toy import world

KIND = re.compile(rf"\b({'|'.join(world.KINDS)})\b")  # the first match in a caption is the subject's kind
NAMES = [f"a photo of a {kind}" for kind in world.KINDS]


def contrast(a: Tensor, b: Tensor, temperature: Tensor | float, same: Tensor | None = None) -> tuple[Tensor, float]:
    """InfoNCE in both directions (CLIP, arXiv 2103.00020) between rows i of a and b, which are partners, (n, width).

    same: (n, n) bool, pairs that are no partners but could be; they are left out. Returns the loss, 0-d, and how often
    the nearest row of b is the partner.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 has two digits, and the temperature is a hundredth
        logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / temperature
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool, device=a.device), -torch.inf)
    target = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean().item()


def other_kinds(texts: list[str], rng: random.Random) -> list[str]:
    """Each caption with its kind replaced by another."""
    return [KIND.sub(lambda own: rng.choice([kind for kind in world.KINDS if kind != own[0]]), t, 1) for t in texts]


def tell_kinds(
    image: Tensor, text: Tensor, swapped: Tensor, names: Tensor, texts: list[str], temperature: Tensor
) -> tuple[Tensor, float]:
    """Classify the kind, and prefer each caption to the same caption with another kind (NegCLIP, arXiv 2210.01936).

    A batch has few pictures with the same scene, colours and clothes, so `contrast` alone hardly learns the kind.
    image, text, swapped: (n, width) features of pictures, captions, captions with another kind. names: (kinds, width)
    features of NAMES. Returns the loss, 0-d, and how often the kind is right.
    """
    image, text, swapped, names = (F.normalize(part.float(), dim=1) for part in (image, text, swapped, names))
    kinds = torch.tensor([world.KINDS.index(KIND.search(text)[0]) for text in texts], device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        logits = image @ names.T / temperature
    apart = (image * (text - swapped)).sum(1) / temperature
    right = (logits.argmax(1) == kinds).float().mean().item()
    return F.cross_entropy(logits, kinds) + F.softplus(-apart).mean(), right


def equal_texts(texts: list[str], device: str) -> Tensor:
    """(n, n) bool: True where two captions are equal."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = torch.tensor([number[text] for text in texts], device=device)
    return rows[:, None] == rows
