"""randomness.py: every stream is a function of the seed and its place, and no two share their numbers."""

import torch

from support.randomness import NEGATIVES, TEST, VALIDATION, adapter_generator, picture_seeds, step_generator


def numbers(seed):
    generators = [*(step_generator(seed, step) for step in (1, 2, 3)), adapter_generator(seed)]
    pictures = [number for stream in (TEST, NEGATIVES, VALIDATION) for number in picture_seeds(seed, stream, 8)]
    return [torch.randint(2**62, (1,), generator=generator).item() for generator in generators] + pictures


def test_streams_repeat_and_differ():
    first = numbers(0)
    everything = {*first, *numbers(1), *numbers(2**63 - 1)}
    assert first == numbers(0) and len(everything) == 3 * 28
    assert picture_seeds(0, TEST, 3) == picture_seeds(0, TEST, 8)[:3]
    # A later version has to draw the same, or a result could not be repeated.
    assert (first[0], first[3]) == (3052078961796588334, 2183101596413385407)
    assert picture_seeds(0, NEGATIVES, 2) == [2613022947, 1532590702]
