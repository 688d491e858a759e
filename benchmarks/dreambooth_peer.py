"""Is our DreamBooth as good as diffusers' public recipe, and how fast is it? Run by hand; needs no download.

    python -m benchmarks.dreambooth_peer --seeds 0 1 2      # 400 steps each on weights/toy
    python -m benchmarks.dreambooth_peer --quick            # a few steps, to see that it works
    python -m benchmarks.dreambooth_peer --write            # and put the tables into benchmarks/RESULTS.md

The recipe, written anew on diffusers: class images drawn once by the base; then batches of as many photos as class
images, each picture and prompt encoded in the step that uses it, each with its own ε and t; mean squared error plus 1.0
times the same on the class images; AdamW, weight decay 0.01, constant learning rate, gradients clipped to norm 1; the
last weights are the result. Ours is `python -m baselines dreambooth --keep-last`, with no validation but the first and
the last. Both: the same base, photos, prompts, number of class images, solver, steps, batch and learning rate.

Both results are drawn by us, DreamBench's 25 test prompts from the same noise, and scored by evaluate.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
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


def class_images(pipe, prompt: str, count: int, settings: dict, seed: int) -> list[Image.Image]:
    """Pictures of the class's prompt, eight at a time as ours."""
    draws, images = torch.Generator().manual_seed(seed), []
    options = {"num_inference_steps": int(settings["solver_steps"]), "guidance_scale": settings["guidance"]}
    while len(images) < count:
        n = min(8, count - len(images))
        with common.autocast(pipe.device):
            images += pipe([prompt] * n, generator=draws, **options).images
    return images


def recipe(
    base: Path, subject: Subject, settings: dict, steps: int, seed: int, device: torch.device, result: Path
) -> dict[str, float]:
    """Train with diffusers and write the U-Net to `result`; returns the seconds of loading, drawing and training."""
    from diffusers import DDPMScheduler

    common.libraries()
    start = time.perf_counter()
    torch.manual_seed(seed)
    pipe = common.pipeline(base, device)
    noise = DDPMScheduler.from_pretrained(base / "scheduler")
    unet, n = pipe.unet, settings["batch"]
    loaded = time.perf_counter()
    drawn = class_images(pipe, subject.class_prompt, settings["class_images"], settings, seed)
    prepared = time.perf_counter()

    photos = load_photos(subject, unet.config.sample_size * pipe.vae_scale_factor)
    prompts = [subject.instance_prompt] * n + [subject.class_prompt] * n
    unet.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings["lr"], weight_decay=0.01)
    for _ in range(steps):
        images = [pictures[i] for pictures in (photos, drawn) for i in torch.randint(len(pictures), (n,)).tolist()]
        with common.autocast(device):
            with torch.no_grad():
                pixels = pipe.image_processor.preprocess(images).to(device)
                x_0 = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
                ids = pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
                context = pipe.text_encoder(ids.to(device))[0]
            eps = torch.randn_like(x_0)
            t = torch.randint(noise.config.num_train_timesteps, (2 * n,), device=device)
            prediction = unet(noise.add_noise(x_0, eps, t), t, context).sample
        target = eps if noise.config.prediction_type == "epsilon" else noise.get_velocity(x_0, eps, t)
        (of_photos, of_class), (photo, kind) = prediction.float().chunk(2), target.float().chunk(2)
        loss = F.mse_loss(of_photos, photo) + 1.0 * F.mse_loss(of_class, kind)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        loss.item()
    common.synchronize(device)
    trained = time.perf_counter()
    save_tensors(unet.state_dict(), result, {"format": "pt"})
    return {"load": loaded - start, "class images": prepared - loaded, "training": trained - prepared}


def our_seconds(result: dict) -> dict[str, float]:
    """Of `phases.whole`, in the recipe's phases; validation is given too, which the recipe has none of."""
    seconds = dict(result["seconds"])
    return {
        "load": seconds["load"],
        "class images": seconds["negatives"],
        "training": seconds["training"],
        "validation": seconds["validation"] + seconds["saving"] + seconds["rest"],
    }


def score(
    sd: StableDiffusion, metrics: Metrics, subject: Subject, unet: Path, images: int, seed: int, settings: dict
) -> dict[str, float]:
    """DINO, CLIP-I and CLIP-T of a U-Net on the 25 test prompts, `images` each."""
    sd.load_unet(unet)
    prompts = [prompt for prompt in subject.test_prompts for _ in range(images)]
    seeds = [1000 * seed + i for i in range(len(prompts))]
    scores = metrics(sd.generate(prompts, seeds, int(settings["solver_steps"]), settings["guidance"]), prompts)
    return {name: scores[name].mean().item() for name in NAMES}


def within_the_spread(ours: list[float], theirs: list[float]) -> bool:
    """Do the means differ by less than the seeds do, two standard errors of the difference?"""
    if len(ours) < 2:
        return False  # one seed has no spread
    error = ((statistics.variance(ours) + statistics.variance(theirs)) / len(ours)) ** 0.5
    return abs(statistics.mean(ours) - statistics.mean(theirs)) <= 2 * error


def tables(report, rows: dict[str, list[dict]], seconds: dict[str, list[dict]]) -> None:
    """Quality, then where the time went. rows and seconds: of "ours" and "diffusers" by seed; rows also of "base"."""
    spread = len(rows["ours"]) > 1
    report(f"\n### DreamBooth beside diffusers' recipe, {len(rows['ours'])} seed(s), mean ± sd\n")
    report("| | " + " | ".join(NAMES.values()) + " |\n|---|" + "---|" * len(NAMES))
    for side, scores in rows.items():
        cells = []
        for name in NAMES:
            values = [row[name] for row in scores]
            cells.append(f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if spread else ""))
        report(f"| {side} | {' | '.join(cells)} |")
    if spread:
        same = {
            n: within_the_spread(*([row[n] for row in rows[side]] for side in ("ours", "diffusers"))) for n in NAMES
        }
        cells = ["yes" if good else "**no**" for good in same.values()]
        report(f"| apart by at most two standard errors? | {' | '.join(cells)} |")
    report("\n| seconds (mean) | ours | diffusers' recipe | diffusers / ours |\n|---|---|---|---|")
    means = {s: {n: statistics.mean(x[n] for x in each) for n in each[0]} for s, each in seconds.items()}
    mine, other = means["ours"], means["diffusers"]
    for name in other:
        report(f"| {name} | {mine[name]:.1f} | {other[name]:.1f} | {other[name] / mine[name]:.2f} |")
    report(f"| validations, saving, the rest | {mine['validation']:.1f} | | |")
    without = sum(mine.values()) - mine["validation"]
    report(f"| all but validation | {without:.1f} | {sum(other.values()):.1f} | {sum(other.values()) / without:.2f} |")
    whole = sum(mine.values())
    report(f"| all | {whole:.1f} | {sum(other.values()):.1f} | {sum(other.values()) / whole:.2f} |")


def compare(
    base: Path, subject: Path, device: torch.device, seeds: list[int], steps: int, images: int, more: list[str]
) -> tuple[dict[str, list], dict[str, list]]:
    """Train both for each seed, taking turns; returns their scores and their seconds. more: flags for train.py."""
    loaded = load_subject(subject)
    sd = StableDiffusion.from_pretrained(base, device)
    photos = load_photos(loaded, sd.image_size)
    folders = {"clip": base / "metrics" / "clip", "dino": base / "metrics" / "dino", "align": base / "reward"}
    metrics = Metrics.from_folders(**folders, photos=photos, token=loaded.token, device=device)
    rows, seconds = {"base": [], "ours": [], "diffusers": []}, {"ours": [], "diffusers": []}
    common.libraries()
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(seeds, "seeds"):
            files = {"base": Path(folder) / "base.safetensors"}
            files |= {side: Path(folder) / f"{side}{seed}.safetensors" for side in ("ours", "diffusers")}
            argv = ["--keep-last", "--steps", steps, "--validate-every", steps]
            argv = [*map(str, argv), "--seed", str(seed), *more]
            run_of_ours = common.alone(
                phases.whole, base, str(device), argv, torch.get_num_threads(), subject, files["ours"], DreamBooth
            )
            settings = run_of_ours["settings"]
            seconds["ours"].append(our_seconds(run_of_ours))
            seconds["diffusers"].append(recipe(base, loaded, settings, steps, seed, device, files["diffusers"]))
            if not files["base"].exists():
                save_tensors(sd.unet.state_dict(), files["base"], {"format": "pt"})
            for side, file in files.items():
                rows[side].append(score(sd, metrics, loaded, file, images, seed, settings))
    return rows, seconds


def measured(args: argparse.Namespace) -> common.Report:
    """Both trainings of each seed, scored."""
    more = ["--class-images", "4", "--solver-steps", "2", "--images-per-prompt", "1"] if args.quick else []
    steps, images = (4, 1) if args.quick else (args.steps, args.images)
    device = common.device(args.device)
    report = common.Report("benchmarks.dreambooth_peer" + (" --quick" if args.quick else ""), device)
    rows, seconds = compare(flags.EMBEDDED_BASE, phases.DOG, device, args.seeds, steps, images, more)
    tables(report, rows, seconds)
    report(f"\n{steps} steps, {images} picture(s) a test prompt. Python's own start is not counted.")
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--seeds", type=seed_number, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    add("--steps", type=count, default=400, help="gradient steps (default: %(default)s)")
    add("--images", type=count, default=2, help="pictures a test prompt (default: %(default)s)")
    add("--quick", action="store_true", help="4 steps, 4 class images and 2 solver steps, to see that it works")
    add("--device", help="cpu or cuda (default: the best there is)")
    add("--threads", type=count, help="of a CPU (default: as many as torch takes)")
    add("--write", action="store_true", help=f"put the tables into {common.RESULTS.name}, in this machine's section")
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
