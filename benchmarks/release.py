"""How much faster is train.py than the same job done in the shape of the authors' release? Run by hand; no download.

    python -m benchmarks.release               # each piece of its work timed a few times, the whole worked out
    python -m benchmarks.release --full        # and all of it done: an hour and more
    python -m benchmarks.release --write       # and put the table into benchmarks/RESULTS.md

This is a simulation, written from what is known of the release (github.com/andrew-miao/RPO, commit d351ad5), on
diffusers and transformers; none of its code is here. Its shape:

- Pictures are drawn one at a time with 50 steps of DDIM, the sampler of its base; negatives go through JPEG.
- Every training step reads its photos and negatives from disk, and encodes pictures and prompts anew.
- Every validation loads ALIGN anew and embeds the photos anew; pictures are drawn and scored one by one.

The job is train.py's own: the same base, subject, number of negatives, gradient steps, pairs a step, validations and
validation pictures, guidance and learning rate; the solver's steps are each one's own. "As released" has the release's
16 negatives a prompt instead of 4, and no validation of the base. Our seconds are those of a real run of train.py in a
process of its own. Both without Python's start.
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
# Of ours, for --quick: every picture and step as in the real run, only fewer.
QUICK = ("--steps", "8", "--validate-every", "8", "--images-per-prompt", "1")


class Release:
    """The job in the release's shape. Each method is one piece of its work.

    folder: where negatives and checkpoints go. settings: train.py's lr, batch and guidance.
    """

    def __init__(self, base: Path, subject: Subject, folder: Path, settings: dict, device: torch.device):
        self.base, self.subject, self.folder, self.settings, self.device = base, subject, folder, settings, device
        self.draws, self.negatives = torch.Generator().manual_seed(0), []

    def load(self) -> None:
        """The base with DDIM, θ beside θ₀, AdamW."""
        self.pipe = common.pipeline(self.base, self.device, "DDIMScheduler")
        self.unet, self.base_unet = self.pipe.unet, copy.deepcopy(self.pipe.unet)
        self.unet.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=self.settings["lr"], weight_decay=0.01)
        self.size = self.unet.config.sample_size * self.pipe.vae_scale_factor

    def load_align(self) -> None:
        """ALIGN from disk, and the photos' features."""
        from transformers import AlignModel, BertTokenizer
        from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

        folder = self.base / "reward"
        self.align = AlignModel.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)
        self.eye = EfficientNetImageProcessorPil.from_pretrained(folder)
        self.words = BertTokenizer.from_pretrained(folder)
        self.photos = torch.cat([self.image_features(open_photo(path, self.size)) for path in self.subject.photos])

    @torch.no_grad()
    def image_features(self, image: Image.Image) -> torch.Tensor:
        """(1, features), of length 1."""
        features = self.align.get_image_features(**self.eye(image, return_tensors="pt").to(self.device))
        return F.normalize(getattr(features, "pooler_output", features), dim=-1)

    @torch.no_grad()
    def score(self, image: Image.Image, prompt: str) -> float:
        """ALIGN-I and ALIGN-T of one picture; the text keeps its token. Returns their harmonic mean, λ = 0.3."""
        ids = self.words(prompt, padding="max_length", max_length=64, truncation=True, return_tensors="pt")
        features = self.align.get_text_features(**ids.to(self.device))
        text, image = F.normalize(getattr(features, "pooler_output", features), dim=-1), self.image_features(image)
        align_i, align_t = (((image @ other.T).mean().item() + 1) / 2 for other in (self.photos, text))
        return 1 / (0.3 / align_i + 0.7 / align_t)

    def draw(self, prompt: str) -> Image.Image:
        """One picture."""
        guidance = self.settings["guidance"]
        with common.autocast(self.device):
            return self.pipe(prompt, num_inference_steps=SOLVER_STEPS, guidance_scale=guidance).images[0]

    def negative(self, prompt: str) -> None:
        """One more negative: drawn, stored as JPEG, scored."""
        path = self.folder / f"{len(self.negatives)}.jpg"
        image = self.draw(prompt)
        image.save(path)
        self.negatives.append((path, prompt, self.score(image, prompt)))

    def step(self) -> None:
        """One gradient step of RPO, everything read and encoded anew."""
        n, pipe = self.settings["batch"], self.pipe
        chosen = torch.randint(len(self.negatives), (n,), generator=self.draws).tolist()
        photos = torch.randint(len(self.subject.photos), (n,), generator=self.draws).tolist()
        paths, prompts, rewards = zip(*(self.negatives[i] for i in chosen), strict=True)
        images = [open_photo(path, self.size) for path in [*(self.subject.photos[i] for i in photos), *paths]]
        # The photos' own rewards cost nothing here, and 1 stands for them: a label's value changes no time.
        label = preference_label(preference_probability(torch.tensor(1.0), torch.tensor(rewards)), self.draws).to(
            self.device
        )
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
        loss = rpo_loss(ref, ref, gen, *base.chunk(2), label).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        loss.item()

    def validation_picture(self, prompt: str) -> None:
        """One picture, drawn and scored."""
        self.score(self.draw(prompt), prompt)

    def save(self) -> None:
        """The U-Net, as after a validation that was the best so far."""
        self.unet.save_pretrained(self.folder / "unet")


def measure(release: Release, times: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of each piece of work, `times` times each, after one that does not count (but for loading the base)."""
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
    """How often the release does each piece of work. ALIGN is loaded for the negatives and for each validation."""
    pictures = validations * prompts * images_per_prompt
    loads = {"load": 1, "load ALIGN, embed the photos": validations + 1, "negative": prompts * negatives_per_prompt}
    return loads | {"training step": steps, "validation picture": pictures, "save": validations}


def both_jobs(steps: int) -> tuple[dict, dict]:
    """The job with train.py's counts, which validates the base and the last step too, and as released."""
    same = job(8, 4, 4, steps, 1 + -(-steps // VALIDATE_EVERY))
    return same, job(8, 4, NEGATIVES_A_PROMPT, steps, steps // VALIDATE_EVERY)


def total(pieces: dict[str, list[float]], times: dict[str, int]) -> float:
    """Seconds of the whole job: what was measured as often as the job wants is added up, the rest is extrapolated."""
    whole = {name: times[name] * statistics.mean(seconds) for name, seconds in pieces.items()}
    return sum(whole.values())


def ours(result: dict, times: dict[str, int]) -> float:
    """Seconds of train.py's run, `phases.whole`'s result, brought to the job's counts where the run was shorter."""
    counts, seconds = result["counts"], result["seconds"]
    wanted = {"negatives": times["negative"], "training": times["training step"]}
    wanted |= {"validation": times["validation picture"], "saving": times["validation picture"]}
    done = counts | {"saving": counts["validation"]}
    return sum(value * wanted.get(name, 1) / done.get(name, 1) for name, value in seconds.items())


def measured(args: argparse.Namespace) -> common.Report:
    """The pieces, both totals and the ratio."""
    device, subject = common.device(args.device), load_subject(phases.DOG)
    report = common.Report("benchmarks.release" + (" --quick" if args.quick else ""), device)
    argv = QUICK if args.quick else ("--steps", str(args.steps))
    result = common.alone(phases.whole, flags.EMBEDDED_BASE, str(device), argv, torch.get_num_threads())
    same, released = both_jobs(args.steps)
    times = same if args.full else {name: min(1 if args.quick else args.samples, n) for name, n in same.items()}
    common.libraries()
    with tempfile.TemporaryDirectory() as folder:
        pieces = measure(Release(flags.EMBEDDED_BASE, subject, Path(folder), result["settings"], device), times)
    table(report, pieces, same, released, result)
    return report


def main() -> int:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("--full", action="store_true", help="do the whole job in the release's shape too, and extrapolate nothing")
    add("--quick", action="store_true", help="one of each, and a short run of ours, to see that it works")
    add("--samples", type=count, default=5, help="of each piece of the release's work (default: %(default)s)")
    add("--steps", type=count, default=400, help="gradient steps of the job (default: %(default)s)")
    add("--device", help="cpu or cuda (default: the best there is)")
    add("--threads", type=count, help="of a CPU (default: as many as torch takes)")
    add("--write", action="store_true", help=f"put the table into {common.RESULTS.name}, in this machine's section")
    args = parser.parse_args()
    return common.finish(measured, args)


def table(report: Callable, pieces: dict, same: dict, released: dict, result: dict) -> None:
    """Each piece of the release's work, both totals, and the ratio to ours."""
    report("\n### The release's shape on weights/toy, piece by piece\n")
    report("| piece | s (mean) | measured | same counts | as released |\n|---|---|---|---|---|")
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
    wanted = {
        "negatives": same["negative"],
        "training": same["training step"],
        "validation": same["validation picture"],
    }
    brought = "" if result["counts"] == wanted else " brought to the whole job's counts phase by phase"
    report(f"train.py: measured with {run_counts}{brought}.")


if __name__ == "__main__":
    sys.exit(main())
