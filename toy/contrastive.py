"""The losses that bring pictures and their captions together: CLIP's, and what makes the kind of thing matter."""

from __future__ import annotations

import random
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from toy import world

KIND = re.compile(rf"\b({'|'.join(world.KINDS)})\b")  # in a caption it stands before all else that could match
NAMES = [f"a photo of a {kind}" for kind in world.KINDS]


def contrast(a: Tensor, b: Tensor, temperature: Tensor | float, same: Tensor | None = None) -> tuple[Tensor, float]:
    """InfoNCE both ways between rows of a and b (CLIP, arXiv 2103.00020), and how often the partner is nearest.

    same (n, n) bool: pairs that are not partners but might be, which are left out.
    """
    with torch.autocast(a.device.type, enabled=False):  # bf16 has two digits, and the temperature is a hundredth
        logits = F.normalize(a.float(), dim=1) @ F.normalize(b.float(), dim=1).T / temperature
    if same is not None:
        logits = logits.masked_fill(same & ~torch.eye(len(a), dtype=torch.bool, device=a.device), -torch.inf)
    target = torch.arange(len(a), device=a.device)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean().item()


def other_kinds(texts: list[str], rng: random.Random) -> list[str]:
    """Each caption with another kind in the place of its own."""
    return [KIND.sub(lambda own: rng.choice([kind for kind in world.KINDS if kind != own[0]]), t, 1) for t in texts]


def tell_kinds(
    image: Tensor, text: Tensor, swapped: Tensor, names: Tensor, texts: list[str], temperature: Tensor
) -> tuple[Tensor, float]:
    """What is in the picture: its kind among the names of all kinds, and its caption against the swapped one.

    A batch holds few pictures of the same scene, colours and clothes, so that the kind alone would hardly be learned.
    The second term is NegCLIP's (arXiv 2210.01936). Also returns how often the kind is right.
    """
    image, text, swapped, names = (F.normalize(part.float(), dim=1) for part in (image, text, swapped, names))
    kinds = torch.tensor([world.KINDS.index(KIND.search(text)[0]) for text in texts], device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        logits = image @ names.T / temperature
    apart = (image * (text - swapped)).sum(1) / temperature
    right = (logits.argmax(1) == kinds).float().mean().item()
    return F.cross_entropy(logits, kinds) + F.softplus(-apart).mean(), right


def equal_texts(texts: list[str], device: str) -> Tensor:
    """(n, n) bool: which captions are the same words."""
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    rows = torch.tensor([number[text] for text in texts], device=device)
    return rows[:, None] == rows
