"""The time of train.py, compared with the same job in the form of the authors' released code.

    python -m benchmarks.release               # time each part a few times, and extrapolate the whole job
    python -m benchmarks.release --full        # do the whole job: an hour and more
    python -m benchmarks.release --write       # also put the table into benchmarks/RESULTS.md

This is a simulation on diffusers and transformers, written from a description of the release
(github.com/andrew-miao/RPO, commit d351ad5); none of its code is here. In the release

- pictures are generated one at a time with 50 steps of DDIM, its base's sampler; negatives are saved as JPEG;
- every training step reads its photos and negatives from disk, and encodes pictures and prompts again;
- every validation loads ALIGN and embeds the photos again; pictures are generated and scored one by one.

The job is that of train.py: the same base, subject, number of negatives, gradient steps, pairs a step, validations and
validation pictures, guidance and learning rate. Each side has its own solver steps. "As released" has the release's 16
negatives a prompt instead of 4, and no validation of the base. Our seconds are those of a real run of train.py. The
start of Python is not included.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import common, phases
from rpo import denoising_loss, preference_label, preference_probability, rpo_loss
from subject import Subject, load_subject, open_photo
from support import flags
from support.settings import count

SOLVER_STEPS, NEGATIVES_A_PROMPT, VALIDATE_EVERY = 50, 16, 40  # the release's; the last is train.py's too
# train.py's flags for --quick: fewer pictures and steps, each as in the real run.
QUICK = ("--steps", "8", "--validate-every", "8", "--images-per-prompt", "1")


class Release:
    """The job in the form of the release; each method is one part of it.

    folder: for negatives and checkpoints. settings: train.py's lr, batch and guidance.
    """

    def __init__(self, base: Path, subject: Subject, folder: Path, settings: dict, device: torch.device):
        self.base, self.subject, self.folder, self.settings, self.device = base, subject, folder, settings, device
        self.draws, self.negatives = torch.Generator().manual_seed(0), []

    def load(self) -> None:
        """Load the base with DDIM; make θ, θ₀ and AdamW."""
        self.pipe = common.pipeline(self.base, self.device, "DDIMScheduler")
        self.unet, self.base_unet = self.pipe.unet, copy.deepcopy(self.pipe.unet)
        self.unet.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=self.settings["lr"], weight_decay=0.01)
        self.size = self.unet.config.sample_size * self.pipe.vae_scale_factor

    def load_align(self) -> None:
        """Load ALIGN and embed the photos."""
        from transformers import AlignModel, BertTokenizer
        from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

        folder = self.base / "reward"
        self.align = AlignModel.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)
        self.eye = EfficientNetImageProcessorPil.from_pretrained(folder)
        self.words = BertTokenizer.from_pretrained(folder)
        self.photos = torch.cat([self.image_features(open_photo(path, self.size)) for path in self.subject.photos])

    @torch.no_grad()
    def image_features(self, image: Image.Image) -> torch.Tensor:
        """(1, width), of length 1."""
        features = self.align.get_image_features(**self.eye(image, return_tensors="pt").to(self.device))
        return F.normalize(getattr(features, "pooler_output", features), dim=-1)

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """The λ-Harmonic reward of one picture, λ = 0.3; the prompt keeps its token."""
        ids = self.words(prompt, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        features = self.align.get_text_features(**ids.to(self.device))
        text, image = F.normalize(getattr(features, "pooler_output", features), dim=-1), self.image_features(image)
        align_i, align_t = (((image @ other.T).mean().item() + 1) / 2 for other in (self.photos, text))
        return 1 / (0.3 / align_i + 0.7 / align_t)

    def draw(self, prompt: str) -> Image.Image:
        """Generate one picture."""
        guidance = self.settings["guidance"]
        with common.autocast(self.device):
            return self.pipe(prompt, num_inference_steps=SOLVER_STEPS, guidance_scale=guidance).images[0]

    def negative(self, prompt: str) -> None:
        """Generate one more negative, save it as JPEG, score it."""
        path = self.folder / f"{len(self.negatives)}.jpg"
        image = self.draw(prompt)
        image.save(path)
        self.negatives.append((path, prompt, self.score(image, prompt)))

    def step(self) -> None:
        """One gradient step of RPO; everything is read and encoded again."""
        n, pipe = self.settings["batch"], self.pipe
        chosen = torch.randint(len(self.negatives), (n,), generator=self.draws).tolist()
        photos = torch.randint(len(self.subject.photos), (n,), generator=self.draws).tolist()
        paths, prompts, rewards = zip(*(self.negatives[i] for i in chosen), strict=True)
        images = [open_photo(path, self.size) for path in [*(self.subject.photos[i] for i in photos), *paths]]
        # The reward of all photos is taken as 1: the value of a label does not change the time.
        label = preference_label(preference_probability(torch.tensor(1.0), torch.tensor(rewards)), self.draws)
        t = torch.randint(1000, (n,), generator=self.draws).repeat(2).to(self.device)
        with common.autocast(self.device):
            with torch.no_grad():
                pixels = pipe.image_processor.preprocess(images).to(self.device)
                x_0 = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
                texts = [self.subject.instance_prompt] * n + list(prompts)
                ids = pipe.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
                context = pipe.text_encoder(ids.to(self.device))[0]
                eps = torch.randn_like(x_0[:n]).repeat(2, 1, 1, 1)
                x_t = pipe.scheduler.add_noise(x_0, eps, t)
                base = denoising_loss(self.base_unet(x_t, t, context).sample, eps)
            ours = denoising_loss(self.unet(x_t, t, context).sample, eps)
        ref, gen = ours.chunk(2)
        loss = rpo_loss(ref, ref, gen, *base.chunk(2), label.to(self.device)).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        loss.item()

    def validation_picture(self, prompt: str) -> None:
        """Generate one picture and score it."""
        self.score(self.draw(prompt), prompt)

    def save(self) -> None:
        """Save the U-Net, as after the best validation so far."""
        self.unet.save_pretrained(self.folder / "unet")


def measure(release: Release, times: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each part, `times` times each, after a first time that is not counted, except for loading the base."""
    prompts = release.subject.training_prompts

    def timed(work: Callable, count: int, *arguments, warm: int = 1) -> list[float]:
        seconds = []
        for i in range(count + warm):
            common.synchronize(release.device)
            start = time.perf_counter()
            work(*(each[i % len(each)] for each in arguments))
            common.synchronize(release.device)
            seconds.append(time.perf_counter() - start)
        return seconds[warm:]

    pieces = {"load": timed(release.load, times["load"], warm=0)}
    pieces["load ALIGN, embed the photos"] = timed(release.load_align, times["load ALIGN, embed the photos"])
    pieces["negative"] = timed(release.negative, times["negative"], prompts)
    pieces["training step"] = timed(release.step, times["training step"])
    pieces["validation picture"] = timed(release.validation_picture, times["validation picture"], prompts)
    pieces["save"] = timed(release.save, times["save"])
    return pieces


def job(prompts: int, images_per_prompt: int, negatives_per_prompt: int, steps: int, validations: int) -> dict:
    """How often the release does each part. It loads ALIGN for the negatives and for each validation."""
    pictures = validations * prompts * images_per_prompt
    loads = {"load": 1, "load ALIGN, embed the photos": validations + 1, "negative": prompts * negatives_per_prompt}
    return loads | {"training step": steps, "validation picture": pictures, "save": validations}


def both_jobs(steps: int) -> tuple[dict, dict]:
    """The counts of train.py, which also validates the base and the last step, and those of the release."""
    same = job(8, 4, 4, steps, 1 + -(-steps // VALIDATE_EVERY))
    return same, job(8, 4, NEGATIVES_A_PROMPT, steps, steps // VALIDATE_EVERY)


def total(pieces: dict[str, list[float]], times: dict[str, int]) -> float:
    """Seconds of the whole job: the mean of each part times its count."""
    whole = {name: times[name] * statistics.mean(seconds) for name, seconds in pieces.items()}
    return sum(whole.values())


def ours(result: dict, times: dict[str, int]) -> float:
    """Seconds of train.py, from the result of `phases.whole`; a shorter run is scaled to the job's counts by phase."""
    counts, seconds = result["counts"], result["seconds"]
    wanted = {"negatives": times["negative"], "training": times["training step"]}
    wanted |= {"validation": times["validation picture"], "saving": times["validation picture"]}
    done = counts | {"saving": counts["validation"]}
    return sum(value * wanted.get(name, 1) / done.get(name, 1) for name, value in seconds.items())


def measured(args: argparse.Namespace) -> common.Report:
    """Measure both, and report the table."""
    device, subject = common.find_device(args.device), load_subject(phases.DOG)
    report = common.Report("benchmarks.release" + (" --quick" if args.quick else ""), device)
    argv = QUICK if args.quick else ("--steps", str(args.steps))
    result = common.in_new_process(phases.whole, args.base, str(device), argv, torch.get_num_threads())
    same, released = both_jobs(args.steps)
    times = same if args.full else {name: min(1 if args.quick else args.samples, n) for name, n in same.items()}
    common.libraries()
    with tempfile.TemporaryDirectory() as folder:
        pieces = measure(Release(args.base, subject, Path(folder), result["settings"], device), times)
    table(report, pieces, same, released, result)
    return report


def table(report: Callable, pieces: dict, same: dict, released: dict, result: dict) -> None:
    """Each part of the release's work, both totals, and their ratio to ours."""
    report("\n### The job in the form of the release, on weights/toy\n")
    report("| part | s (mean) | measured | same counts | as released |\n|---|---|---|---|---|")
    for name, seconds in pieces.items():
        mean, measured = statistics.mean(seconds), len(seconds)
        jobs = " | ".join(f"{times[name]} x = {times[name] * mean:.0f} s" for times in (same, released))
        report(f"| {name} | {mean:.3g} | {measured} x | {jobs} |")
    theirs, mine = [total(pieces, times) for times in (same, released)], ours(result, same)
    report(f"| all | | | {theirs[0]:.0f} s | {theirs[1]:.0f} s |")
    report(f"| train.py | | | {mine:.0f} s | {mine:.0f} s |")
    report(f"| **ratio** | | | **{theirs[0] / mine:.1f}** | **{theirs[1] / mine:.1f}** |")
    missing = [f"{name} from {len(s)} of {same[name]}" for name, s in pieces.items() if len(s) < same[name]]
    report(f"\nExtrapolated: {'; '.join(missing) or 'nothing'}.")
    run_counts = ", ".join(f"{name} {count}" for name, count in result["counts"].items())
    wanted = [same[name] for name in ("negative", "training step", "validation picture")]
    scaled = "" if list(result["counts"].values()) == wanted else ", scaled to the whole job's counts phase by phase"
    report(f"train.py: measured with {run_counts}{scaled}.")


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    common.add_flags(parser)
    add("--full", action="store_true", help="do the whole job in the form of the release, extrapolate nothing")
    add("--quick", action="store_true", help="each part once, and a short run of ours, as a test")
    add("--samples", type=count, default=5, help="times to measure each part of the release (default: %(default)s)")
    add("--steps", type=count, default=400, help="gradient steps of the job (default: %(default)s)")
    args = parser.parse_args()
    return common.finish(measured, args)


if __name__ == "__main__":
    sys.exit(main())
