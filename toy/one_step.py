"""One step of RPO as a picture, docs/one-step.png: python -m toy.one_step --ckpt best.safetensors

It calls train.RPO's own prepare, batch and losses on data/dog, so it shows what the code does. θ is the checkpoint's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from model.files.tensors import read_tensors
from reward import Reward
from support import start
from train import RPO

SIDE, GAP, HEAD = 128, 12, 34
TITLES = ("theta_0, c_mod", "theta, c_mod", "theta, c")
STEP, T = 11, 500  # whose batch is shown; a timestep in the middle, where the prompt still matters


def panels(run: RPO) -> tuple[list[list[tuple[str, Image.Image]]], str]:
    """Two rows of titled pictures, of the photo and of the negative, and the numbers of the step."""
    batch = run.batch(STEP)
    batch = run.machine.place(batch._replace(t=torch.full_like(batch.t, T)))
    (similarity, ref, gen, base_ref, base_gen), loss = (x.item() for x in run.losses(batch)), run.loss(batch)
    i, j, y = batch.photo.item(), batch.negative.item(), batch.label.item()
    margin = f"({base_ref:.4f} - {ref:.4f}) - ({base_gen:.4f} - {gen:.4f}) = {loss.margin.item():+.4f}"
    rewards = f"r(x_ref, c_mod) = {run.r_ref[i, j]:.3f}, r(x_gen, c_mod) = {run.r_gen[j]:.3f}"
    numbers = f"""c: "{run.subject.instance_prompt}"    c_mod: "{run.prompts[j]}"    t = {T}
{rewards}, P = {batch.p.item():.3f}, coin y = {y:.0f}
margin = (base_ref - ref) - (base_gen - gen) = {margin}
L = L_sim + L_pref = {similarity:.4f} + {loss.preference.item():.4f} = {loss.total.item():.4f}"""
    seen_by = {
        "ref": [(run.theta_0, batch.c_mod, base_ref), (run.theta, batch.c_mod, ref), (run.theta, batch.c, similarity)],
        "gen": [(run.theta_0, batch.c_mod, base_gen), (run.theta, batch.c_mod, gen)],
    }
    rows = []
    for name, x_0, eps in (("ref", batch.x_ref, batch.eps_ref), ("gen", batch.x_gen, batch.eps_gen)):
        x_t = run.sd.scheduler.add_noise(x_0, eps, batch.t)
        row = [(f"x_{name}", x_0), ("x_t", x_t)]
        for title, (network, context, value) in zip(TITLES, seen_by[name], strict=False):
            with torch.no_grad():
                prediction = network(x_t, batch.t, context).float()
            row.append((f"{title}\nl = {value:.4f}", run.sd.scheduler.to_x0_eps(prediction, x_t, batch.t)[0]))
        rows.append([(title, run.sd.decode_latents(latents)[0]) for title, latents in row])
    return rows, numbers


def page(rows: list[list[tuple[str, Image.Image]]], numbers: str) -> Image.Image:
    """The rows under each other, and the numbers below."""
    width, height = 5 * (SIDE + GAP) + GAP, len(rows) * (SIDE + HEAD + GAP) + 86
    sheet, font = Image.new("RGB", (width, height), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(sheet)
    for j, row in enumerate(rows):
        top = j * (SIDE + HEAD + GAP) + GAP
        for i, (title, picture) in enumerate(row):
            left = GAP + i * (SIDE + GAP)
            pen.multiline_text((left, top), title, "black", font, spacing=1)
            sheet.paste(picture.resize((SIDE, SIDE)), (left, top + HEAD))
    pen.multiline_text((GAP, height - 78), numbers, "black", font, spacing=4)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, default="best.safetensors", help="θ, the whole U-Net")
    ckpt = parser.parse_args().ckpt
    args = start.parse(RPO, "", ["--subject", "data/dog", "--batch", "1", "--ckpt", "runs/one.safetensors"])
    with start.prepared(args, RPO) as parts:
        run = RPO(parts, Reward(parts.align, parts.bert, parts.photos))
        run.prepare()
        run.machine.unet.load_state_dict(read_tensors(ckpt))
        page(*panels(run)).save("docs/one-step.png")


if __name__ == "__main__":
    main()
