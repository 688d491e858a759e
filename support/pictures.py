"""Pictures as files with their settings, and pages of them: the grid of sample.py and the film strip of train.py."""

from __future__ import annotations

import json
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from model.files.write import write_atomic
from model.lora import lora_of
from model.unet import UNet
from subject import PHOTO_ENDINGS, visible_files
from support.results import check_writable

GAP, INK, PAPER, KEPT = 4, (40, 40, 40), (255, 255, 255), (24, 140, 60)
PAGE = 8000  # the longest side of a page in pixels: many programs cannot open a larger one
# As A1111 and ComfyUI call the same samplers. They have another DDPM, so ours gets a name that they do not know.
SAMPLER_NAMES = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM (rpo)"}
ROWS = 60  # the most validations of a film strip


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Square pictures of one size on a page, row by row, `columns` of each prompt.

    If a side would exceed PAGE, a row holds several prompts, or a prompt takes several rows, or the pictures are made
    smaller: the layout with the largest pictures is taken.
    """
    count, largest = len(pictures), pictures[0].width

    def rows_at(wide: int) -> int:
        return -(-count // wide) if wide >= columns else -(-count // columns) * -(-columns // wide)

    def side_at(wide: int) -> int:
        return min(largest, *((PAGE - GAP) // cells - GAP for cells in (wide, rows_at(wide))))

    wide = max([*range(columns, 0, -1), *range(2 * columns, count + 1, columns)], key=side_at)  # `columns`, if it fits
    side, group = side_at(wide), max(wide, columns)
    page = Image.new("RGB", (wide * (side + GAP) + GAP, rows_at(wide) * (side + GAP) + GAP), PAPER)
    for i, picture in enumerate(pictures):
        row, column = divmod(i % group, wide)
        row += i // group * -(-group // wide)
        page.paste(_resized(picture, side), (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    return page


def _resized(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize((side, side), Image.Resampling.LANCZOS) if picture.width != side else picture


def drawn_with(
    unet: UNet, steps: int, sampler: str, guidance: float, size: int, ckpt: Path | None, base: Path, header: dict
) -> str:
    """How pictures were drawn, as A1111 and ComfyUI read it; the seed is to be added. header: the checkpoint's.

    If the checkpoint is a LoRA, which `unet` shows, the model is the base, and the LoRA is named apart.
    """
    names = {"Model": base.absolute().name}
    if ckpt:
        names = names | {"LoRA": ckpt.name} if lora_of(unet) else {"Model": ckpt.name, "Base": names["Model"]}
        names["Step"] = header.get("step", "unknown")
    text = f"Steps: {steps}, Sampler: {SAMPLER_NAMES[sampler]}, CFG scale: {guidance:g}, Size: {size}x{size}"
    return ", ".join([text, *(f"{key}: {_quoted(name)}" for key, name in names.items())])


def _quoted(name: str) -> str:
    """A JSON string if the name has a character that separates settings."""
    return json.dumps(name, ensure_ascii=False) if re.search(r'[,:"\n]', name) else name


def picture_name(prompt: str, seed: int) -> str:
    """A file name after the prompt's letters and digits, of any script: "a-V-dog-in-the-snow-7.png".

    Different prompts may have the same name; `save_png` keeps their pictures apart.
    """
    kept = ""
    for char in prompt:
        kind = unicodedata.category(char)[0]
        is_part = kind in "LN" or (kind == "M" and kept[-1:].strip())  # a mark, such as an accent, follows a letter
        kept += char if is_part else " "
    stem = "-".join(kept.split()).encode()[:120].decode(errors="ignore").strip("-")  # file systems allow 255 bytes
    return f"{stem or 'empty'}-{seed}.png"


def check_folder(folder: Path) -> None:
    """Raise ValueError if pictures cannot be written there, or if it is a folder of the user's photos.

    The next training would take our pictures for photos. A folder that has a grid of ours holds our pictures.
    """
    check_writable(folder / "grid.png")
    if not folder.is_dir() or any(map(_is_ours, folder.glob("grid*.png"))):
        return
    for photo in visible_files(folder):
        strip = photo.with_suffix(".jsonl").is_file()  # the film strip of a run
        if photo.suffix.lower() in PHOTO_ENDINGS and photo.is_file() and not strip and not _is_ours(photo):
            raise ValueError(f"{photo} is a picture of yours, and {folder} no place for ours: give another --out")


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return b"parameters\0" in file.read(1024)  # not with Pillow, which refuses large pages


def save_png(picture: Image.Image, path: Path, prompt: str, settings: str, seed: int) -> Path:
    """Save a PNG with a text "parameters" that says how it was drawn; settings: from `drawn_with`. Returns its path.

    A different file at `path` stays: the new one gets a number, NAME-2.png. The same picture with the same text is
    saved once. Raises ValueError if it cannot be written.
    """
    info, stream = PngInfo(), BytesIO()
    # ComfyUI reads nothing without a line for the negative prompt.
    text = f"{prompt}\nNegative prompt:\n{settings}, Seed: {seed}"
    info.add_text("parameters", text.encode(errors="replace").decode())  # a file's name need not be UTF-8
    picture.save(stream, "PNG", pnginfo=info)
    data, place, number = stream.getvalue(), path, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while not _reserve(place):
            if place.is_file() and place.read_bytes() == data:
                return place
            number += 1
            place = path.with_stem(f"{path.stem}-{number}")
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error})") from None
    try:
        write_atomic(place, lambda beside: beside.write_bytes(data))
    finally:
        if place.stat().st_size == 0:  # reserved, but not written
            place.unlink()
    return place


def _reserve(place: Path) -> bool:
    """Create an empty file, in one step, since another process may try the same. Return False if there is a file."""
    try:
        place.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def film_strip(
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    rows: Sequence[tuple[int, float, Sequence[Image.Image]]],
    kept: int | None,
    largest: int = 192,
) -> Image.Image:
    """A run at a glance: the reference photos on top, then a row a validation (step, reward, a picture a prompt), and
    the prompts above the columns; the row of the step `kept` is framed.

    Pictures are at most `largest` pixels wide, less if the page would exceed PAGE. Of more than ROWS validations it
    shows every second, or third, ..., the kept one and the last.
    """
    every = -(-len(rows) // ROWS)
    rows = [row for i, row in enumerate(rows) if i % every == 0 or row[0] == kept or i == len(rows) - 1]
    margin, head, font = 104, 66 + 2 * GAP, ImageFont.load_default(12)
    columns = max(len(prompts), min(len(references), 8))
    bands = -(-len(references) // columns)  # rows of photos
    side = min(largest, references[0].width, (PAGE - margin) // columns - GAP)
    side = min(side, (PAGE - head) // (bands + len(rows)) - GAP)
    size = margin + columns * (side + GAP), head + (bands + len(rows)) * (side + GAP)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)

    def place(pictures: Sequence[Image.Image], top: int, label: str, ink: tuple[int, int, int] = INK) -> None:
        pen.multiline_text((8, top + side // 2 - 22), label, ink, font)
        for i, picture in enumerate(pictures):
            row, column = divmod(i, columns)
            page.paste(_resized(picture, side), (margin + column * (side + GAP), top + row * (side + GAP)))

    place(references, GAP, "your photos")
    for i, prompt in enumerate(prompts):
        text = textwrap.fill(prompt, max(8, side // 7))
        pen.multiline_text((margin + i * (side + GAP), bands * (side + GAP) + 2 * GAP), text, INK, font, spacing=1)
    for i, (step, reward, pictures) in enumerate(rows):
        top, name = head - GAP + (bands + i) * (side + GAP), "the base" if step == 0 else f"step {step}"
        label = f"{name}\nreward\n{reward:.4f}" + ("\nKEPT" if step == kept else "")
        place(pictures, top, label, KEPT if step == kept else INK)
        if step == kept:
            pen.rectangle((1, top - 3, page.width - 1, top + side + 2), outline=KEPT, width=3)
    return page
