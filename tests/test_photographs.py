"""What the networks see of a photograph is what the public processors give, at the published settings and the toy's.

The tolerance is zero. transformers without torchvision resizes with Pillow on the 8-bit picture, as we do, and what
follows (a crop, a product, a difference, a quotient) is done in the same order and precision, so every bit is equal.
With torchvision its processors resize with torch instead: the last test says how far from Pillow that is.
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

from model.align import ALIGN, ALIGNConfig
from model.clip import CLIP, CLIPConfig, CLIPPictures
from model.dino import DINO, DINOConfig, DINOPictures
from model.files.config import config_from
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
PROCESSORS = {"align": EfficientNetImageProcessorPil, "clip": CLIPImageProcessorPil, "dino": ViTImageProcessorPil}
# Wide, tall, odd, even; the sizes at which the short edge or the crop leaves half a pixel; one pixel; enlarged; exact.
SIZES = [(601, 400), (333, 512), (257, 255), (225, 224), (224, 231), (129, 128), (1, 1), (3, 2), (7, 90), (346, 346)]


@functools.cache
def smooth(width, height, channels=3, seed=0):
    """A random smooth picture, as a photograph is: a few broad waves and some grain, (height, width, channels)."""
    draws = np.random.default_rng((seed, width, height))
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
    photos = [Image.open(path) for path in sorted((Path(__file__).parent.parent / "data" / "dog").glob("*.png"))]
    assert photos
    colour = [Image.fromarray(smooth(*size)) for size in SIZES]
    wide = Image.fromarray(smooth(301, 200))
    clear = Image.fromarray(smooth(199, 302, 4))  # with an alpha channel
    modes = [wide.convert("L"), wide.convert("1"), from_file(wide.convert("CMYK"), "JPEG"), clear, clear.convert("LA")]
    palettes = [from_file(wide.quantize(16), "GIF"), from_file(wide.quantize(16), "GIF", transparency=3)]
    palettes += [from_file(clear.quantize(64), "PNG"), from_file(wide.quantize(16), "PNG", transparency=3)]
    assert {image.mode for image in palettes} == {"P"}
    return [*photos, *colour, *modes, *palettes]


def network(kind, side, settings):
    """Our network's way with pictures, its settings read as from preprocessor_config.json. It needs no weights, and
    as few layers as there can be."""
    shallow = {"num_hidden_layers": 1}
    with torch.device("meta"):
        if kind == "align":
            values = {"text_config": shallow, "vision_config": {"depth_coefficient": 0.1}}
            return ALIGN(ALIGNConfig.from_json(values, settings))
        if kind == "clip":
            sees = {"image_size": side, "patch_size": 16} | shallow
            config = config_from(CLIPConfig, {"text_config": shallow, "vision_config": sees})
            return CLIP(config, config_from(CLIPPictures, settings))
        return DINO(DINOConfig(image_size=side, **shallow), config_from(DINOPictures, settings))


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
    settings = (PUBLISHED if where == "published" else TOY)[kind]
    side = SIDES[kind][where == "toy"]
    ours, theirs = network(kind, side, settings), PROCESSORS[kind](**settings)
    for image in photographs():
        # Which colour lies under transparency is subject.py's to say; all other modes are the network's own to convert.
        given = in_colour(image) if image.has_transparency_data else image
        expected = theirs(in_colour(image), return_tensors="pt").pixel_values
        got = ours.preprocess([given])
        assert got.shape == expected.shape == (1, 3, side, side) and got.dtype == torch.float32
        assert torch.equal(got, expected), (image.size, image.mode, (got - expected).abs().max())


def test_without_settings_the_published_ones_hold():
    image = Image.fromarray(smooth(333, 512))
    for kind, settings in PUBLISHED.items():
        given, assumed = (network(kind, SIDES[kind][0], each).preprocess([image]) for each in (settings, {}))
        assert torch.equal(given, assumed), kind


@pytest.mark.parametrize("settings", PUBLISHED.values(), ids=PUBLISHED)
def test_a_batch_is_its_photographs_one_by_one(settings):
    kind = next(kind for kind, values in PUBLISHED.items() if values is settings)
    ours = network(kind, SIDES[kind][0], settings)
    images = [Image.fromarray(smooth(*size)) for size in SIZES[:3]]
    copies = [image.copy() for image in images]
    assert torch.equal(ours.preprocess(images), torch.cat([ours.preprocess([image]) for image in images]))
    assert images == copies


@pytest.mark.parametrize("older", [{"size": {"shortest_edge": 224}}, {"crop_size": {"height": 224, "width": 224}}])
def test_both_spellings_of_a_size(older):
    """CLIP's files say 224 in early commits and {"shortest_edge": 224} in later ones."""
    image = Image.fromarray(smooth(333, 512))
    new, old = (network("clip", 224, PUBLISHED["clip"] | changed).preprocess([image]) for changed in ({}, older))
    assert torch.equal(new, old)


def test_the_settings_matter():
    """A wrong filter, crop or scale is not within any rounding: the comparison above would fail."""
    image = Image.fromarray(smooth(601, 400))
    for kind, change in [
        ("align", {"resample": 3}),
        ("align", {"crop_size": {"height": 289, "width": 289}, "size": {"height": 347, "width": 346}}),
        ("align", {"rescale_factor": 1 / 120}),
        ("clip", {"resample": 2}),
        ("clip", {"size": 225}),
        ("dino", {"resample": 3}),
        ("dino", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    ]:
        side = SIDES[kind][0]
        right, wrong = (network(kind, side, PUBLISHED[kind] | changed).preprocess([image]) for changed in ({}, change))
        assert (right - wrong).abs().max() > 0.02, (kind, change)


@pytest.mark.parametrize(("name", "resample"), [("bilinear", 2), ("bicubic", 3)])
def test_torchs_own_resize_is_levels_away(name, resample):
    """What torchvision would change: its antialiased resize of 8-bit pictures is Pillow's to a level or two of 255.

    Measured: 2 at most, and less than a quarter of the values are off at all. At CLIP's std of 0.26, two levels are
    0.03 in the network's input. Published scores come from either.
    """
    for size in SIZES:
        pixels = smooth(*size)
        pillow = np.asarray(Image.fromarray(pixels).resize((224, 224), resample)).astype(int)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        other = torch.nn.functional.interpolate(tensor, (224, 224), mode=name, antialias=True, align_corners=False)
        levels = np.abs(other[0].permute(1, 2, 0).numpy().astype(int) - pillow)
        assert levels.max() <= 2 and levels.mean() < 0.3
