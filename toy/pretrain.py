"""Train every network of weights/toy from random weights, one command each, in this order:

    python -m toy.pretrain data            # draw the training pictures and their subjects' masks (minutes)
    python -m toy.pretrain vae             # the U-Net learns in its latents, so train it first and long
    python -m toy.pretrain clip            # its text tower is the text encoder of the U-Net
    python -m toy.pretrain clip-pictures   # optional: a better metric, the same text tower
    python -m toy.pretrain align           # the reward
    python -m toy.pretrain dino            # a metric
    python -m toy.pretrain unet
    python -m toy.pretrain vae-sharpen     # sharp lines, from exactly the same latents

Each command writes its part of weights/toy in the public layout, in half precision. Re-running a command after an
interruption resumes it, except the first; its state is in toy/cache. With `--go-on` a training starts from the weights
in weights/toy; `vae-sharpen` and `clip-pictures` always do. Then give another `--seed`: the same seed gives the same
batches again. On a GPU add `--device cuda` and a larger `--batch`. `--steps` sets the length. After `vae` or `clip`
train the U-Net again: it knows other latents or other words.
"""

from __future__ import annotations

import argparse
import sys

from support import flags
from support.settings import count, seed_number
from toy.data import CACHE, make_data
from toy.loop import Job
from toy.networks import WEIGHTS
from toy.train_embedders import train_align, train_clip, train_clip_pictures, train_dino
from toy.train_unet import train_unet
from toy.train_vae import sharpen_vae, train_vae

PARTS = {  # name: (function, steps, batch), for two CPU cores
    "vae": (train_vae, 12_000, 8),
    "vae-sharpen": (sharpen_vae, 4000, 4),
    "clip": (train_clip, 2500, 96),
    "clip-pictures": (train_clip_pictures, 2000, 96),
    "align": (train_align, 1350, 96),
    "dino": (train_dino, 2000, 96),
    "unet": (train_unet, 4000, 32),
}


def run(args: argparse.Namespace) -> None:
    if args.part == "data":
        make_data(args.steps or 128_000, args.cache)
        return
    train, steps, batch = PARTS[args.part]
    job = Job(args.steps or steps, args.batch or batch, args.device, args.go_on, args.seed, args.weights, args.cache)
    train(job)


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("part", choices=["data", *PARTS])
    add("--steps", type=count, help="gradient steps (data: drawings)")
    add("--batch", type=count, help="samples a step")
    add("--go-on", action="store_true", help="start from the weights in weights/toy, not from random ones")
    add("--seed", type=seed_number, default=0, help="of batches and noise; with --go-on give another (default: 0)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--weights", type=flags.path, default=WEIGHTS, help="the folder to write (default: weights/toy)")
    add("--cache", type=flags.path, default=CACHE, help="for drawings and states (default: toy/cache)")
    args = parser.parse_args()
    return flags.guarded(lambda: run(args), lambda: "use a smaller --batch")


if __name__ == "__main__":
    sys.exit(main())
