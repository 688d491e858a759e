"""The quality and the time of our DreamBooth, compared with the training recipe of diffusers' examples.

    python -m benchmarks.dreambooth_peer --seeds 0 1 2      # 400 steps each on weights/toy
    python -m benchmarks.dreambooth_peer --quick            # a few steps, as a test
    python -m benchmarks.dreambooth_peer --write            # also put the tables into benchmarks/RESULTS.md

The recipe is written again here, on diffusers. The base generates the class images once. A batch has as many photos as
class images; each picture and prompt is encoded in the step that uses it, and each picture has its own ε and t. The
loss is the mean squared error, plus 1.0 times that of the class images. AdamW has weight decay 0.01 and a constant
learning rate; the gradient's norm is clipped to 1; the last weights are the result.

Ours is `python -m baselines dreambooth --keep-last`, with only the first and the last validation. Base, photos,
prompts, number of class images, solver, steps, batch and learning rate are the same. We generate pictures of
DreamBench's 25 test prompts with both results, from the same noise, and evaluate.py scores them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from baselines.dreambooth import DreamBooth
from benchmarks import common, phases
from evaluate import Metrics
from model.files.write import save_tensors
from model.stable_diffusion import StableDiffusion
from subject import Subject, load_photos, load_subject
from support import flags
from support.settings import count, seed_number

NAMES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T"}


class Recipe:
    """DreamBooth on diffusers. settings: ours, by name."""

    def __init__(self, base: Path, subject: Subject, settings: dict, device: torch.device):
        """Load the base."""
        from diffusers import DDPMScheduler

        self.subject, self.settings, self.device = subject, settings, device
        self.pipe = common.pipeline(base, device)
        self.noise = DDPMScheduler.from_pretrained(base / "scheduler")
        side = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self.photos, self.drawn = load_photos(subject, side), []

    def draw_class_images(self, seed: int) -> None:
        """Generate pictures of the class prompt, eight at a time, as ours."""
        draws, total = torch.Generator().manual_seed(seed), self.settings["class_images"]
        options = {"num_inference_steps": self.settings["solver_steps"], "guidance_scale": self.settings["guidance"]}
        while len(self.drawn) < total:
            n = min(8, total - len(self.drawn))
            with common.autocast(self.device):
                self.drawn += self.pipe([self.subject.class_prompt] * n, generator=draws, **options).images

    def train(self, steps: int) -> None:
        """The gradient steps."""
        unet = self.pipe.unet
        unet.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=self.settings["lr"], weight_decay=0.01)
        for _ in range(steps):
            loss = self.loss()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            loss.item()

    def loss(self) -> torch.Tensor:
        """0-d, of a random batch: n photos and n class images."""
        n, pipe, noise = self.settings["batch"], self.pipe, self.noise
        chosen = [torch.randint(len(pictures), (n,)).tolist() for pictures in (self.photos, self.drawn)]
        images = [self.photos[i] for i in chosen[0]] + [self.drawn[i] for i in chosen[1]]
        prompts = [self.subject.instance_prompt] * n + [self.subject.class_prompt] * n
        with common.autocast(self.device):
            with torch.no_grad():
                pixels = pipe.image_processor.preprocess(images).to(self.device)
                x_0 = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
                ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
                context = pipe.text_encoder(ids.to(self.device))[0]
            eps = torch.randn_like(x_0)
            t = torch.randint(noise.config.num_train_timesteps, (2 * n,), device=self.device)
            prediction = pipe.unet(noise.add_noise(x_0, eps, t), t, context).sample
        target = eps if noise.config.prediction_type == "epsilon" else noise.get_velocity(x_0, eps, t)
        (of_photos, of_class), (photos, classes) = prediction.float().chunk(2), target.float().chunk(2)
        return F.mse_loss(of_photos, photos) + 1.0 * F.mse_loss(of_class, classes)


def train_recipe(
    base: Path, subject: Subject, settings: dict, steps: int, seed: int, device: torch.device, result: Path
) -> dict[str, float]:
    """Train with the recipe and write the U-Net to `result`; return the seconds of each part."""
    common.libraries()
    times = [time.perf_counter()]
    torch.manual_seed(seed)
    recipe = Recipe(base, subject, settings, device)
    times.append(time.perf_counter())
    recipe.draw_class_images(seed)
    times.append(time.perf_counter())
    recipe.train(steps)
    common.synchronize(device)
    times.append(time.perf_counter())
    save_tensors(recipe.pipe.unet.state_dict(), result, {"format": "pt"})
    return {name: times[i + 1] - times[i] for i, name in enumerate(("load", "class images", "training"))}


def our_seconds(result: dict) -> dict[str, float]:
    """The result of `phases.whole` by the recipe's parts, and "validation", which the recipe does not have."""
    seconds = result["seconds"]
    others = seconds["validation"] + seconds["saving"] + seconds["rest"]
    parts = {"load": seconds["load"], "class images": seconds["negatives"], "training": seconds["training"]}
    return parts | {"validation": others}


def score(
    sd: StableDiffusion, metrics: Metrics, subject: Subject, unet: Path, images: int, seed: int, settings: dict
) -> dict[str, float]:
    """DINO, CLIP-I and CLIP-T of a U-Net on the 25 test prompts, `images` pictures each."""
    sd.load_checkpoint(unet)
    prompts = [prompt for prompt in subject.test_prompts for _ in range(images)]
    seeds = [1000 * seed + i for i in range(len(prompts))]
    scores = metrics(sd.generate(prompts, seeds, settings["solver_steps"], settings["guidance"]), prompts)
    return {name: scores[name].mean().item() for name in NAMES}


def within_two_errors(ours: list[float], theirs: list[float]) -> bool:
    """Return True if the means differ by at most two standard errors; False for a single value."""
    if len(ours) < 2:
        return False
    error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
    return abs(statistics.mean(ours) - statistics.mean(theirs)) <= 2 * error


def quality_table(report: Callable, rows: dict[str, list[dict]]) -> None:
    """The scores of "base", "ours" and "diffusers": a dict of scores for each seed."""
    several = len(rows["ours"]) > 1
    report(f"\n### DreamBooth compared with diffusers' recipe, {len(rows['ours'])} seed(s), mean ± sd\n")
    report("| | " + " | ".join(NAMES.values()) + " |\n|---|" + "---|" * len(NAMES))
    for side, scores in rows.items():
        cells = []
        for name in NAMES:
            values = [row[name] for row in scores]
            cells.append(f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if several else ""))
        report(f"| {side} | {' | '.join(cells)} |")
    if several:
        pairs = [[[row[name] for row in rows[side]] for side in ("ours", "diffusers")] for name in NAMES]
        cells = ["yes" if within_two_errors(*pair) else "**no**" for pair in pairs]
        report(f"| difference at most two standard errors? | {' | '.join(cells)} |")


def time_table(report: Callable, seconds: dict[str, list[dict]]) -> None:
    """The seconds of "ours" and "diffusers": a dict of seconds for each seed."""
    report("\n| seconds (mean) | ours | diffusers' recipe | diffusers / ours |\n|---|---|---|---|")
    means = {side: {name: statistics.mean(x[name] for x in each) for name in each[0]} for side, each in seconds.items()}
    mine, other = means["ours"], means["diffusers"]
    for name in other:
        report(f"| {name} | {mine[name]:.1f} | {other[name]:.1f} | {other[name] / mine[name]:.2f} |")
    report(f"| validations, saving, the rest | {mine['validation']:.1f} | | |")
    all_mine, all_other = sum(mine.values()), sum(other.values())
    without = all_mine - mine["validation"]
    report(f"| all but validation | {without:.1f} | {all_other:.1f} | {all_other / without:.2f} |")
    report(f"| all | {all_mine:.1f} | {all_other:.1f} | {all_other / all_mine:.2f} |")


def compare(
    base: Path, subject: Path, device: torch.device, seeds: list[int], steps: int, images: int, more: list[str]
) -> tuple[dict[str, list], dict[str, list]]:
    """Train both for each seed, alternating; return their scores and their seconds. more: flags of our training."""
    loaded = load_subject(subject)
    sd = StableDiffusion.from_pretrained(base, device)
    photos = load_photos(loaded, sd.image_size)
    folders = base / "metrics" / "clip", base / "metrics" / "dino", base / "reward"
    metrics = Metrics.from_folders(*folders, photos, loaded.token, device)
    rows, seconds = {"base": [], "ours": [], "diffusers": []}, {"ours": [], "diffusers": []}
    argv = [*map(str, ("--keep-last", "--steps", steps, "--validate-every", steps)), *more]
    with tempfile.TemporaryDirectory() as folder:
        files = {side: Path(folder) / f"{side}.safetensors" for side in rows}
        save_tensors(sd.unet.state_dict(), files["base"], {"format": "pt"})
        for seed in tqdm(seeds, "seeds"):
            run = [base, str(device), [*argv, "--seed", str(seed)], torch.get_num_threads(), subject, files["ours"]]
            result = common.in_new_process(phases.whole, *run, DreamBooth)
            settings, recipe = result["settings"], files["diffusers"]
            seconds["ours"].append(our_seconds(result))
            seconds["diffusers"].append(train_recipe(base, loaded, settings, steps, seed, device, recipe))
            for side, file in files.items():
                rows[side].append(score(sd, metrics, loaded, file, images, seed, settings))
    return rows, seconds


def measured(args: argparse.Namespace) -> common.Report:
    """Train and score both with each seed."""
    more = ["--class-images", "4", "--solver-steps", "2", "--images-per-prompt", "1"] if args.quick else []
    steps, images = (4, 1) if args.quick else (args.steps, args.images)
    device = common.find_device(args.device)
    report = common.Report("benchmarks.dreambooth_peer" + (" --quick" if args.quick else ""), device)
    rows, seconds = compare(args.base, phases.DOG, device, args.seeds, steps, images, more)
    quality_table(report, rows)
    time_table(report, seconds)
    report(f"\n{steps} steps, {images} picture(s) a test prompt. The start of Python is not included.")
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    common.add_flags(parser)
    add = parser.add_argument
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--steps", type=count, default=400, help="gradient steps (default: %(default)s)")
    add("--images", type=count, default=2, help="pictures a test prompt (default: %(default)s)")
    add("--quick", action="store_true", help="4 steps, 4 class images and 2 solver steps, as a test")
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
