"""Does RPO learn the subject? Train with several seeds on the embedded base and compare with the base itself.

    python -m toy.results --seeds 0 1 2 --out runs

Runs train.py for each seed (runs that are there already are kept), draws DreamBench's 25 test prompts with the base and
with each kept checkpoint from the same noise, and prints README.md's table: ALIGN's λ-Harmonic on the validation
prompts, DINO and CLIP-I to the photos and CLIP-T to the prompts on the test prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from metrics import Metrics
from model.stable_diffusion import StableDiffusion
from subject import load_photos, load_subject
from toy.networks import WEIGHTS

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default="data/dog", help="the subject's folder (default: data/dog)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default: 0 1 2)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the runs go (default: runs)")
    parser.add_argument("--images", type=int, default=2, help="pictures a test prompt (default: 2)")
    args = parser.parse_args()

    subject = load_subject(args.subject)
    sd = StableDiffusion.from_pretrained(WEIGHTS)
    base_weights = {name: tensor.clone() for name, tensor in sd.unet.state_dict().items()}
    photos = load_photos(subject, sd.image_size)
    metrics = Metrics.from_folders(
        WEIGHTS / "metrics" / "clip", WEIGHTS / "metrics" / "dino", WEIGHTS / "reward", photos, subject.token
    )
    rows = []
    for seed in args.seeds:
        ckpt, start = args.out / f"seed{seed}.safetensors", time.time()
        unfinished = ckpt.with_suffix(".state.pt").exists()
        if unfinished or not ckpt.exists():
            command = [
                sys.executable,
                ROOT / "train.py",
                "--subject",
                args.subject,
                "--ckpt",
                ckpt,
                "--seed",
                str(seed),
            ]
            subprocess.run([*command, "--resume"] if unfinished else command, check=True)
        seconds = time.time() - start
        history = [json.loads(line) for line in ckpt.with_suffix(".jsonl").read_text().splitlines()]
        validations = [entry for entry in history if "reward" in entry]
        kept = max(validations[1:], key=lambda entry: entry["reward"])

        prompts = [prompt for prompt in subject.test_prompts for _ in range(args.images)]
        seeds = [1000 * seed + i for i in range(len(prompts))]
        scores = []
        for which in ("base", "RPO"):
            if which == "base":
                sd.unet.load_state_dict(base_weights)
            else:
                sd.load_unet(ckpt)
            with tqdm(total=len(prompts), desc=f"seed {seed}, {which}", leave=False) as bar:
                guidance = sd.recommended.get("guidance", 7.5)
                scored = metrics(sd.generate(prompts, seeds, guidance=guidance, on_batch=bar.update), prompts)
            names = {"DINO": "dino", "CLIP-I": "clip_i", "CLIP-T": "clip_t"}
            scores.append({title: scored[name].mean().item() for title, name in names.items()})
        base, ours = (
            {"λ-Harmonic": r["reward"], "ALIGN-I": r["align_i"], "ALIGN-T": r["align_t"]}
            for r in (validations[0], kept)
        )
        rows.append((base | scores[0], ours | scores[1]))
        print(
            f"seed {seed}: step {kept['step']} kept, {seconds:.0f} s\n  base {rows[-1][0]}\n  RPO  {rows[-1][1]}",
            flush=True,
        )

    names = list(rows[0][0])
    print("| | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for title, which in (("base", 0), ("RPO", 1)):
        cells = []
        for name in names:
            values = [row[which][name] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
        print(f"| {title} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
