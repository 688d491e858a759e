"""Prompts and photos: DreamBench's lists verbatim, and every nasty file a photo folder has been seen to hold."""

import dataclasses
import struct
import zlib

import pytest
from PIL import Image, ImageCms

import subject as module
from subject import DREAMBENCH_NOUNS, DREAMBENCH_PROMPTS, TRAINING_PROMPTS, SubjectError, load_photos, load_subject
from subject import open_photo as open_


def put(folder, name="a.png", image=None, **options):
    folder.mkdir(exist_ok=True)
    (image or Image.new("RGB", (8, 6), "red")).save(folder / name, **options)
    return folder


def near(pixel, expected, tolerance=0):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def refused(match, *args, **options):
    with pytest.raises(SubjectError, match=match) as caught:
        load_subject(*args, **options)
    assert "\n" not in str(caught.value)


# ---- prompts


def test_lists_are_complete():
    for prompts, count in ((DREAMBENCH_PROMPTS, 25), (TRAINING_PROMPTS, 8)):
        for kind in ("live", "thing"):
            assert len(prompts[kind]) == len(set(prompts[kind])) == count
            assert all(prompt.count("{V} {noun}") == 1 and prompt.startswith("a ") for prompt in prompts[kind])
    assert DREAMBENCH_PROMPTS["live"][:10] == DREAMBENCH_PROMPTS["thing"][:10]
    assert DREAMBENCH_PROMPTS["live"][-5:] == DREAMBENCH_PROMPTS["thing"][-5:]
    assert not set(DREAMBENCH_PROMPTS["live"] + DREAMBENCH_PROMPTS["thing"]) & set(TRAINING_PROMPTS["live"])
    assert len(DREAMBENCH_NOUNS) == 30
    assert sum(noun in ("cat", "dog") for noun in DREAMBENCH_NOUNS.values()) == 9


@pytest.mark.parametrize(
    "prompts, kind, index, prompt",
    [
        (DREAMBENCH_PROMPTS, "live", 0, "a {V} {noun} in the jungle"),
        (DREAMBENCH_PROMPTS, "live", 9, "a {V} {noun} on top of a purple rug in a forest"),
        (DREAMBENCH_PROMPTS, "live", 13, "a {V} {noun} wearing a black top hat and a monocle"),
        (DREAMBENCH_PROMPTS, "live", 19, "a {V} {noun} in a purple wizard outfit"),
        (DREAMBENCH_PROMPTS, "live", 24, "a cube shaped {V} {noun}"),
        (DREAMBENCH_PROMPTS, "thing", 4, "a {V} {noun} on top of pink fabric"),
        (DREAMBENCH_PROMPTS, "thing", 12, "a {V} {noun} with the Eiffel Tower in the background"),
        (DREAMBENCH_PROMPTS, "thing", 15, "a {V} {noun} on top of green grass with sunflowers around it"),
        (DREAMBENCH_PROMPTS, "thing", 20, "a red {V} {noun}"),
        (TRAINING_PROMPTS, "live", 0, "a {V} {noun} wearing a green outfit"),
        (TRAINING_PROMPTS, "live", 3, "a {V} {noun} is swimming in a pool"),
        (TRAINING_PROMPTS, "live", 7, "a green {V} {noun}"),
        (TRAINING_PROMPTS, "thing", 0, "a {V} {noun} in Vincent Van Gogh rendition"),
        (TRAINING_PROMPTS, "thing", 4, "a {V} {noun} on top of wooden roof"),
        (TRAINING_PROMPTS, "thing", 7, "a {V} {noun} on a subway platform"),
    ],
)
def test_prompts_are_verbatim(prompts, kind, index, prompt):
    assert prompts[kind][index] == prompt


def test_filled_prompts(tmp_path):
    dog = load_subject(put(tmp_path / "dog"), token="sks")
    assert dog.instance_prompt == "a photo of sks dog"
    assert dog.training_prompts[1] == "a sks dog in Vincent Van Gogh rendition"
    assert dog.test_prompts[10] == "a sks dog wearing a red hat"
    can = load_subject(put(tmp_path / "can"), token="{noun}")  # an odd token is not filled in twice
    assert can.test_prompts[10] == "a {noun} can with a wheat field in the background"
    with pytest.raises(dataclasses.FrozenInstanceError):
        dog.noun = "cat"


# ---- noun and kind


@pytest.mark.parametrize(
    "folder, noun, live",
    [
        *[("dog6", "dog", True), ("cat2", "cat", True), ("bear_plushie", "stuffed animal", False)],
        *[("backpack_dog", "backpack", False), ("poop_emoji", "toy", False), ("vase", "vase", False)],
        *[("dog9", "dog", True), ("Golden_Retriever-puppy3", "golden retriever puppy", True)],
        *[("my_lamp", "my lamp", False), ("teddy-bear", "teddy bear", False), ("glasses", "glasses", False)],
        *[("our_dogs", "our dogs", True), ("corgi", "corgi", True)],
    ],
)
def test_noun_from_the_folder(tmp_path, folder, noun, live):
    subject = load_subject(put(tmp_path / folder))
    assert (subject.noun, subject.live) == (noun, live)


def test_every_dreambench_subject(tmp_path):
    for folder, noun in DREAMBENCH_NOUNS.items():
        subject = load_subject(put(tmp_path / folder))
        assert (subject.noun, subject.live) == (noun, noun in ("cat", "dog"))


def test_given_noun_and_kind_win(tmp_path, monkeypatch):
    folder = put(tmp_path / "dog6")
    assert (load_subject(folder, noun="  toy   car ").noun, load_subject(folder, noun="toy car").live) == (
        "toy car",
        False,
    )
    assert load_subject(folder, live=False).test_prompts[10].endswith("wheat field in the background")
    assert load_subject(folder, noun="gizmo", live=True).test_prompts[10] == "a [V] gizmo wearing a red hat"
    monkeypatch.chdir(folder)
    assert load_subject(".").noun == "dog"


def test_bad_nouns_and_tokens(tmp_path):
    refused("--noun", put(tmp_path / "2024-05"))
    folder = put(tmp_path / "dog")
    refused("--noun", folder, noun=" ")
    refused("token is empty", folder, token=" ")
    refused("--noun", folder, noun="do\udcffg")  # of a folder whose name is not UTF-8
    refused("the noun alone", folder, noun="[V] dog")


# ---- finding photos


def test_photos_are_found_sorted_and_the_rest_passed_over(tmp_path):
    folder = tmp_path / "dog"
    names = ["10.png", "b.JPG", "a.jpeg", "c.WebP", "d.bmp", "e.tif", "f.TIFF"]
    for name in names:
        put(folder, name)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._10.png", ".hidden.jpg", "prompts.json"):
        (folder / name).write_bytes(b"not an image")
    (folder / "more.png").mkdir()
    subject = load_subject(str(folder))
    assert [photo.name for photo in subject.photos] == sorted(names)
    assert [photo.size for photo in load_photos(subject, 16)] == [(16, 16)] * len(names)


def test_photos_that_are_not_read_are_told(tmp_path, capsys):
    for name in ("1.jpg", "2.jfif", "3.mpo"):
        Image.new("RGB", (4, 4), "red").save(tmp_path / name, "JPEG")
    for name in ("4.HEIC", "._4.HEIC"):  # macOS writes the second
        (tmp_path / name).write_bytes(b"a phone's")
    assert [photo.name for photo in load_subject(tmp_path, "dog").photos] == ["1.jpg", "2.jfif", "3.mpo"]
    out = capsys.readouterr().out
    assert "jpg: 4.HEIC\n" in out and "not read" in out


def test_a_profiles_colours_become_srgb(tmp_path):
    """In a space whose red is sRGB's green the numbers mean another colour. A broken profile counts as none."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")
    for name, profile in {"srgb": srgb, "swapped": swapped, "broken": b"no profile"}.items():
        put(tmp_path, f"{name}.png", Image.new("RGB", (4, 4), (200, 60, 40)), icc_profile=profile)
    cut_out = Image.new("RGBA", (8, 4), (200, 60, 40, 255))
    cut_out.paste((0, 0, 0, 0), (4, 0, 8, 4))
    put(tmp_path, "cut-out.png", cut_out, icc_profile=swapped)
    keyed = Image.new("RGB", (8, 4), (200, 60, 40))
    keyed.paste((1, 2, 3), (4, 0, 8, 4))
    put(tmp_path, "keyed.png", keyed, icc_profile=swapped, transparency=(1, 2, 3))
    for name in ("cut-out", "keyed"):  # half of it transparent
        left, right = (open_(tmp_path / f"{name}.png", 4).getpixel((x, 1)) for x in (0, 3))
        assert near(left, (60, 200, 40), 2) and right == (255, 255, 255)
    seen = {path.stem: open_(path, 1).getpixel((0, 0)) for path in tmp_path.iterdir()}
    assert seen["broken"] == (200, 60, 40) and near(seen["srgb"], (200, 60, 40), 1)
    assert near(seen["swapped"], (60, 200, 40), 2)


def test_bad_folders(tmp_path, monkeypatch):
    refused("does not exist", tmp_path / "absent")
    (tmp_path / "dog.png").write_bytes(b"")
    refused("is not a folder", tmp_path / "dog.png")
    (tmp_path / "empty").mkdir()
    refused("holds no photos", tmp_path / "empty")
    (tmp_path / "empty" / "IMG.HEIC").write_bytes(b"heic")
    refused("holds no photos.*heic", tmp_path / "empty")

    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", locked)  # root may read everything, so chmod would not do
    refused("cannot be read.*Permission denied", tmp_path)


def bomb(side):
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_bad_photos_are_named(tmp_path):
    folder = put(tmp_path / "dog", "good.png")
    whole = put(tmp_path / "whole", "a.jpg", Image.effect_noise((200, 200), 60)) / "a.jpg"
    png = put(tmp_path / "whole", "a.png", Image.effect_noise((200, 200), 60)) / "a.png"
    contents = {
        "text.jpg": b"a text file",
        "empty.png": b"",
        "truncated.jpg": whole.read_bytes()[: whole.stat().st_size // 2],
        "truncated.png": png.read_bytes()[: png.stat().st_size // 2],
        "bomb.png": bomb(30_000),
        "big.png": bomb(10_000),  # Pillow only warns here
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        reason = "decompression bomb" if name.startswith("b") else ""
        refused(f"{name} is not a usable image .*{reason}.*replace it", folder)
        with pytest.raises(SubjectError, match=name):
            open_(folder / name, 8)
        (folder / name).unlink()
    (folder / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    refused("link.jpg is not a usable image", folder)


def test_a_photo_that_vanishes_is_named(tmp_path):
    subject = load_subject(put(tmp_path / "dog"))
    subject.photos[0].unlink()
    with pytest.raises(SubjectError, match=r"a\.png"):
        load_photos(subject, 8)


# ---- opening photos


def saved(tmp_path, image, name="a.png", size=8, **options):
    path = put(tmp_path / "dog", name, image, **options) / name
    load_subject(path.parent)
    opened = open_(path, size)
    assert opened.mode == "RGB" and opened.size == (size, size)
    return opened


def test_centre_crop_then_lanczos(tmp_path):
    image = Image.effect_noise((40, 31), 80).convert("RGB")
    expected = image.crop((4, 0, 35, 31)).resize((16, 16), Image.Resampling.LANCZOS)
    assert saved(tmp_path, image, size=16).tobytes() == expected.tobytes()
    image = Image.effect_noise((16, 40), 80).convert("RGB")
    assert saved(tmp_path, image, size=16).tobytes() == image.crop((0, 12, 16, 28)).tobytes()


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, ending):
    """The camera stores the scene turned or mirrored: undo each of the eight ways and find red at the top left."""
    scene = Image.new("RGB", (64, 64), "blue")
    scene.paste("red", (0, 0, 32, 32))
    scene.paste("green", (32, 0, 64, 32))
    flip = Image.Transpose
    undo = [None, flip.FLIP_LEFT_RIGHT, flip.ROTATE_180, flip.FLIP_TOP_BOTTOM, flip.TRANSPOSE]
    undo += [flip.ROTATE_90, flip.TRANSVERSE, flip.ROTATE_270]  # from the upright scene to the stored one
    stored = scene if undo[orientation - 1] is None else scene.transpose(undo[orientation - 1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = saved(tmp_path, stored, f"a.{ending}", 64, exif=exif)
    corners = [opened.getpixel(place) for place in ((12, 12), (50, 12), (12, 50), (50, 50))]
    for corner, colour in zip(corners, [(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 255)], strict=True):
        assert near(corner, colour, 0 if ending in ("png", "tiff") else 6)  # JPEG and WebP are lossy


def test_one_pixel_and_48_megapixels(tmp_path):
    assert saved(tmp_path, Image.new("RGB", (1, 1), (10, 20, 30)), size=32).getpixel((31, 31)) == (10, 20, 30)
    image = Image.new("RGB", (8000, 6000), "black")
    image.paste((200, 100, 50), (1000, 0, 7000, 6000))  # exactly the centred square
    opened = saved(tmp_path, image, "large.jpg", 128)
    assert all(near(opened.getpixel(place), (200, 100, 50), 8) for place in ((1, 1), (64, 64), (126, 126)))


def test_a_large_jpeg_looks_as_if_decoded_in_full(tmp_path):
    image = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    opened = saved(tmp_path, image, "a.jpg", 64, quality=95)
    expected = image.crop((200, 0, 1400, 1200)).resize((64, 64), Image.Resampling.LANCZOS)
    pairs = zip(opened.tobytes(), expected.tobytes(), strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 4  # of 255


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk(tmp_path, name):
    opened = saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), name)
    assert near(opened.getpixel((4, 4)), (255, 0, 0), 6)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    for grey, expected in [(0, 0), (257, 1), (1000, 4), (32768, 128), (65535, 255)]:
        opened = saved(tmp_path, Image.new("I;16", (8, 8), grey), name)
        assert opened.getpixel((4, 4)) == (expected,) * 3


def test_float_grey(tmp_path):
    assert saved(tmp_path, Image.new("F", (8, 8), 0.5), "a.tif").getpixel((4, 4)) == (128,) * 3
    assert saved(tmp_path, Image.new("F", (8, 8), 200.0), "a.tif").getpixel((4, 4)) == (200,) * 3


def test_transparency_becomes_white(tmp_path):
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (8, 0, 16, 16))
    opened = saved(tmp_path, clear, size=16)
    assert (opened.getpixel((2, 8)), opened.getpixel((14, 8))) == ((255, 255, 255), (255, 0, 0))
    half = saved(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    assert near(half.getpixel((4, 4)), (127,) * 3, 1)
    grey = saved(tmp_path, Image.new("LA", (8, 8), (100, 0)))
    assert grey.getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 0, 200, 0])
    palette.paste(1, (8, 0, 16, 16))
    opened = saved(tmp_path, palette, size=16, transparency=0)
    assert (opened.getpixel((2, 8)), opened.getpixel((14, 8))) == ((255, 255, 255), (0, 200, 0))


@pytest.mark.parametrize("mode, colour, expected", [("L", 100, 100), ("1", 1, 255), ("P", 0, 0)])
def test_other_modes(tmp_path, mode, colour, expected):
    image = Image.new(mode, (8, 8), colour)
    if mode == "P":
        image.putpalette([0, 0, 0])
    assert saved(tmp_path, image).getpixel((4, 4)) == (expected,) * 3


def test_pillow_settings_are_left_alone(tmp_path):
    before = Image.MAX_IMAGE_PIXELS
    saved(tmp_path, Image.new("RGB", (8, 8)))
    assert before == module.Image.MAX_IMAGE_PIXELS
