"""Photos of every kind that a folder may hold: formats, sizes, orientation, colours, transparency, broken files."""

import re
import struct
import zlib

import pytest
from PIL import Image, ImageCms

from model.files.photo import PHOTO_ENDINGS, SubjectError, open_photo


def put(folder, name, image, **options):
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def saved(tmp_path, image, name="a.png", size=8, **options):
    opened = open_photo(put(tmp_path / "dog", name, image, **options), size)
    assert opened.mode == "RGB" and opened.size == (size, size)
    return opened


def colour_of(*arguments, **options):
    return saved(*arguments, **options).getpixel((4, 4))


def near(pixel, expected, tolerance=0):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize("ending", sorted(PHOTO_ENDINGS - {".psd"}))  # which Pillow does not write
def test_what_pillow_reads_is_read(tmp_path, ending):
    image, options = Image.new("RGB", (16, 16), (200, 60, 40)), {}
    if Image.registered_extensions()[ending] in Image.SAVE_ALL:
        options = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
    assert near(colour_of(tmp_path, image, f"a{ending.upper()}", **options), (200, 60, 40), 4)  # the first picture's


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side, depth, colours, rows=b"", *chunks):
    """A PNG by hand: it may claim any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0)) + b"".join(chunks)
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_bad_photos_are_named(tmp_path):
    noise = Image.effect_noise((200, 200), 60)
    jpeg, whole = (put(tmp_path / "whole", name, noise).read_bytes() for name in ("a.jpg", "a.png"))
    contents = {"text.jpg": b"a text file", "empty.png": b"", "signature.png": whole[:8], "flat.png": png(0, 8, 2)}
    contents |= {"truncated.jpg": jpeg[: len(jpeg) // 2], "truncated.png": whole[: len(whole) // 2]}
    contents |= {"bomb.png": png(30_000, 8, 2), "big.png": png(10_000, 8, 2)}  # Pillow only warns of the second
    reasons = {"bomb.png": "decompression bomb", "big.png": "more than 89 million"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    for name in (*contents, "link.jpg"):
        words = f"{name} is not a usable image .*{reasons.get(name, '')}.*replace it"
        with pytest.raises(SubjectError, match=words) as caught:
            open_photo(tmp_path / name)
        assert "\n" not in str(caught.value)


# ---- size and orientation


def test_a_small_photo_is_enlarged_with_a_note(tmp_path, capsys):
    image = Image.effect_noise((20, 15), 80).convert("RGB")
    saved(tmp_path, image, size=15)
    assert capsys.readouterr().out == ""
    assert saved(tmp_path, image, size=16).size == (16, 16)
    assert re.fullmatch("note: .*a.png is enlarged from 15 to 16 pixels: .*\n", capsys.readouterr().out)


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
    scene = SCENE.transpose(STORED[orientation - 2]) if orientation > 1 else SCENE
    assert is_upright(put(tmp_path, f"a.{ending}", scene, exif=exif))


def exif(*tags, end=b""):
    """EXIF with tags of (number, type, count, value or its place). With two tags, `end` is at place 38."""
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + rows + bytes(4) + end


SIX, PAST = (0x112, 3, 1, 6), 2**32 - 1
GOOD_EXIF = {
    "negative rational": exif((0x11A, 10, 1, 38), SIX, end=struct.pack("<ii", -72, 1)),
    "offsets past the end": exif(SIX, (0x10F, 2, 50, PAST), (0x8769, 4, 1, PAST), (0x8825, 4, 1, PAST)),
    "two orientations": exif((0x112, 3, 2, 0x60006)),
}
BAD_EXIF = {
    "no TIFF": b"Exif\0\0no TIFF at all",
    "orientation as text": exif((0x112, 2, 2, ord("6"))),
    "no such orientation": exif((0x112, 3, 1, 99)),
}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("name", [*GOOD_EXIF, *BAD_EXIF])
def test_only_the_orientation_is_read_of_exif(tmp_path, name, ending, recwarn):
    path = put(tmp_path, f"a.{ending}", TURNED if name in GOOD_EXIF else SCENE, exif=(GOOD_EXIF | BAD_EXIF)[name])
    assert is_upright(path) and not recwarn.list


LONG, XMP, RAW = b"x" * 2**21, b'<x:xmp tiff:Orientation="6"/>', b"\nexif\n  9\n" + exif(SIX).hex().encode()
PICTURES = b"MPF\0" + exif((0xB001, 4, 1, 3), (0xB002, 7, 5, 38), end=b"short")[6:]
UNNEEDED = {  # Pillow refuses each
    "a long text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LONG)),
    "a wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-4] + b"1234",
    "cut values": chunk(b"pHYs", b"1") + chunk(b"gAMA", b"1") + chunk(b"cHRM", b"1") + chunk(b"sRGB", b""),
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
        (indexed((64, 64, 64)), LINEAR),
        (Image.new("L", (16, 16), 64), LINEAR),
        (Image.new("L", (16, 16), 64), LINEAR_GREY),
        (Image.new("L", (16, 16), 64), LARGE),
        (Image.new("LA", (16, 16), (64, 255)), LINEAR_GREY),
    ],
)
def test_a_profile_counts_in_every_mode(tmp_path, image, profile, ending):
    kept = {"png": True, "tif": True, "jpg": image.mode in ("L", "RGB"), "webp": image.mode == "RGB"}
    if kept[ending]:
        assert near(colour_of(tmp_path, image, f"a.{ending}", icc_profile=profile), (137,) * 3, 1)
        assert near(colour_of(tmp_path, image, f"a.{ending}", icc_profile=b"broken"), (64,) * 3, 1)


@pytest.mark.parametrize("profile", [None, LINEAR, LINEAR_GREY])
@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_a_profile_of_another_mode_is_ignored(tmp_path, ending, profile):
    cmyk, rgb = Image.new("CMYK", (16, 16), (0, 127, 127, 0)), Image.new("RGB", (16, 16), (255, 128, 128))
    assert near(colour_of(tmp_path, cmyk, f"a.{ending}", icc_profile=profile), (255, 128, 128), 6)
    assert profile is LINEAR or near(colour_of(tmp_path, rgb, f"a.{ending}", icc_profile=profile), (255, 128, 128), 6)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_are_refused(tmp_path, mode):
    with pytest.raises(SubjectError, match=r"a\.tif is not a usable image .*convert it to 8 bits"):
        saved(tmp_path, Image.new(mode, (8, 8)), "a.tif")


def test_transparency_becomes_white(tmp_path):
    clear, palette = Image.new("RGBA", (24, 16), (0, 0, 0, 0)), indexed((0, 0, 0), (64, 0, 255))
    clear.paste((64, 0, 255, 255), (12, 0, 24, 16))
    keys = [(clear.convert("RGB"), (0, 0, 0)), (palette, 0), (palette, b"\0\xff")]
    for image, options in [(clear, {}), *((image, {"transparency": key}) for image, key in keys)]:
        opened = saved(tmp_path, image, size=16, icc_profile=LINEAR, **options)
        assert opened.getpixel((7, 8)) == (255, 255, 255) and near(opened.getpixel((8, 8)), (137, 0, 255), 1)
    assert near(colour_of(tmp_path, Image.new("RGBA", (8, 8), (0, 0, 0, 128))), (127,) * 3, 1)


def test_an_alpha_of_zeros_is_ignored(tmp_path):
    """Some programs write it for opaque pictures; the photo would become a white square."""
    clear, exact = Image.new("RGBA", (8, 8), (90, 90, 90, 0)), {"lossless": True, "exact": True}
    for image, name, options in (
        (clear, "a.tif", {}),
        (clear, "a.webp", exact),
        (Image.new("LA", (8, 8), (90, 0)), "a.png", {}),
        (indexed((90, 90, 90)), "a.png", {"transparency": 0}),
    ):
        assert colour_of(tmp_path, image, name, **options) == (90, 90, 90)
