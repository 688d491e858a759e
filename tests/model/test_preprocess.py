"""The networks' inputs are what the public processors give, at the published settings and the toy's.

The tolerance is zero. transformers without torchvision resizes with Pillow on the 8-bit picture, as we do, and what
follows (a crop, a product, a difference, a quotient) is done in the same order and precision, so every bit is equal.
"""

import functools
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

PUBLISHED = {
    "align": {  # kakaobrain/align-base
        "crop_size": {"height": 289, "width": 289},
        "do_center_crop": True,
        "do_normalize": False,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "include_top": False,
        "resample": 2,
        "rescale_factor": 0.00784313725490196,
        "rescale_offset": True,
        "size": {"height": 346, "width": 346},
    },
    "clip": {  # openai/clip-vit-base-patch16, and patch32, and large-patch14
        "crop_size": 224,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": 224,
    },
    "dino": {  # facebook/dino-vits16
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 2,
        "size": 224,
    },
}
SIDES = {"align": (289, 64), "clip": (224, 128), "dino": (224, 128)}  # published, toy
OURS = {"align": ALIGNPreprocessor, "clip": CLIPPreprocessor, "dino": DINOPreprocessor}
THEIRS = {"align": EfficientNetImageProcessorPil, "clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}
# Wide, tall, odd, even; the sizes at which the short edge or the crop leaves half a pixel; one pixel; enlarged; exact.
SIZES = [(601, 400), (333, 512), (257, 255), (225, 224), (224, 231), (129, 128), (1, 1), (3, 2), (7, 90), (346, 346)]


@functools.cache
def smooth(width, height, channels=3):
    """A random smooth picture, as a photograph is: a few broad waves and some grain, (height, width, channels)."""
    draws = np.random.default_rng((0, width, height))
    y, x = np.mgrid[0:height, 0:width][..., None] / max(width, height)
    field = sum(np.sin(a * x + b * y + c) for a, b, c in draws.uniform(-12, 12, (4, 3, channels)))
    field = 127 + 40 * field + draws.normal(0, 6, (height, width, channels))
    return field.clip(0, 255).astype(np.uint8)


def from_file(image, kind, **options):
    """The picture as a file of that kind gives it back."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def photographs():
    """Odd sizes in colour, and every mode that a picture file comes in."""
    photos = [Image.open(path) for path in sorted((Path(__file__).parents[2] / "data" / "dog").glob("*.png"))]
    assert photos
    colour = [Image.fromarray(smooth(*size)) for size in SIZES]
    wide = Image.fromarray(smooth(301, 200))
    clear = Image.fromarray(smooth(199, 302, 4))  # with an alpha channel
    modes = [wide.convert("L"), wide.convert("1"), from_file(wide.convert("CMYK"), "JPEG"), clear, clear.convert("LA")]
    palettes = [from_file(wide.quantize(16), "GIF"), from_file(wide.quantize(16), "GIF", transparency=3)]
    palettes += [from_file(clear.quantize(64), "PNG"), from_file(wide.quantize(16), "PNG", transparency=3)]
    assert {image.mode for image in palettes} == {"P"}
    return [*photos, *colour, *modes, *palettes]


def pixels(kind, settings, *images):
    """What our network sees, with these settings in preprocessor_config.json."""
    return config_from(OURS[kind], settings)(images)


def in_colour(image):
    """RGB, transparency on white, as subject.py opens a photo."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("where", ["published", "toy"])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_bit_is_the_public_processors(kind, where):
    """The toy's files have the later spelling of sizes, such as {"shortest_edge": 128} for 128."""
    settings = (PUBLISHED if where == "published" else TOY)[kind]
    side = SIDES[kind][where == "toy"]
    theirs = THEIRS[kind](**settings)
    for image in photographs():
        # subject.py chooses the colour under transparency; the preprocessor converts all other modes.
        given = in_colour(image) if image.has_transparency_data else image
        expected = theirs(in_colour(image), return_tensors="pt").pixel_values
        got = pixels(kind, settings, given)
        assert got.shape == expected.shape == (1, 3, side, side) and got.dtype == torch.float32
        assert torch.equal(got, expected), (image.size, image.mode, (got - expected).abs().max())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_without_settings_the_published_ones_hold(kind):
    image = Image.fromarray(smooth(333, 512))
    assert torch.equal(pixels(kind, PUBLISHED[kind], image), pixels(kind, {}, image))
    if kind == "align":
        with torch.device("meta"):
            assert torch.equal(ALIGN(ALIGNConfig()).preprocess([image]), pixels(kind, {}, image))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_batch_is_its_photographs_one_by_one(kind):
    images = [Image.fromarray(smooth(*size)) for size in SIZES[:3]]
    copies = [image.copy() for image in images]
    one_by_one = [pixels(kind, {}, image) for image in images]
    together = pixels(kind, {}, *images)
    assert torch.equal(together, torch.cat(one_by_one)) and together.is_contiguous()
    assert images == copies


def test_other_forms_of_a_size_are_refused():
    for kind, form, sizes in (
        ("clip", "shortest_edge", [{}, {"shortest_edge": "40"}, {"height": 40, "width": 40}]),
        ("dino", "height and width", [{"height": 40}, {"height": 40, "width": 41}, {"shortest_edge": 40}]),
    ):
        for size in sizes:
            with pytest.raises(CheckpointError, match=rf"^FILE: size .* should be one number, or hold it as {form}$"):
                config_from(OURS[kind], {"size": size}, "FILE")
