"""Every random stream of the program, in one table. A stream depends on --seed and its place alone, so a resumed run
draws the same numbers, and no two places share theirs.

| stream | entropy: the seed, the place | who draws from it |
|---|---|---|
| step | (seed, step, 1) | train.py, once a gradient step: photos, negatives, labels, latents, t, ε, in this order |
| step | (seed, 2^31 + step, 1) | baselines/release.py: the negatives' t |
| adapters | (seed, 0, 2) | the first weights of LoRA |
| TEST | (seed, 2) | evaluate.py's pictures |
| NEGATIVES | (seed, 3) | train.py's pictures by θ₀: negatives, or a baseline's class images |
| VALIDATION | (seed, 4) | train.py's validation pictures, the same noise each time |

DPG's critic has a generator of its own, from --seed alone. In sample.py --seed itself is the first picture's seed.
"""

from __future__ import annotations

import numpy as np
import torch

TEST, NEGATIVES, VALIDATION = 2, 3, 4


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of all draws of one gradient step."""
    return _generator(seed, step, 1)


def adapter_generator(seed: int) -> torch.Generator:
    """The CPU generator of LoRA's first weights."""
    return _generator(seed, 0, 2)


def picture_seeds(seed: int, stream: int, count: int) -> list[int]:
    """A seed for each of `count` pictures of a stream: TEST, NEGATIVES or VALIDATION."""
    return np.random.SeedSequence([seed, stream]).generate_state(count).tolist()


def _generator(*entropy: int) -> torch.Generator:
    words = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))
