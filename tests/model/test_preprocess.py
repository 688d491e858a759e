"""The networks' inputs are what the public processors give, at the published settings and the toy's.

The tolerance is zero. transformers without torchvision resizes with Pillow on the 8-bit picture, as we do, and what
follows (a crop, a product, a difference, a quotient) is done in the same order and precision, so every bit is equal.
"""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from model.align import ALIGN, ALIGNConfig, ALIGNPreprocessor
from model.clip import CLIPPreprocessor
from model.dino import DINOPreprocessor
from model.files.config import config_from
from model.files.errors import CheckpointError
from toy.networks import PREPROCESSORS as TOY

# The public preprocessor_config.json of each. The toy's files have the later spelling of sizes: {"shortest_edge": 128}.
PUBLISHED = {
    "align": {
        "do_resize": True,
        "size": {"height": 346, "width": 346},
        "resample": 2,
        "do_center_crop": True,
        "crop_size": {"height": 289, "width": 289},
        "do_rescale": True,
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
        "do_normalize": False,
        "include_top": False,
    },
    "clip": {
        "do_resize": True,
        "size": 224,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 224,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "dino": {
        "do_resize": True,
        "size": 224,
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
SIDES = {"align": (289, 64), "clip": (224, 128), "dino": (224, 128)}  # published, toy
OURS = {"align": ALIGNPreprocessor, "clip": CLIPPreprocessor, "dino": DINOPreprocessor}
THEIRS = {"align": EfficientNetImageProcessorPil, "clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}
# Wide, tall, odd, even; the sizes at which the short edge or the crop leaves half a pixel; one pixel; enlarged; exact.
SIZES = [(601, 400), (333, 512), (257, 255), (225, 224), (224, 231), (129, 128), (1, 1), (3, 2), (7, 90), (346, 346)]


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def from_file(image, kind):
    """The picture as a file of that kind gives it back."""
    file = io.BytesIO()
    image.save(file, kind)
    return Image.open(file)


def pictures():
    """Photographs, odd sizes in colour, and the modes that a picture file comes in; subject.py makes others RGB."""
    photos = [Image.open(path) for path in sorted((Path(__file__).parents[2] / "data" / "dog").glob("*.png"))]
    assert photos
    wide = noise(301, 200)
    modes = [wide.convert("L"), wide.convert("1"), from_file(wide.convert("CMYK"), "JPEG"), from_file(wide, "GIF")]
    return [*photos, *(noise(*size) for size in SIZES), *modes]


def pixels(kind, settings, *images):
    """What our network sees, with these settings in preprocessor_config.json."""
    return config_from(OURS[kind], settings)(images)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("where", ["published", "toy"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_bit_is_the_public_processors(kind, where):
    settings = (PUBLISHED if where == "published" else TOY)[kind]
    side = SIDES[kind][where == "toy"]
    theirs = THEIRS[kind](**settings)
    images = pictures()
    before = [image.tobytes() for image in images]
    got = pixels(kind, settings, *images)
    assert got.shape == (len(images), 3, side, side) and got.dtype == torch.float32 and got.is_contiguous()
    for image, ours in zip(images, got, strict=True):
        expected = theirs(image.convert("RGB"), return_tensors="pt").pixel_values[0]
        assert torch.equal(ours, expected), (image.size, image.mode, (ours - expected).abs().max())
    assert [image.tobytes() for image in images] == before


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_settings_the_published_ones_hold(kind):
    image = noise(333, 512)
    assert torch.equal(pixels(kind, PUBLISHED[kind], image), pixels(kind, {}, image))
    if kind == "align":
        with torch.device("meta"):
            assert torch.equal(ALIGN(ALIGNConfig()).preprocess([image]), pixels(kind, {}, image))


def test_other_forms_of_a_size_are_refused():
    for kind, form, sizes in (
        ("clip", "shortest_edge", [{}, {"shortest_edge": "40"}, {"height": 40, "width": 40}]),
        ("dino", "height and width", [{"height": 40}, {"height": 40, "width": 41}, {"shortest_edge": 40}]),
    ):
        for size in sizes:
            with pytest.raises(CheckpointError, match=rf"^FILE: size .* should be one number, or hold it as {form}$"):
                config_from(OURS[kind], {"size": size}, "FILE")
