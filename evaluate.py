"""Measure a checkpoint as DreamBench does: DINO, CLIP-I and CLIP-T, and ALIGN-I, ALIGN-T and their λ-Harmonic mean.

    python evaluate.py --ckpt best.safetensors --subject data/dog
    python evaluate.py --subject data/dog                              # the base alone, for comparison
    python evaluate.py --dreambench dreambooth/dataset --ckpt "runs/{subject}/best.safetensors"

Draws the 25 test prompts, 4 images each, and writes best.eval.json (settings, networks, means and standard deviations,
every image's numbers) and the pictures in best.eval/; the base alone is base-toy-dog.eval, in the current folder.
--dreambench does so for every subject of the public data set (google/dreambooth); the same command again continues
after an interruption. With `torchrun --standalone --nproc_per_node=N evaluate.py --dreambench ...` N processes share
the subjects.
"""

from __future__ import annotations

from support import evaluation, flags, machine, ranks  # first: Ctrl-C during the other imports is one line

# isort: split
import argparse
import sys
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.aesthetic import AestheticPredictor
from model.align import ALIGN
from model.clip import CLIP
from model.dino import DINO
from model.files.photo import open_photo
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_finite
from model.tokenizer import BertTokenizer, CLIPTokenizer
from reward import Reward, lambda_harmonic, strip_token, unit_features
from support.evaluation import Job, mean_and_sd
from support.pictures import drawn_with, grid, picture_name, save_png
from support.randomness import TEST, picture_seeds
from support.results import check_writable, write_json

TITLES = {"dino": "DINO", "clip_i": "CLIP-I", "clip_t": "CLIP-T", "align_i": "ALIGN-I", "align_t": "ALIGN-T"}
TITLES |= {"lambda_harmonic": "λ-Harmonic", "aesthetic": "Aesthetic"}  # the last only with --aesthetic
MEANING = "mean ± SD over the means of the prompts (last row: over those of all subjects)."


class Metrics:
    """Scores of pictures of one subject (DreamBooth, arXiv 2208.12242, section 4.2; RPO, arXiv 2407.12164, section 5).

    DINO, CLIP-I    cosine of the picture and a photo, averaged over the photos
    CLIP-T          cosine of the picture and its prompt without the token; 0 if negative
    ALIGN-I, -T     reward.py's, mapped to [0, 1]
    Aesthetic       LAION's predictor on CLIP ViT-L/14, about 1 to 10; only with its two networks (RPO, Table 8)

    Published numbers are of facebook/dino-vits16, openai/clip-vit-base-patch16 and kakaobrain/align-base; scores of
    other networks cannot be compared with them. (RPO's release leaves the token in: its pattern matches nothing. It
    clamps the mean of a call at 0, not each score.)
    """

    def __init__(
        self,
        clip: CLIP,
        tokenizer: CLIPTokenizer,
        dino: DINO,
        reward: Reward,
        photos: list[Image.Image],
        aesthetic: tuple[CLIP, AestheticPredictor] | None = None,
    ):
        """Embeds the photos. Raises ValueError if there are none, or if the tokenizer is another CLIP's."""
        tokenizer.check_fits(clip.config.text_config, "CLIP")
        self.clip, self.tokenizer, self.dino, self.reward, self.aesthetic = clip, tokenizer, dino, reward, aesthetic
        self.device = clip.logit_scale.device
        self.dino_photos, self.clip_photos = self._dino(photos), self._clip(photos)  # (photos, width), unit length

    @classmethod
    def from_folders(
        cls,
        clip: Path,
        dino: Path,
        align: Path,
        photos: list[Image.Image],
        token: str = "[V]",
        device: torch.device | str = "cpu",
        aesthetic: Path | None = None,
        aesthetic_clip: Path | None = None,
    ) -> Metrics:
        """Load the networks from folders in the public layouts. Raises CheckpointError, naming the file."""
        reward = Reward(ALIGN.from_pretrained(align).to(device), BertTokenizer.from_pretrained(align), photos, token)
        tokenizer, clip = CLIPTokenizer.from_pretrained(clip), CLIP.from_pretrained(clip).to(device)
        dino, predictor = DINO.from_pretrained(dino).to(device), None
        if aesthetic:
            large = CLIP.from_pretrained(aesthetic_clip).to(device)
            predictor = large, AestheticPredictor.from_pretrained(aesthetic, large)
        return cls(clip, tokenizer, dino, reward, photos, predictor)

    def for_subject(self, photos: list[Image.Image], token: str) -> Metrics:
        """The same networks for another subject."""
        reward = Reward(self.reward.align, self.reward.tokenizer, photos, token)
        return Metrics(self.clip, self.tokenizer, self.dino, reward, photos, self.aesthetic)

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> dict[str, Tensor]:
        """n RGB pictures, and each one's prompt -> {"dino", "clip_i", "clip_t", "align_i", "align_t"}, each (n,) fp32.

        And "aesthetic", if its networks are there. Raises ValueError if there are not as many prompts as pictures,
        FloatingPointError if a network's output is not finite.
        """
        align_i, align_t = self.reward.alignments(images, prompts)
        texts = [strip_token(prompt, self.reward.token) for prompt in prompts]
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # each text is embedded once
        features = unit_features(self.clip.text_features, self.tokenizer, list(rows), self.device)
        text = features[[rows[text] for text in texts]]
        clip, dino = self._clip(images), self._dino(images)  # (n, width), unit length
        scores = {"dino": (dino @ self.dino_photos.T).mean(1), "clip_i": (clip @ self.clip_photos.T).mean(1)}
        scores |= {"clip_t": (clip * text).sum(1).clamp(min=0), "align_i": align_i, "align_t": align_t}
        if self.aesthetic:
            large, predictor = self.aesthetic
            features = unit_features(large.image_features, large.preprocess, images, self.device)
            scores["aesthetic"] = check_finite(predictor(features), "the aesthetic predictor's output")
        return scores

    def _dino(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.dino, self.dino.preprocess, images, self.device)

    def _clip(self, images: list[Image.Image]) -> Tensor:
        return unit_features(self.clip.image_features, self.clip.preprocess, images, self.device)


class Evaluator:
    """Draws and scores one subject after another. The networks stay loaded for subjects with the same base."""

    def __init__(self, device: torch.device, batch: int | None, precision: str):
        self.device, self.batch, self.precision, self.loaded = device, batch, precision, None

    def __call__(self, job: Job) -> dict:
        """Draw, score and write one subject; return the content of its JSON file."""
        self.load(job)
        prompts = [prompt for prompt in job.subject.test_prompts for _ in range(job.settings["n"])]
        seeds = picture_seeds(job.settings["seed"], TEST, len(prompts))
        images, files = self.draw(job, prompts, seeds)
        scores = self.metrics(images, prompts)
        scores["lambda_harmonic"] = lambda_harmonic(scores["align_i"], scores["align_t"], job.settings["lambda"])
        scores = {name: [round(value, 6) for value in values.tolist()] for name, values in scores.items()}
        return job.write({"prompt": prompts, "seed": seeds, "file": files}, scores)

    def draw(self, job: Job, prompts: list[str], seeds: list[int]) -> tuple[list[Image.Image], list[str]]:
        """Draw and save a picture of each prompt; return the pictures and their file names."""
        settings = job.settings
        options = {name: settings[name] for name in ("steps", "guidance", "sampler")}
        flags.warn_of_truncation(self.sd.tokenizer, prompts)
        quiet, title = ranks.rank() > 0, job.subject.folder.name
        with tqdm(total=len(prompts), desc=title, unit="image", leave=False, delay=0.1, disable=quiet) as bar:
            place = {"size": settings["size"], "batch_size": self.batch, "on_batch": bar.update}
            images = self.sd.generate(prompts, seeds, **options, **place)
        about = {"size": images[0].width, "ckpt": job.ckpt, "base": job.base[0], "header": job.header}
        text, files = drawn_with(self.sd.unet, **options, **about), []
        for image, prompt, seed in zip(images, prompts, seeds, strict=True):
            files.append(save_png(image, job.out / picture_name(prompt, seed), prompt, text, seed).name)
        save_png(grid(images, settings["n"]), job.out / "grid.png", "\n".join(job.subject.test_prompts), text, seeds[0])
        return images, files

    def load(self, job: Job) -> None:
        """Load what is not loaded yet. Raises CheckpointError, naming the file, for what does not fit."""
        # In their own resolution, from which each network's preprocessing starts; square, as training sees them. (The
        # released evaluation cuts nothing beforehand, which differs for photos that are not square.)
        photos, token = [open_photo(photo) for photo in job.subject.photos], job.subject.token
        lora = "lora_rank" in job.header  # it needs the base's own weights, which a whole U-Net has replaced
        if self.loaded == (job.base, job.folders, lora):
            self.metrics = self.metrics.for_subject(photos, token)
        else:
            self.loaded = self.metrics = self.sd = None  # free the memory first
            self.metrics = Metrics.from_folders(**job.folders, photos=photos, token=token, device=self.device)
            base, variant, prediction_type = job.base
            self.sd = StableDiffusion.from_pretrained(base, self.device, variant, prediction_type)
            self.sd.precision = PRECISIONS[self.precision]
            self.loaded = job.base, job.folders, lora
        if job.ckpt:
            self.sd.load_checkpoint(job.ckpt)
        machine.cast_frozen_weights(self.sd.unet, self.sd.precision)


def titles(args: argparse.Namespace) -> dict[str, str]:
    """The metrics of this command, and their titles in tables."""
    return {name: title for name, title in TITLES.items() if name != "aesthetic" or args.aesthetic}


def run_one(args: argparse.Namespace, evaluator: Evaluator) -> int:
    job = evaluation.prepare_job(args, args.subject, args.out)
    subject, settings = job.subject, job.settings
    kind = "given with --prompts" if args.prompts else "of living subjects" if subject.live else "of things"
    print(f"subject {subject.folder}: {len(subject.photos)} photos of {subject.noun!r}, prompts {kind}")
    drawn = f"{settings['steps']} steps of {settings['sampler']}, guidance {settings['guidance']:g}"
    print(f"{job.ckpt or 'no checkpoint'}, base {settings['base']}, {drawn}")
    result = evaluator(job)
    networks = result["networks"] | {"lambda": f"ALIGN-I and ALIGN-T, λ = {settings['lambda']:g}"}
    print(f"\n{'':12}{'mean':>8}{'SD':>8}  measured with")
    for name, title in titles(args).items():
        network, (mean, sd) = networks.get(name.split("_")[0], ""), result["means"][name].values()
        print(f"{title:12}{mean:8.4f}{sd:8.4f}  {network}")
    print(f"The SD is over the means of the prompts: {len(subject.test_prompts)}, images a prompt: {args.n}.")
    print(f"The text of CLIP-T and ALIGN-T is {result['scored_text']}.")
    print(f"every image's numbers are in {job.result}, the pictures in {job.out}")
    return 0


def run_many(args: argparse.Namespace, evaluator: Evaluator) -> int:
    summary = evaluation.place(args, "dreambench").with_suffix(".eval.json")
    check_writable(summary)
    metrics = titles(args)
    # values: of each subject and metric, a value a prompt
    values, failed = evaluation.evaluate_subjects(args, evaluator, metrics)
    if values and ranks.rank() == 0:
        rows = {name: {key: mean_and_sd(own[key]) for key in metrics} for name, own in values.items()}
        every = {key: mean_and_sd([value for own in values.values() for value in own[key]]) for key in metrics}
        write_json(summary, {"means": every, "subjects": rows, "failed": failed})
        print(f"\n| subject | {' | '.join(metrics.values())} |\n|---|{'---|' * len(metrics)}")
        for name, row in [*rows.items(), (f"all {len(rows)}", every)]:
            print(f"| {name} |", *(f"{row[key]['mean']:.3f} ± {row[key]['sd']:.3f} |" for key in metrics))
        print(f"\n{MEANING} The same numbers are in {summary}.")
    ranks.barrier()  # torchrun ends all processes when one ends with status 1
    return 1 if failed else 0


def main() -> int:
    args = evaluation.parse(__doc__)
    rest = "; the same command continues with the subjects that are not done" if args.dreambench else ""

    def work() -> int:
        device = flags.device(args.device)
        args.precision = machine.precision(args.precision, device)
        return (run_one if args.subject else run_many)(args, Evaluator(device, args.batch, args.precision))

    return flags.guarded(work, lambda: evaluation.REMEDY, f"interrupted{rest}")


if __name__ == "__main__":
    sys.exit(ranks.distributed(main))
