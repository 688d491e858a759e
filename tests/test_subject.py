"""Prompts and photos: DreamBench's lists word for word, and every kind of file that a photo folder may hold."""

import dataclasses
import hashlib
import os
import struct
import zlib

import pytest
from PIL import Image, ImageCms

from subject import (
    DREAMBENCH_NOUNS,
    DREAMBENCH_PROMPTS,
    PHOTO_ENDINGS,
    SKILLS,
    TRAINING_PROMPTS,
    SubjectError,
    fill,
    load_photos,
    load_subject,
    open_photo,
)


def put(folder, name="a.png", image=None, **options):
    folder.mkdir(exist_ok=True)
    (image or Image.new("RGB", (8, 6), "red")).save(folder / name, **options)
    return folder


def saved(tmp_path, image, name="a.png", size=8, **options):
    path = put(tmp_path / "dog", name, image, **options) / name
    load_subject(path.parent)
    opened = open_photo(path, size)
    assert opened.mode == "RGB" and opened.size == (size, size)
    return opened


def colour_of(*arguments, **options):
    return saved(*arguments, **options).getpixel((4, 4))


def near(pixel, expected, tolerance=0):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def refused(match, *args, **options):
    with pytest.raises(SubjectError, match=match) as caught:
        load_subject(*args, **options)
    assert "\n" not in str(caught.value)


# ---- prompts and nouns


@pytest.mark.parametrize(
    "words, count, digest",
    [
        (DREAMBENCH_PROMPTS["live"], 25, "9326e098c349"),
        (DREAMBENCH_PROMPTS["thing"], 25, "37d835910d2e"),
        (TRAINING_PROMPTS["live"], 8, "b3e87089c2cd"),
        (TRAINING_PROMPTS["thing"], 8, "b63af5859879"),
        (DREAMBENCH_NOUNS, 30, "0ec7505aec6c"),
        (DREAMBENCH_NOUNS.values(), 30, "aef68732ff8e"),
    ],
)
def test_lists_are_the_published_ones(words, count, digest):
    """They were compared word for word with DreamBench's file and the paper's Figure 6; a change must be meant."""
    assert len(words) == count and hashlib.sha256("\n".join(words).encode()).hexdigest().startswith(digest)


def test_filled_prompts(tmp_path):
    assert DREAMBENCH_PROMPTS["live"][9] == "a {V} {noun} on top of a purple rug in a forest"
    assert TRAINING_PROMPTS["thing"][4] == "a {V} {noun} on top of wooden roof"
    dog = load_subject(put(tmp_path / "dog"), token="sks")
    assert (dog.instance_prompt, dog.class_prompt) == ("a photo of sks dog", "a photo of a dog")
    assert dog.training_prompts[1] == "a sks dog in Vincent Van Gogh rendition"
    assert dog.training_prompts[-1] == "a green sks dog" and dog.test_prompts[-1] == "a cube shaped sks dog"
    assert all(fill(prompts, "sks", "dog") for prompts in SKILLS.values())  # each has token and noun
    assert fill(SKILLS["views"][2:], "sks", "cat") == ["a back view of a sks cat", "a side view of a sks cat"]
    can = load_subject(put(tmp_path / "can"), token="{noun}")  # an odd token is not filled in twice
    assert can.test_prompts[10] == "a {noun} can with a wheat field in the background"
    with pytest.raises(dataclasses.FrozenInstanceError):
        dog.noun = "cat"


@pytest.mark.parametrize(
    "folder, noun, live",
    [
        *[(folder, noun, noun in ("cat", "dog")) for folder, noun in DREAMBENCH_NOUNS.items()],
        *[("dog9", "dog", True), ("Golden_Retriever-puppy3", "golden retriever puppy", True)],
        *[("my_lamp", "my lamp", False), ("teddy-bear", "teddy bear", False), ("glasses", "glasses", False)],
        *[("our_dogs", "our dogs", True), ("corgi", "corgi", True)],
    ],
)
def test_noun_from_the_folder(tmp_path, folder, noun, live):
    subject = load_subject(put(tmp_path / folder))
    assert (subject.noun, subject.live) == (noun, live)


def test_given_noun_and_kind_win(tmp_path, monkeypatch):
    folder = put(tmp_path / "dog6")
    car = load_subject(folder, noun="  toy   car ")
    assert (car.noun, car.live) == ("toy car", False)
    assert load_subject(folder, live=False).test_prompts[10].endswith("wheat field in the background")
    assert load_subject(folder, noun="gizmo", live=True).test_prompts[10] == "a [V] gizmo wearing a red hat"
    monkeypatch.chdir(folder)
    assert load_subject(".").noun == "dog"


def test_bad_nouns_and_tokens(tmp_path):
    refused("--noun", put(tmp_path / "2024-05"))
    folder = put(tmp_path / "dog")
    for noun in (" ", "do\udcffg"):  # the second from a folder whose name is not UTF-8
        refused("--noun", folder, noun=noun)
    refused("token is empty", folder, token=" ")
    refused("the noun alone", folder, noun="[V] dog")


# ---- finding photos


def test_photos_are_found_sorted(tmp_path):
    folder, names = tmp_path / "dog", ["10.png", "b.JPG", "a.jpeg", "c.WebP", "d.bmp", "e.tif", "f.TIFF"]
    for name in names:
        put(folder, name)
    for name in (".DS_Store", "Thumbs.db", "._10.png", ".hidden.jpg"):
        (folder / name).write_bytes(b"not an image")
    (folder / "more.png").mkdir()
    subject = load_subject(str(folder))
    assert [photo.name for photo in subject.photos] == sorted(names)
    assert [photo.size for photo in load_photos(subject, 16)] == [(16, 16)] * len(names)


@pytest.mark.parametrize("ending", sorted(PHOTO_ENDINGS - {".psd"}))  # which Pillow does not write
def test_what_pillow_reads_is_read(tmp_path, ending):
    image, options = Image.new("RGB", (16, 16), (200, 60, 40)), {}
    if Image.registered_extensions()[ending] in Image.SAVE_ALL:
        options = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
    assert near(colour_of(tmp_path, image, f"a{ending.upper()}", **options), (200, 60, 40), 4)  # the first picture's


def test_what_is_not_read_is_named(tmp_path, capsys):
    put(tmp_path, "a.jpg")
    for name in ("IMG.HEIC", "._IMG.HEIC", *(f"{i}.txt" for i in range(6))):  # macOS writes the second
        (tmp_path / name).write_bytes(b"a phone's")
    assert [photo.name for photo in load_subject(tmp_path, "dog").photos] == ["a.jpg"]
    note = "note: not read as photos: '0.txt', '1.txt', '2.txt', '3.txt', '4.txt' and 2 more; "
    assert capsys.readouterr().out == note + "convert pictures to .jpg or .png\n"


def test_names_that_are_not_utf_8(tmp_path, capsys):
    folder, name = put(tmp_path / "dog"), os.fsencode(tmp_path / "dog") + b"/caf\xe9"
    os.rename(folder / "a.png", name + b".png")
    with open(name + b".txt", "wb"):
        assert [os.fsencode(photo) for photo in load_subject(folder).photos] == [name + b".png"]
    assert "'caf\\udce9.txt'" in capsys.readouterr().out  # what UTF-8 has no bytes for is escaped


def test_bad_folders(tmp_path, monkeypatch):
    refused("cannot be read.*No such file", tmp_path / "absent")
    (tmp_path / "dog.png").write_bytes(b"")
    refused("cannot be read.*Not a directory", tmp_path / "dog.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "IMG.HEIC").write_bytes(b"heic")
    refused("holds no photos.*heic", tmp_path / "empty")

    def locked(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "iterdir", locked)  # root may read everything, so chmod would not do
    refused("cannot be read.*Permission denied", tmp_path)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, depth, colours, rows=b"", *chunks):
    """A PNG by hand: it may claim any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0)) + b"".join(chunks)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_bad_photos_are_named(tmp_path):
    folder, noise = put(tmp_path / "dog", "good.png"), Image.effect_noise((200, 200), 60)
    jpeg, whole = ((put(tmp_path / "whole", name, noise) / name).read_bytes() for name in ("a.jpg", "a.png"))
    contents = {"text.jpg": b"a text file", "empty.png": b"", "signature.png": whole[:8], "flat.png": png(0, 8, 2)}
    contents |= {"truncated.jpg": jpeg[: len(jpeg) // 2], "truncated.png": whole[: len(whole) // 2]}
    contents |= {"bomb.png": png(30_000, 8, 2), "big.png": png(10_000, 8, 2)}  # Pillow only warns of the second
    reasons = {"bomb.png": "decompression bomb", "big.png": "more than 89 million"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        refused(f"{name} is not a usable image .*{reasons.get(name, '')}.*replace it", folder)
        (folder / name).unlink()
    subject = load_subject(folder)
    (folder / "good.png").rename(tmp_path / "gone.png")
    with pytest.raises(SubjectError, match=r"good\.png"):
        load_photos(subject, 8)
    (folder / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    refused("link.jpg is not a usable image", folder)


# ---- size and orientation


def test_centre_crop_then_lanczos(tmp_path):
    image = Image.effect_noise((40, 31), 80).convert("RGB")
    expected = image.crop((4, 0, 35, 31))
    assert saved(tmp_path, image, size=16).tobytes() == expected.resize((16, 16), Image.Resampling.LANCZOS).tobytes()
    assert open_photo(tmp_path / "dog" / "a.png").tobytes() == expected.tobytes()  # in its own resolution
    image = Image.effect_noise((16, 40), 80).convert("RGB")
    assert saved(tmp_path, image, size=16).tobytes() == image.crop((0, 12, 16, 28)).tobytes()
    assert colour_of(tmp_path, Image.new("RGB", (1, 1), (10, 20, 30))) == (10, 20, 30)


@pytest.mark.parametrize(("width", "height", "own"), [(12000, 9000, 4500), (16320, 12240, 6120)])
def test_the_largest_photos_of_phones(tmp_path, width, height, own):
    """108 and 200 million pixels, of which Pillow warns and which it refuses: half the scale is decoded, or less."""
    image = Image.new("L", (width, height))
    image.paste(200, (width // 8, 0, width - width // 8, height))  # exactly the centred square
    opened = saved(tmp_path, image, "large.jpg", 128)
    assert all(near(opened.getpixel(place), (200,) * 3, 8) for place in ((1, 1), (64, 64), (126, 126)))
    assert open_photo(tmp_path / "dog" / "large.jpg").size == (own, own)


def test_a_large_jpeg_looks_as_if_decoded_in_full(tmp_path):
    image = Image.linear_gradient("L").resize((1600, 1200)).convert("RGB")
    opened = saved(tmp_path, image, "a.jpg", 64, quality=95)
    expected = image.crop((200, 0, 1400, 1200)).resize((64, 64), Image.Resampling.LANCZOS)
    assert near(opened.tobytes(), expected.tobytes(), 4)  # of 255


T = Image.Transpose
STORED = [T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270]
SCENE = Image.new("RGB", (64, 64), "blue")
SCENE.paste("red", (0, 0, 32, 32))
SCENE.paste("green", (32, 0, 64, 32))
TURNED = SCENE.transpose(T.ROTATE_90)  # as a camera stores it with orientation 6


def is_upright(path):
    opened = open_photo(path, 64)
    corners = [opened.getpixel(place) for place in ((12, 12), (50, 12), (12, 50), (50, 50))]
    colours = [(255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 255)]
    return all(near(corner, colour, 6) for corner, colour in zip(corners, colours, strict=True))  # JPEG is lossy


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    put(tmp_path, f"a.{ending}", SCENE.transpose(STORED[orientation - 2]) if orientation > 1 else SCENE, exif=exif)
    assert is_upright(tmp_path / f"a.{ending}")


def exif(*tags, end=b""):
    """EXIF with tags of (number, type, count, value or its place). With two tags, `end` is at place 38."""
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + rows + bytes(4) + end


SIX, PAST = (0x112, 3, 1, 6), 2**32 - 1
GOOD_EXIF = {
    "negative rational": exif((0x11A, 10, 1, 38), SIX, end=struct.pack("<ii", -72, 1)),
    "0/0": exif((0x11A, 5, 1, 38), SIX, end=bytes(8)),
    "offsets past the end": exif(SIX, (0x10F, 2, 50, PAST), (0x8769, 4, 1, PAST), (0x8825, 4, 1, PAST)),
    "a loop": exif(SIX, (0x8769, 4, 1, 8)),
    "an unknown type": exif(SIX, (0x10F, 99, 1, 0)),
    "two orientations": exif((0x112, 3, 2, 0x60006)),
}
BAD_EXIF = {
    "no TIFF": b"Exif\0\0no TIFF at all",
    "nothing": b"Exif\0\0",
    "cut": exif(SIX)[:18],
    "orientation as text": exif((0x112, 2, 2, ord("6"))),
    "no such orientation": exif((0x112, 3, 1, 99)),
    "orientation 0/0": exif((0x112, 5, 1, 38), (0x10F, 2, 1, 0), end=bytes(8)),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", [*GOOD_EXIF, *BAD_EXIF])
def test_only_the_orientation_is_read_of_exif(tmp_path, name, ending, recwarn):
    put(tmp_path, f"a.{ending}", TURNED if name in GOOD_EXIF else SCENE, exif=(GOOD_EXIF | BAD_EXIF)[name])
    assert is_upright(tmp_path / f"a.{ending}") and not recwarn.list


LONG, XMP, RAW = b"x" * 2**21, b'<x:xmp tiff:Orientation="6"/>', b"\nexif\n  9\n" + exif(SIX).hex().encode()
PICTURES = b"MPF\0" + exif((0xB001, 4, 1, 3), (0xB002, 7, 5, 38), end=b"short")[6:]
UNNEEDED = {  # Pillow refuses each
    "a long text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "a long UTF-8 text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(LONG)),
    "a wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-4] + b"1234",
    "unknown compression": chunk(b"zTXt", b"Comment\0\7xx"),
    "cut values": chunk(b"pHYs", b"1") + chunk(b"gAMA", b"1") + chunk(b"cHRM", b"1") + chunk(b"sRGB", b""),
    "frames out of order": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 5, 64, 64, 0, 0, 1, 1, 0, 0)),
    "a broken profile": chunk(b"iCCP", b"no end") + chunk(b"iCCP", b"p\0\0no zlib"),
    "a JPEG's short list of pictures": b"\xff\xe2" + struct.pack(">H", len(PICTURES) + 2) + PICTURES,
}
ORIENTATIONS = {
    "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP + LONG),
    "ImageMagick's": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),
    "a JPEG's XMP": b"\xff\xe1\0\x3c" + b"http://ns.adobe.com/xap/1.0/\0" + XMP,
}


@pytest.mark.parametrize("name", [*UNNEEDED, *ORIENTATIONS])
def test_metadata_never_makes_a_photo_unusable(tmp_path, name):
    path = tmp_path / ("a.jpg" if "JPEG" in name else "a.png")
    (SCENE if name in UNNEEDED else TURNED).save(path)
    content, start = path.read_bytes(), 2 if "JPEG" in name else 33
    for place in (start,) if "JPEG" in name else (start, len(content) - 12):  # also behind a PNG's pixels
        path.write_bytes(content[:place] + (UNNEEDED | ORIENTATIONS)[name] + content[place:] + b"trailing bytes")
        assert is_upright(path)


# ---- colours

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CURVE = b"para\0\0\0\0\0\3\0\0" + struct.pack(">i", round(2.4 * 65536))
LINEAR = SRGB.replace(CURVE, b"para" + bytes(8) + struct.pack(">i", 65536))  # its 64 of 255 is sRGB's 137
LINEAR_GREY = (LINEAR[:16] + b"GRAY" + LINEAR[20:]).replace(b"rTRC", b"kTRC")
PLACE, END = LINEAR_GREY.index(b"kTRC") + 4, len(LINEAR_GREY) + 2**21  # of its curve
LARGE = LINEAR_GREY[:PLACE] + struct.pack(">I", END) + LINEAR_GREY[PLACE + 4 :] + bytes(2**21)
LARGE = struct.pack(">I", END + 32) + LARGE[4:] + b"para" + bytes(8) + struct.pack(">i", 65536) + bytes(16)


def indexed(*colours):
    """A palette image, its right half of the last colour."""
    image = Image.new("P", (24, 16))
    image.putpalette(sum(colours, ()))
    image.paste(len(colours) - 1, (12, 0, 24, 16))
    return image


@pytest.mark.parametrize("ending", ["png", "tif", "jpg", "webp"])
@pytest.mark.parametrize(
    "image, profile",
    [
        (Image.new("RGB", (16, 16), (64, 64, 64)), LINEAR),
        (Image.new("RGBA", (16, 16), (64, 64, 64, 255)), LINEAR),
        (indexed((64, 64, 64)), LINEAR),
        (Image.new("L", (16, 16), 64), LINEAR),
        (Image.new("L", (16, 16), 64), LINEAR_GREY),
        (Image.new("L", (16, 16), 64), LARGE),
        (Image.new("LA", (16, 16), (64, 255)), LINEAR_GREY),
        (Image.new("I;16", (16, 16), 64 * 257), LINEAR_GREY),
    ],
)
def test_a_profile_counts_in_every_mode(tmp_path, image, profile, ending):
    kept = {"png": True, "tif": True, "jpg": image.mode in ("L", "RGB"), "webp": image.mode.startswith("RGB")}
    if kept[ending]:
        assert near(colour_of(tmp_path, image, f"a.{ending}", icc_profile=profile), (137,) * 3, 1)
        assert near(colour_of(tmp_path, image, f"a.{ending}", icc_profile=b"broken"), (64,) * 3, 1)


@pytest.mark.parametrize("profile", [None, LINEAR, LINEAR_GREY])
@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_a_profile_of_another_mode_is_ignored(tmp_path, ending, profile):
    cmyk, rgb = Image.new("CMYK", (16, 16), (0, 127, 127, 0)), Image.new("RGB", (16, 16), (255, 128, 128))
    assert near(colour_of(tmp_path, cmyk, f"a.{ending}", icc_profile=profile), (255, 128, 128), 6)
    assert profile is LINEAR or near(colour_of(tmp_path, rgb, f"a.{ending}", icc_profile=profile), (255, 128, 128), 6)


@pytest.mark.parametrize(
    "mode, values",
    [
        ("I;16", {0: 0, 257: 1, 1000: 4, 60000: 233, 65535: 255}),
        ("F", {0.5: 128, 200.0: 200}),  # up to 1 or up to 255
        ("1", {0: 0, 1: 255}),
    ],
)
def test_deep_greys_are_scaled_not_clipped(tmp_path, mode, values):
    for grey, expected in values.items():
        assert colour_of(tmp_path, Image.new(mode, (8, 8), grey), "a.tif") == (expected,) * 3
    keyed = png(2, 16, 0, b"\0\0\0\xff\xff" * 2, chunk(b"tRNS", b"\1\0"))  # 256 is transparent, and not black
    (tmp_path / "b.png").write_bytes(keyed)
    assert open_photo(tmp_path / "b.png", 2).getpixel((0, 0)) == (0, 0, 0)


def test_transparency_becomes_white(tmp_path):
    clear, palette = Image.new("RGBA", (24, 16), (0, 0, 0, 0)), indexed((0, 0, 0), (64, 0, 255))
    clear.paste((64, 0, 255, 255), (12, 0, 24, 16))
    keys = [(clear.convert("RGB"), (0, 0, 0)), (palette, 0), (palette, b"\0\xff")]
    for image, options in [(clear, {}), *((image, {"transparency": key}) for image, key in keys)]:
        opened = saved(tmp_path, image, size=16, icc_profile=LINEAR, **options)
        assert opened.getpixel((7, 8)) == (255, 255, 255) and near(opened.getpixel((8, 8)), (137, 0, 255), 1)
    assert near(colour_of(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (127,) * 3, 1)


@pytest.mark.parametrize(
    "image, name, options",
    [
        *[(Image.new("RGBA", (8, 8), (90, 90, 90, 0)), f"a.{ending}", {}) for ending in ("png", "tga", "tif")],
        (Image.new("RGBA", (8, 8), (90, 90, 90, 0)), "a.webp", {"lossless": True, "exact": True}),
        (Image.new("LA", (8, 8), (90, 0)), "a.png", {}),
        (Image.new("L", (8, 8), 90), "a.png", {"transparency": 90}),
        (indexed((90, 90, 90)), "a.png", {"transparency": 0}),
    ],
)
def test_an_alpha_of_zeros_is_ignored(tmp_path, image, name, options):
    """Some programs write it for opaque pictures; the photo would become a white square."""
    assert colour_of(tmp_path, image, name, **options) == (90, 90, 90)
