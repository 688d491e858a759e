"""What toy.bench compares: subjects, methods with their flags, and choices among a run's validations."""

from __future__ import annotations

import train
from baselines.dpg import DPG
from baselines.dreambooth import DreamBooth
from baselines.release import Release

# Reserved subjects of toy/world.py: the base was not trained on them.
SUBJECTS = ("dog-2", "cat-0", "rabbit-1", "backpack-0", "clock-0", "teapot-1")
TUNING = ("dog-3",)  # for the learning rates only
EXAMPLE = ("dog-1",)  # data/dog; not in the comparisons, since the learning rate was first chosen on it
RATES = ("1e-5", "3e-5", "1e-4")


class CertainLabel(train.RPO):
    """RPO with P in place of the coin y. The coin is still drawn, so that later random numbers are the same."""

    def batch(self, step):
        batch = super().batch(step)
        return batch._replace(label=batch.p)


Variant = tuple[type[train.RPO], list[str]]  # the method and its flags
METHODS: dict[str, Variant] = {
    "RPO": (train.RPO, []),
    "DreamBooth": (DreamBooth, ["--keep-last"]),
    "DPG": (DPG, ["--keep-last"]),
}
GROUPS: dict[str, dict[str, Variant]] = {
    "rpo": {"RPO": METHODS["RPO"]},
    "methods": METHODS,
    "loss": {"similarity only": (train.RPO, ["--preference-weight", "0"]), "release's form": (Release, [])},
    "dpo": {"L_pref only": (train.RPO, ["--similarity-weight", "0", "--lambda-train", "0.5"])},
    "lambda_train": {f"λ_train {value}": (train.RPO, ["--lambda-train", value]) for value in ("0.3", "0.5", "0.7")},
    "beta": {f"β {value}": (train.RPO, ["--beta", value]) for value in ("100", "2000")},
    "coin": {"RPO, P for y": (CertainLabel, [])},
    "lr": {
        f"{name}, lr {lr}": (method, [*options, "--lr", lr])
        for name, (method, options) in METHODS.items()
        for lr in RATES
    },
}
WITH_LABELS = ("rpo", "loss", "dpo", "coin", "lambda_train", "beta")  # the groups whose loss has labels and margins

# How a checkpoint can be chosen among the validations of one run: by (λ_val, mean), or None: the last one.
LAMBDAS = {f"λ_val {value}": (value, "harmonic") for value in (0.3, 0.5, 0.7)}
ARITHMETIC = {f"λ_val {value}, arithmetic": (value, "arithmetic") for value in (0.3, 0.5, 0.7)}
LAST = "no early stopping"
CHOICES = LAMBDAS | ARITHMETIC | {LAST: None}
# The choices that are scored, for each variant, besides the checkpoint that train.py keeps.
SELECTED = {"RPO": CHOICES, **{name: {LAST: None} for group in ("loss", "dpo", "coin") for name in GROUPS[group]}}

# Columns of the tables: title -> name in results.jsonl.
VALIDATED = {"λ-Harmonic": "reward", "ALIGN-I": "align_i", "ALIGN-T": "align_t"}  # on the validation prompts
SCORES = {"DINO": "dino", "CLIP-I": "clip_i", "CLIP-T": "clip_t"}  # on the test prompts
LOGGED = {"P": "p", "share of y = 1": "label", "Δ": "margin", "\\|Δ\\|": "|margin|", "agreement": "accuracy"}
