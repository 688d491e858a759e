"""Pictures as files with their settings, and pages of them: the grid, and the labelled page of a skill."""

from __future__ import annotations

import json
import math
import os
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

GAP, INK, PAPER = 4, (40, 40, 40), (255, 255, 255)
PAGE = 8000  # the longest side of a page in pixels: many programs cannot open a larger one
COLUMNS = 40  # the most on a page with labels
# As A1111 and ComfyUI call the same samplers. They have another DDPM, so ours gets a name that they do not know.
SAMPLER_NAMES = {"dpm++": "DPM++ 2M", "ddim": "DDIM", "ddpm": "DDPM (rpo)"}


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Square pictures of one size on a page, row by row.

    If a side would exceed PAGE, the page has about as many rows as columns, and smaller pictures if need be.
    """
    side, rows = pictures[0].width, -(-len(pictures) // columns)
    if max(rows, columns) * (side + GAP) + GAP > PAGE:
        columns = math.ceil(len(pictures) ** 0.5)
        rows, side = -(-len(pictures) // columns), min(side, (PAGE - GAP) // columns - GAP)
    page = Image.new("RGB", (columns * (side + GAP) + GAP, rows * (side + GAP) + GAP), PAPER)
    paste(page, pictures, side, columns, GAP, GAP)
    return page


def paste(page: Image.Image, pictures: Sequence[Image.Image], side: int, columns: int, left: int, top: int) -> None:
    """Paste pictures into a page, row by row, `side` pixels wide; the first one at (left, top)."""
    for i, picture in enumerate(pictures):
        if picture.width != side:
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        row, column = divmod(i, columns)
        page.paste(picture, (left + column * (side + GAP), top + row * (side + GAP)))


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
    """A file name of the prompt's letters and digits, of any script: "a-V-dog-in-the-snow-7.png".

    Different prompts may have the same name; `save_png` keeps their pictures apart.
    """
    kept = "".join(char if unicodedata.category(char)[0] in "LNM" else " " for char in prompt)
    words = [word for word in kept.split() if re.search(r"\w", word)]  # not a mark alone, such as an emoji's
    stem = "-".join(words).encode()[:120].decode(errors="ignore").strip("-")  # file systems allow 255 bytes
    return f"{stem or 'empty'}-{seed}.png"


def check_folder(folder: Path) -> None:
    """Raise ValueError if pictures cannot be written there, or if it is a folder of the user's photos.

    The next training would take our pictures for photos. A folder that has a grid of ours holds our pictures. A PNG
    next to a .jsonl is a film strip and does not count.
    """
    check_writable(folder / "grid.png")
    files = visible_files(folder) if folder.is_dir() else []
    pictures = [path for path in files if path.suffix.lower() in PHOTO_ENDINGS]
    pictures = [path for path in pictures if not path.with_suffix(".jsonl").is_file()]
    others = [path for path in pictures if not _is_ours(path)]
    if others and not any(map(_is_ours, folder.glob("grid*.png"))):
        raise ValueError(f"{others[0]} is a picture of yours: give another folder as --out, for results only")


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"parameters\0" in file.read(1024)  # Pillow would refuse large pages


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
    while os.path.lexists(place) and not (place.is_file() and place.read_bytes() == data):
        number += 1
        place = path.with_stem(f"{path.stem}-{number}")
    write_atomic(place, lambda temporary: temporary.write_bytes(data))
    return place


def labelled(pictures: Sequence[Image.Image], prompts: Sequence[str], n: int) -> Image.Image:
    """Square pictures of one size on a page, each with its prompt under it; n pictures a prompt, in order.

    With one picture a prompt up to 4 prompts are in a row, else each prompt has its own row. The page is reduced if a
    side would exceed PAGE. More than COLUMNS pictures a prompt become a grid without labels. The font is ASCII only:
    other characters of a prompt are boxes.
    """
    if n > COLUMNS:
        return grid(pictures, n)
    columns = n if n > 1 else min(4, len(prompts))
    side = min(pictures[0].width, (PAGE - GAP) // columns - GAP)
    font = ImageFont.load_default(max(12, side // 24))
    width = max(8, int(side / font.getlength("n")))
    labels = [textwrap.fill(prompt, width) for prompt in prompts for _ in range(n)]
    cell = side + GAP + max(label.count("\n") + 1 for label in labels) * math.ceil(1.4 * font.size) + GAP
    page = Image.new("RGB", (columns * (side + GAP) + GAP, -(-len(labels) // columns) * cell + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left, top = GAP + i % columns * (side + GAP), GAP + i // columns * cell
        paste(page, [picture], side, 1, left, top)
        pen.multiline_text((left, top + side + GAP), label, INK, font, spacing=1)
    page.thumbnail((PAGE, PAGE))
    return page
