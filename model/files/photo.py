"""Photos as phones, cameras and programs write them: which files are photos, and how one becomes an RGB picture."""

import warnings
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

_JPEG_2000 = ".jp2 .j2k .j2c .jpc .jpf .jpx"
_COMMON = ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .avif .gif .bmp .dib .tif .tiff"
PHOTO_ENDINGS = frozenset(f"{_COMMON} {_JPEG_2000} .tga .ppm .pgm .pbm .pnm .pcx .psd .qoi .sgi".split())
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_ORIENTATIONS = (b"XML:com.adobe.xmp\0\0", b"Raw profile type exif\0")  # texts that Pillow reads for it


class SubjectError(ValueError):
    """A subject that cannot be used. The message is one line: what is wrong, where, what to do."""


def open_photo(path: Path | str, size: int | None = None) -> Image.Image:
    """A photo as an 8-bit RGB image of size x size pixels, by default in its own resolution.

    It is turned upright by its EXIF orientation and cut to the largest centred square; the colours of its ICC profile
    become sRGB; transparency becomes white; it is resized with Lanczos.
    Prints a line if it is enlarged. Raises SubjectError if the file is not a whole image, or has too many pixels or
    bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about metadata and many pixels
            image = _open(Path(path).read_bytes(), size)
            with suppress(Exception):  # broken EXIF; in place, it turns the image before it rewrites the EXIF
                ImageOps.exif_transpose(image, in_place=True)
            square = _centred_square(image)
        size = size or square.width
        if square.width < size:
            print(f"note: {path} is enlarged from {square.width} to {size} pixels: a larger photo is better")
        return square.resize((size, size), Image.Resampling.LANCZOS)
    except Exception as error:  # for bad data Pillow raises OSError, SyntaxError, struct.error and others
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "damaged, or of an unknown format" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise SubjectError(f"{path} is not a usable image ({reason}): replace it, shrink it or take it out") from None


def _open(data: bytes, size: int | None) -> Image.Image:
    """Decode an image file's content, a JPEG at 1, 1/2, 1/4 or 1/8 of its scale with at least 2 x size pixels a side.

    A JPEG of more pixels than Pillow's limit is decoded at half its scale or less. Raises ValueError for other formats.
    """
    # Image.open would refuse a JPEG of 200 million pixels
    image = JpegImageFile(BytesIO(data)) if data.startswith(b"\xff\xd8\xff") else _open_png(data)
    most, short = Image.MAX_IMAGE_PIXELS, min(image.size)
    enough = 2 * (size or short)
    if image.width * image.height > most:
        enough = min(enough, short // 2)
    image.draft(None, (enough, enough))  # does nothing for other formats
    if image.width * image.height > most:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {most / 1e6:.0f} million")
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip
        raise ValueError("a grey of more than 8 bits: convert it to 8 bits")
    image.load()
    return image


def _open_png(data: bytes) -> Image.Image:
    """Open a PNG without the chunks that no photo needs, some of which Pillow refuses; other formats as they are."""
    if not data.startswith(_PNG):
        return Image.open(BytesIO(data))
    kept, profile, place = [_PNG], None, len(_PNG)
    while place < len(data):  # a chunk is length, kind, content, checksum
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        chunk = data[place : place + length + 12]
        place += len(chunk)
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") or chunk[8:].startswith(_PNG_ORIENTATIONS):
            kept.append(chunk)  # critical chunks have a capital
        elif kind == b"iCCP":  # name, zero, method, and the profile, which Pillow refuses if it is over 1 MB
            with suppress(zlib.error, IndexError):
                profile = zlib.decompressobj().decompress(chunk[8:-4].split(b"\0", 1)[1][1:], 2**26)
    image = Image.open(BytesIO(b"".join(kept)))
    image.info["icc_profile"] = profile
    return image


def _centred_square(image: Image.Image) -> Image.Image:
    """The largest centred square of an image of any mode, as 8-bit RGB in sRGB, transparency on white."""
    profile, side = image.info.get("icc_profile"), min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    square = _to_srgb(image, profile)
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema()[1] > 0:  # some programs write zeros everywhere for an opaque image
            square.putalpha(alpha)
            square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    return square


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """8-bit RGB, the colours as the ICC profile defines them; without a usable one the numbers stay."""
    image = image.convert({"L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    modes = ("L", "RGB") if image.mode == "L" else (image.mode,)  # some programs give grey photos a profile of RGB
    for mode in modes if profile else ():
        with suppress(ImageCms.PyCMSError):  # a broken profile, or one of another mode
            srgb = ImageCms.createProfile("sRGB")
            return ImageCms.profileToProfile(image.convert(mode), BytesIO(profile), srgb, outputMode="RGB")
    return image.convert("RGB")
