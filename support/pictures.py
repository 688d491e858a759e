"""Pictures as files with their settings, and pages of them: the grid of sample.py and the film strip of train.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from model.files.write import write_atomic
from subject import PHOTO_ENDINGS, visible_files
from support.results import check_writable

GAP, INK, PAPER, KEPT = 4, (40, 40, 40), (255, 255, 255), (24, 140, 60)


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size on a page, row by row."""
    side = max(max(picture.size) for picture in pictures)
    page = Image.new("RGB", (columns * (side + GAP) + GAP, -(-len(pictures) // columns) * (side + GAP) + GAP), PAPER)
    for i, picture in enumerate(pictures):
        page.paste(picture, (GAP + i % columns * (side + GAP), GAP + i // columns * (side + GAP)))
    return page


def drawn_with(
    steps: int, sampler: str, guidance: float, size: int, ckpt: Path | None, base: Path, header: dict
) -> str:
    """How pictures were drawn, as image tools read it; `header` is the checkpoint's. The seed is to be added."""
    model = f"{ckpt.name}, Base: {base.name}, Step: {header.get('step', 'unknown')}" if ckpt else base.name
    return f"Steps: {steps}, Sampler: {sampler}, CFG scale: {guidance:g}, Size: {size}x{size}, Model: {model}"


def picture_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """A file name for each picture of a page, after its prompt and seed."""
    stems = file_names(list(dict.fromkeys(prompts)))
    return [f"{stems[prompt]}-{seed}.png" for prompt, seed in zip(prompts, seeds, strict=True)]


def check_page(folder: Path) -> None:
    """Raise ValueError if grid.png cannot be written there, or would replace a picture that we have not made.

    A folder without grid.png is refused if there are photos: the next training would take our pictures for more.
    """
    path = folder / "grid.png"
    check_writable(path)
    if path.is_file():
        if not _is_ours(path):
            raise ValueError(f"{path} is a picture of yours, and would be replaced: give another --out")
        return
    for photo in visible_files(folder) if folder.is_dir() else []:
        strip = photo.with_suffix(".jsonl").is_file()  # the film strip of a run
        if photo.suffix.lower() in PHOTO_ENDINGS and photo.is_file() and not strip and not _is_ours(photo):
            raise ValueError(f"{photo} is a picture of yours, and {folder} no place for ours: give another --out")


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return b"parameters\0" in file.read(1024)  # not with Pillow, to which our large pages are bombs


def save_png(picture: Image.Image, path: Path, prompt: str, settings: str, seed: int) -> None:
    """A PNG that says in the text chunk "parameters" how it was drawn; settings: from `drawn_with`.

    Raises ValueError if it cannot be written.
    """
    info = PngInfo()
    info.add_text("parameters", f"{prompt}\n{settings}, Seed: {seed}")
    write_atomic(path, lambda beside: picture.save(beside, "PNG", pnginfo=info))


def file_names(prompts: list[str]) -> dict[str, str]:
    """A valid file name for each prompt, no two alike: "a [V] dog in the snow" -> "a-V-dog-in-the-snow"."""
    names, taken = {}, set()
    for prompt in prompts:
        name = stem = re.sub(r"[^A-Za-z0-9]+", "-", prompt).strip("-")[:80] or "empty"
        number = 1
        while name.lower() in taken:  # lower: some file systems do not tell a from A
            number += 1
            name = f"{stem}-{number}"
        taken.add(name.lower())
        names[prompt] = name
    return names


def film_strip(
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    rows: Sequence[tuple[int, float, Sequence[Image.Image]]],
    kept: int | None,
    largest: int = 192,
) -> Image.Image:
    """A run at a glance: the reference photos on top, then a row a validation (step, reward, a picture a prompt), and
    the prompts above the columns; the row of the step `kept` is framed. Pictures are at most `largest` pixels wide."""
    side = min(largest, references[0].width)
    margin, font = 104, ImageFont.load_default(12)
    columns, head = max(len(prompts), len(references)), 66
    width, height = margin + columns * (side + GAP), (1 + len(rows)) * (side + GAP) + head + 2 * GAP
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)

    def place(pictures: Sequence[Image.Image], top: int, label: str, ink: tuple[int, int, int] = INK) -> None:
        pen.multiline_text((8, top + side // 2 - 22), label, ink, font)
        for i, picture in enumerate(pictures):
            page.paste(picture.resize((side, side), Image.Resampling.LANCZOS), (margin + i * (side + GAP), top))

    place(references, GAP, "your photos")
    for i, prompt in enumerate(prompts):
        text = textwrap.fill(prompt, max(8, side // 7))
        pen.multiline_text((margin + i * (side + GAP), side + 3 * GAP), text, INK, font, spacing=1)
    for i, (step, reward, pictures) in enumerate(rows):
        top, name = head + (i + 1) * (side + GAP) + GAP, "the base" if step == 0 else f"step {step}"
        label = f"{name}\nreward\n{reward:.4f}" + ("\nKEPT" if step == kept else "")
        place(pictures, top, label, KEPT if step == kept else INK)
        if step == kept:
            pen.rectangle((1, top - 3, width - 1, top + side + 2), outline=KEPT, width=3)
    return page
