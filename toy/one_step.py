"""One step of RPO as a picture, as in docs/one-step.md: python -m toy.one_step --ckpt best.safetensors

It calls train.RPO's own prepare, batch and losses on data/dog, so it shows what the code does. θ is the checkpoint's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from model.files.tensors import read_tensors
from reward import Reward
from support import flags, start
from train import RPO

SIDE, GAP, HEAD = 128, 12, 34
STEP, T = 11, 500  # whose batch is shown; a timestep in the middle, where the prompt still matters
LOSSES = ("similarity", "ref", "gen", "base_ref", "base_gen")  # as RPO.losses returns them
# What is predicted of the photo and of the negative: the network, its prompt, and the loss that it gives.
IN_NO_LOSS = ("theta_0", "c", "")
OF_PHOTO = (IN_NO_LOSS, ("theta", "c", "similarity"), ("theta_0", "c_mod", "base_ref"), ("theta", "c_mod", "ref"))
OF_NEGATIVE = (("theta_0", "c_mod", "base_gen"), ("theta", "c_mod", "gen"))


def panels(run: RPO) -> tuple[list[list[tuple[str, Image.Image]]], str]:
    """Two rows of titled pictures, of the photo and of the negative, and the numbers of the step."""
    batch = run.batch(STEP)
    batch = run.machine.place(batch._replace(t=torch.full_like(batch.t, T)))
    i, j, loss = batch.photo.item(), batch.negative.item(), run.loss(batch)
    of = {name: f"{value.item():.4f}" for name, value in zip(LOSSES, run.losses(batch), strict=True)}
    margin = f"({of['base_ref']} - {of['ref']}) - ({of['base_gen']} - {of['gen']}) = {loss.margin.item():+.4f}"
    rewards = f"r(x_ref, c_mod) = {run.r_ref[i, j]:.3f}, r(x_gen, c_mod) = {run.r_gen[j]:.3f}"
    numbers = f"""c: "{run.subject.instance_prompt}"    c_mod: "{run.prompts[j]}"    t = {T}
{rewards}, P = {batch.p.item():.3f}, coin y = {batch.label.item():.0f}
margin = (base_ref - ref) - (base_gen - gen) = {margin}
L = L_sim + L_pref = {of["similarity"]} + {loss.preference.item():.4f} = {loss.total.item():.4f}"""
    rows, scheduler = [], run.sd.scheduler
    photo, negative = (batch.x_ref, batch.eps_ref, OF_PHOTO), (batch.x_gen, batch.eps_gen, OF_NEGATIVE)
    for name, (x_0, eps, predicted) in {"x_ref": photo, "x_gen": negative}.items():
        x_t = scheduler.add_noise(x_0, eps, batch.t)
        row = [(name, x_0), ("x_t", x_t)]
        for network, prompt, value in predicted:
            with torch.no_grad():
                prediction = getattr(run, network)(x_t, batch.t, getattr(batch, prompt)).float()
            title = f"{network}, {prompt}\n" + (f"{value} = {of[value]}" if value else "in no loss")
            row.append((title, scheduler.to_x0_eps(prediction, x_t, batch.t)[0]))
        rows.append([(title, run.sd.decode_latents(latents)[0]) for title, latents in row])
    return rows, numbers


def draw(ckpt: Path, out: Path) -> None:
    """Save the page: the rows under each other, and the numbers below."""
    args = start.parse(RPO, "", ["--subject", "data/dog", "--batch", "1", "--ckpt", "runs/one.safetensors"])
    with start.prepared(args, RPO) as parts:
        run = RPO(parts, Reward(parts.align, parts.bert, parts.photos))
        run.prepare()
        run.machine.unet.load_state_dict(read_tensors(ckpt))
        rows, numbers = panels(run)
    height = len(rows) * (SIDE + HEAD + GAP) + 86
    sheet, font = Image.new("RGB", (6 * (SIDE + GAP) + GAP, height), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(sheet)
    for top, row in enumerate(rows):
        for left, (title, picture) in enumerate(row):
            x, y = GAP + left * (SIDE + GAP), GAP + top * (SIDE + HEAD + GAP)
            pen.multiline_text((x, y), title, "black", font, spacing=1)
            sheet.paste(picture.resize((SIDE, SIDE)), (x, y + HEAD))
    pen.multiline_text((GAP, height - 78), numbers, "black", font, spacing=4)
    sheet.save(out)


if __name__ == "__main__":
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--ckpt", type=flags.path, default="best.safetensors", help="a whole U-Net of data/dog: θ")
    parser.add_argument("--out", type=flags.path, default="one-step.png", help="(default: %(default)s)")
    given = parser.parse_args()
    sys.exit(flags.guarded(lambda: draw(given.ckpt, given.out), lambda: "close other programs"))
