"""Fine-tune Stable Diffusion on one subject with Reward Preference Optimization (RPO, arXiv 2407.12164).

    python train.py --subject data/dog --steps 400                        # the embedded base, minutes on a laptop
    python train.py --subject my_dog --noun dog --base sd15               # public weights, see README.md
    python train.py --subject data/dog --resume                           # go on, with the same flags as before
    python train.py --subject data/dog --method dreambooth --keep-last --ckpt dreambooth.safetensors    # to compare
    torchrun --standalone --nproc_per_node=4 train.py --subject my_dog --noun dog --base sd15 --batch 4   # on 4 GPUs

Writes best.safetensors (the U-Net of the best validation, in the public layout), best.jsonl (the history, a line a step
or validation) and best.png (the film strip); --ckpt moves all of them.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
from einops import repeat
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from baselines.dpg import DPG, REWARDS
from baselines.dreambooth import DreamBooth
from model.align import ALIGN
from model.dino import DINO
from model.files.errors import CheckpointError, is_out_of_memory
from model.lora import add_lora, lora_header, lora_tensors, without_lora
from model.stable_diffusion import PRECISIONS, StableDiffusion, check_layout, home_of
from model.tokenizer import BertTokenizer
from reward import MEANS, Reward, unit_features
from rpo import RPO, denoising_loss, preference_label, preference_probability
from subject import Subject, load_photos, load_subject
from support import flags, machine, memory, ranks
from support.record import STATE, Record, alone, check_place, fingerprint, metadata

NEGATIVES, VALIDATION = 3, 4  # places of noise that a seed fixes, each its own; 2 is evaluate.py's


def generator(seed: int, *position: int) -> torch.Generator:
    """The source of every draw at one place of the run, such as (seed, step): a resumed run draws the same."""
    words = np.random.SeedSequence([seed, *position]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0]))


class Trainer:
    """One run: what is prepared once, the step, the validation, and the files."""

    def __init__(
        self,
        args: argparse.Namespace,
        subject: Subject,
        sd: StableDiffusion,
        align: ALIGN,
        dino: DINO | None = None,
    ):
        """dino: for DPG's DINO reward."""
        self.args, self.subject, self.sd, self.dino = args, subject, sd, dino
        self.method = method_of(args, sd)
        self.first_step = 1
        self.away: list[torch.nn.Module] = []  # networks that are on the device for validations only
        self.photos = load_photos(subject, sd.image_size)
        tokenizer, mean = BertTokenizer.from_pretrained(args.align), MEANS[args.mean]
        self.reward = Reward(align, tokenizer, self.photos, subject.token, mean)
        if args.lora_rank:  # θ₀ is the same network without its adapters
            self.base_unet = self.unet = sd.unet
            self.learned = add_lora(sd.unet, args.lora_rank, generator=generator(args.seed, 0, 2))
        else:
            self.base_unet, self.unet = sd.unet, copy.deepcopy(sd.unet)  # θ₀ and θ
            self.learned = self.unet.requires_grad_(True)
        self.unet.train()
        machine.prepare_networks(args, sd, self.unet, self.base_unet)
        self.at_once = sd.drawing_batch(reserve=sum(8 * each.numel() for each in self.learned.parameters()))
        fused = sd.device.type in ("cpu", "cuda")  # one pass over the weights instead of ten
        self.optimizer = torch.optim.AdamW(self.learned.parameters(), lr=args.lr, weight_decay=0.01, fused=fused)
        self.scaler = torch.amp.GradScaler(sd.device.type, enabled=args.precision == "fp16")
        header = metadata(args, subject) | {"prediction_type": sd.scheduler.config.prediction_type}
        header |= lora_header(self.unet) if args.lora_rank else {}
        settings = fingerprint(args, subject)
        self.record = Record(args.ckpt, header, settings, subject.training_prompts, self.photos)

    # ------------------------------------------------------------------------------------------ before the loop

    def draw(self, prompts: list[str], place: int, text: str) -> list[Image.Image]:
        """A picture of each prompt, from noise that --seed and `place` fix. Every rank draws its part, and gets all."""
        mine = ranks.part(len(prompts))
        seeds = np.random.SeedSequence([self.args.seed, place]).generate_state(len(prompts)).tolist()[mine]
        steps, guidance, quiet = self.args.solver_steps, self.args.guidance, ranks.rank() > 0
        with tqdm(total=len(seeds), desc=text, unit="image", leave=False, delay=0.1, disable=quiet) as bar:
            options = {"batch_size": self.at_once, "on_batch": bar.update}
            drawn = self.sd.generate(prompts[mine], seeds, steps, guidance, **options) if seeds else []
        return ranks.gather(drawn)

    def prepare(self) -> None:
        """Everything that stays as it is while θ learns: drawn pictures, rewards, posteriors, contexts."""
        args, sd = self.args, self.sd
        prompts = self.method.drawn_prompts(self.subject, getattr(args, self.method.counted_by))
        with without_lora(sd.unet):
            drawn = self.draw(prompts, NEGATIVES, f"drawing {self.method.drawn}")
        if {"label", "r_ref", "r_drawn"} & set(self.method.needs):
            self.r_drawn = self.reward(drawn, prompts, args.lambda_train).cpu()  # each negative's, with its own prompt
            self.r_ref = self.reward.of_photos(prompts, args.lambda_train).cpu()  # (photos, prompts of the negatives)
            self.p_ref_wins = preference_probability(self.r_ref, self.r_drawn, args.tau)  # (photos, negatives)
        if "dino" in self.method.needs:
            self.dino_photos = unit_features(self.dino, self.dino.preprocess, self.photos, sd.device)
        self.ref_posterior, self.drawn_posterior = sd.encode_images(self.photos), sd.encode_images(drawn)
        self.ref_context = sd.encode_prompts([self.subject.instance_prompt])
        self.drawn_context = sd.encode_prompts(prompts)
        sd.unet = self.unet  # θ draws from here on
        if "base_loss_ref" not in self.method.needs:
            self.base_unet = None  # and makes room
        for network in self.away:
            network.cpu()

    # ------------------------------------------------------------------------------------------ the loop

    def train(self) -> None:
        """Steps, a validation every `validate_every`, until `steps` or until `patience` validations brought nothing."""
        args, record = self.args, self.record
        if not record.history:
            self.validate(0)
        first, last, quiet = self.first_step, args.steps, ranks.rank() > 0
        for step in (bar := tqdm(range(first, last + 1), "training", initial=first - 1, total=last, disable=quiet)):
            record.history.append(self.step(step))
            kept = "" if record.kept is None else f", kept {record.kept[1]:.4f}"
            bar.set_postfix_str(f"similarity {record.history[-1]['similarity']:.3f}{kept}")
            if step % args.validate_every == 0 or step == args.steps:
                self.validate(step)
                if args.patience and record.stale >= args.patience:
                    tqdm.write(f"stopped: {record.stale} validations brought no better reward")
                    break

    def step(self, step: int) -> dict:
        """One gradient step on `batch` pairs of a photo and a drawn picture; returns the history's row.

        Every rank draws the random numbers of all pairs and goes on with its own, `mine`. Raises FloatingPointError if
        the loss or the gradient is not finite.
        """
        args, sd, needs, start = self.args, self.sd, self.method.needs, time.time()
        device, draws = sd.device, generator(args.seed, step, 1)
        mine, weight = ranks.weighted_part(args.batch)
        i = torch.randint(len(self.photos), (args.batch,), generator=draws)
        j = torch.randint(len(self.drawn_context), (args.batch,), generator=draws)
        given = {}  # what the method asks for beside the two losses; nothing dear is computed that it does not need
        if "label" in needs:
            given["label"] = preference_label(self.p_ref_wins[i, j], draws)[mine].to(device)

        x_0 = torch.cat([latents(self.ref_posterior, i, draws)[mine], latents(self.drawn_posterior, j, draws)[mine]])
        t = torch.randint(len(sd.scheduler.alphas_cumprod), (args.batch,), generator=draws)[mine].repeat(2).to(device)
        eps = torch.randn(args.batch, *x_0.shape[1:], generator=draws)[mine]
        eps = eps.repeat(2, 1, 1, 1).to(device)  # a pair shares t and ε
        i, j, n = i[mine], j[mine], len(t) // 2  # from here on this rank's pairs
        x_t, target = sd.scheduler.add_noise(x_0, eps, t), sd.scheduler.target(x_0, eps, t)
        context = torch.cat([repeat(self.ref_context, "1 l d -> n l d", n=n), self.drawn_context[j]])

        if "base_loss_ref" in needs:  # before θ's pass, whose insides wait for backward()
            with sd.autocast(), torch.no_grad(), without_lora(self.base_unet):
                base = denoising_loss(self.base_unet(x_t, t, context), target)
            given["base_loss_ref"], given["base_loss_drawn"] = base.chunk(2)
        with sd.autocast():
            prediction = self.unet(x_t, t, context)
        loss_ref, loss_drawn = denoising_loss(prediction, target).chunk(2)
        if "t" in needs:
            given["t"] = t[:n]
        if "r_ref" in needs:
            given |= {"r_ref": self.r_ref[i, j].to(device), "r_drawn": self.r_drawn[j].to(device)}
        if "x_0_hat" in needs:
            x_0_hat = sd.scheduler.to_x0_eps(prediction.float(), x_t, t)[0]
            given |= {"x_0_hat": x_0_hat[:n], "x_0": x_0[:n]}
        if "dino" in needs:
            pictures = sd.decode_latents(x_0_hat[:n].detach())
            features = unit_features(self.dino, self.dino.preprocess, pictures, sd.device)
            given["dino"] = (features * self.dino_photos[i.to(device)]).sum(1)

        loss = self.method.loss(loss_ref, loss_drawn, **given)
        row = machine.numbers(loss._asdict() | {"gradient_norm": self.update(loss.total, weight)})
        if "label" in given:
            row |= {"label": given["label"].mean().item(), "p": self.p_ref_wins[i, j].mean().item()}
        row = machine.check_numbers(ranks.mean(row, weight), step, self.scaler.is_enabled())
        return {"step": step, **row, "seconds": round(time.time() - start, 3)}

    def update(self, total: Tensor, weight: float) -> Tensor:
        """AdamW down the gradient, averaged over the ranks by weight; returns its norm before it was cut to 1."""
        self.scaler.scale(total).backward()
        ranks.average(self.learned.parameters(), weight)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.learned.parameters(), 1.0)
        self.scaler.step(self.optimizer)  # unless fp16's gradients overflowed: then the scale is halved
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError("the gradient overflows fp16 in every step: try --precision fp32")
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def validate(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw the training prompts with the same seeds as ever, score them, keep the weights if they are the best.

        Returns ALIGN-I and ALIGN-T of every picture.
        """
        args, start = self.args, time.time()
        prompts = [prompt for prompt in self.subject.training_prompts for _ in range(args.images_per_prompt)]
        with memory.visiting(self.away, self.sd.device):
            images = self.draw(prompts, VALIDATION, f"validating step {step}")
            align_i, align_t = self.reward.alignments(images, prompts)
        reward = self.reward.combine(align_i, align_t, args.lambda_val).mean().item()
        row = {"align_i": align_i.mean().item(), "align_t": align_t.mean().item(), "reward": reward}
        row = {"step": step, **ranks.mean(row, 1 / ranks.world())}  # all ranks must agree on the best
        row["seconds"] = round(time.time() - start, 3)
        better = self.record.validation(row, images[:: args.images_per_prompt], args.keep_last)
        tqdm.write(
            f"step {step:4d}  ALIGN-I {row['align_i']:.4f}  ALIGN-T {row['align_t']:.4f}  "
            f"reward {row['reward']:.4f}{'  kept' if better else '  (the base)' if step == 0 else ''}"
        )
        if ranks.rank() == 0:
            if better:
                self.record.keep(lora_tensors(self.unet) if args.lora_rank else self.unet.state_dict())
            self.record.write()
            self.record.save_state(step, {name: part.state_dict() for name, part in self.learning().items()})
        ranks.wait()  # lest an error elsewhere ends rank 0 while it writes
        return align_i, align_t

    def learning(self) -> dict:
        """Whatever changes from step to step; of the methods only DPG learns something of its own."""
        parts = {"unet": self.learned, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts | ({"method": self.method} if hasattr(self.method, "state_dict") else {})

    def resume(self) -> None:
        """Go on from the last state. Raises CheckpointError as Record.load_state does."""
        self.first_step = self.record.load_state(self.learning()) + 1
        machine.own_averages(self.optimizer)


def latents(posterior: tuple[Tensor, Tensor], index: Tensor, draws: torch.Generator) -> Tensor:
    """x_0 drawn from the posteriors of the pictures `index`."""
    mean, std = (part[index.to(part.device)] for part in posterior)
    return mean + std * torch.randn(mean.shape, generator=draws).to(mean.device)


def method_of(args: argparse.Namespace, sd: StableDiffusion) -> RPO | DreamBooth | DPG:
    """A method says which pictures the base draws before training, what its loss needs, and the loss of a step.

    It may need "label"; "r_ref" and "r_drawn"; "base_loss_ref" and "base_loss_drawn"; "t"; "x_0_hat" and "x_0", the
    photos'; with these, "dino". Its loss is a NamedTuple, of which the loop wants `total` and `similarity`, and the
    history takes all.
    """
    if args.method == "rpo":
        return RPO(args.beta, args.preference_weight)
    if args.method == "dreambooth":
        return DreamBooth(args.prior_weight)
    channels = sd.unet.config.in_channels
    dpg = DPG(channels, args.dpg_reward, prior_weight=args.prior_weight, seed=args.seed, device=sd.device)
    _, weight = ranks.weighted_part(args.batch)  # the critic learns within the loss, from all pairs as θ does
    dpg.optimizer.register_step_pre_hook(lambda *_: ranks.average(dpg.critic.parameters(), weight))
    return dpg


def run(args: argparse.Namespace) -> int:
    device = flags.device(args.device)
    args.precision = machine.precision(args.precision, device)
    subject = load_subject(args.subject, args.noun, args.live, args.token)
    check_layout(args.base)
    args.align = args.align or home_of(args.base) / "reward"
    if not args.align.is_dir():
        raise CheckpointError(f"{args.align} is missing, which should hold ALIGN: name its folder with --align")
    needs_dino = (args.method, args.dpg_reward) == ("dpg", "dino")
    dino_folder = home_of(args.base) / "metrics" / "dino"
    if needs_dino and not dino_folder.is_dir():
        raise CheckpointError(f"{dino_folder} is missing, which should hold DINO: put it there, or take another reward")
    check_place(args.ckpt, args.resume, subject.folder)
    with alone(args.ckpt):
        return fine_tune(args, subject, device, dino_folder if needs_dino else None)


def fine_tune(args: argparse.Namespace, subject: Subject, device: torch.device, dino_folder: Path | None) -> int:
    """Load, say what was loaded, train; what was kept of a run that breaks off is told."""
    prompts = "prompts of living subjects" if subject.live else "prompts of things"
    prompts += " (a person or an animal? --live)" if args.live is None and not subject.live else ""
    print(f"subject {subject.folder}: {len(subject.photos)} photos of {subject.noun!r}, {prompts}")
    flags.settle(args)
    short = memory.tell_memory(args, device)
    sd = StableDiffusion.from_pretrained(args.base, device, args.variant, args.prediction_type)
    sd.precision, sd.image_size = PRECISIONS[args.precision], args.resolution or sd.image_size
    align = ALIGN.from_pretrained(args.align).to(device)
    dino = DINO.from_pretrained(dino_folder).to(device) if dino_folder else None
    parameters = sum(p.numel() for p in sd.unet.parameters())
    why = ", since torch sees no GPU" if args.device is None and device.type == "cpu" and parameters > 1e8 else ""
    print(
        f"base {flags.base_name(args.base)} on {device}{why}: {parameters / 1e6:.1f} M parameters, {sd.image_size} px"
    )
    print(f"the token {subject.token} is read as {' '.join(sd.tokenizer.tokens(subject.token))}")
    flags.warn_of_cuts(sd.tokenizer, [subject.instance_prompt, *subject.training_prompts])
    if sd.image_size % sd.vae.downscale:
        raise ValueError(f"--resolution must be a multiple of {sd.vae.downscale}, not {args.resolution}")
    if args.solver_steps > (most := len(sd.scheduler.alphas_cumprod)):
        raise ValueError(f"--solver-steps must be between 1 and {most}, not {args.solver_steps}")
    if not args.lora_rank:
        # Checkpoint and state (fp32, with AdamW's two averages), and the new state beside the old while it is written.
        there = [path.stat().st_size for path in (args.ckpt, args.ckpt.with_suffix(STATE)) if path.exists()]
        flags.check_writable(args.ckpt, max(28 * parameters - sum(there), 12 * parameters))

    trainer = Trainer(args, subject, sd, align, dino)
    if short and not dino:  # which looks at decoded pictures in every step
        trainer.away = [sd.vae, sd.text_encoder, align]
    if args.resume:
        trainer.resume()
        print(f"going on after step {(done := trainer.first_step - 1)}")
        if done > args.steps:
            raise ValueError(f"the interrupted run has done {done} steps already: give --steps of at least that")
    try:
        trainer.prepare()
        trainer.train()
    except BaseException as error:
        interrupted, saved = isinstance(error, KeyboardInterrupt), trainer.record.saved
        again = saved is None or isinstance(error, FloatingPointError)  # resumed, it would diverge as before
        again |= saved == 0 and is_out_of_memory(error)  # the flags that may help make it another run
        hint = "start again" if again else f"--resume goes on after step {saved}"
        if interrupted or saved is not None:
            print(f"\n{'interrupted' if interrupted else 'broken off'}: {trainer.record.summary()}; {hint}")
        if interrupted:
            return 130
        raise
    args.ckpt.with_suffix(STATE).unlink(missing_ok=True)
    print(trainer.record.summary())
    return 0


def arguments() -> flags.Parser:
    """The command line. Its defaults are the paper's; None is settled by the base's recommendation or the paper."""
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    settled = "(default: what the base recommends, or the paper's"
    add("--subject", type=flags.path, required=True, help="a folder with 4 to 6 photos of the subject")
    add("--noun", type=flags.text, help="what it is, such as dog (default: from the folder's name)")
    add("--live", action=argparse.BooleanOptionalAction, help="a living subject, or a thing (default: from the noun)")
    add("--token", type=flags.text, default="[V]", help="the unique token (default: %(default)s)")
    flags.add_base_flags(parser, flags.EMBEDDED_BASE, "the embedded one")
    add("--align", type=flags.path, help="the folder of the reward's ALIGN (default: reward/ in the base's folder)")
    add("--ckpt", type=flags.path, default=Path("best.safetensors"), help="the result (default: %(default)s)")
    add("--steps", type=flags.count, default=400, help="gradient steps (default: %(default)s, the paper's)")
    add("--batch", type=flags.count, help=f"pairs a step {settled} 1)")
    add("--lr", type=flags.positive, help=f"learning rate {settled} 5e-6)")
    add("--lora-rank", type=flags.count, help="train adapters of this rank, some MB (default: the whole U-Net)")
    add("--patience", type=flags.count, help="stop after so many validations without a better reward (default: never)")
    add("--seed", type=flags.seed, default=0, help="fixes every draw (default: %(default)s)")
    add("--resume", action="store_true", help="go on with an interrupted run")
    flags.add_machine_flags(parser)
    add("--checkpoint-gradients", action="store_true", help="less memory, a third slower: compute activations twice")
    add("--compile", action="store_true", help="torch.compile the U-Net: minutes before the first step")
    add = parser.add_argument_group("the method and its ablations").add_argument
    add("--method", choices=("rpo", "dreambooth", "dpg"), default="rpo", help="(default: %(default)s)")
    add("--images-per-prompt", type=flags.count, help=f"negatives, and validation images, a prompt {settled} 4)")
    add("--resolution", type=flags.count, help="side of all pictures, in pixels (default: the base's; the paper: 512)")
    add("--guidance", type=flags.positive, help=f"classifier-free guidance when drawing {settled} 7.5)")
    add("--solver-steps", type=flags.count, help="DPM-Solver++ steps (default: 20, or what the base recommends)")
    add("--validate-every", type=flags.count, default=40, help="gradient steps (default: %(default)s, the paper's)")
    add(
        "--lambda-val", type=flags.fraction, default=0.3, help="λ of the validation (default: %(default)s, the paper's)"
    )
    paper = "(default: %(default)s, the paper's)"
    add("--lambda-train", type=flags.fraction, default=0.0, help=f"RPO: λ of the labels {paper}")
    add("--beta", type=flags.positive, default=1.0, help=f"RPO: β of the loss {paper}")
    add("--tau", type=flags.positive, default=1.0, help="RPO: temperature of the labels (default: 1; the paper: none)")
    add(
        "--preference-weight", type=flags.at_least_0, default=1.0, help="RPO: 0 leaves the similarity loss (default: 1)"
    )
    add("--prior-weight", type=flags.at_least_0, default=1.0, help="DreamBooth, DPG: class images' weight (default: 1)")
    add("--class-images", type=flags.count, help="DreamBooth, DPG: how many are drawn (default: 200, or the base's)")
    add("--dpg-reward", choices=REWARDS, default=REWARDS[0], help="DPG: what the critic learns (default: %(default)s)")
    add("--mean", choices=list(MEANS), default="harmonic", help=f"of ALIGN-I and ALIGN-T {paper}")
    add("--keep-last", action="store_true", help="keep the last weights instead of the best: no early stopping")
    return parser


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if args.ckpt.suffix != ".safetensors":
        parser.error(f"--ckpt {args.ckpt} should end in .safetensors")
    if args.patience and args.keep_last:
        parser.error("--patience waits for a better reward, and --keep-last looks at none: leave one out")
    return flags.guarded(lambda: run(args), lambda: memory.remedy(args), "interrupted before the start")


if __name__ == "__main__":
    sys.exit(ranks.together(main))
