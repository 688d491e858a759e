"""Trainings on the tiny base: a class RPO that notes what its run does, and what two runs are compared by."""

import json
import time
from types import SimpleNamespace

import torch
from tiny import call

import baselines.__main__
import train

QUICK = ("--steps", 4, "--validate-every", 2, "--solver-steps", 1, "--images-per-prompt", 2, "--lr", 1e-3)
NEGATIVES = 16  # 8 prompts, 2 each
RESULT = ["best.jsonl", "best.png", "best.safetensors"]
STATE = "best.state.pt"


def watched(method):
    """The method, noting every drawing (random stream, prompts, images) and the weights at each validation.

    Its last object is in `last`. The name stays, which a checkpoint's header and --resume know.
    """

    class Watched(method):
        last = None

        def __init__(self, run, reward):
            self.frozen = [run.sd.unet, run.sd.vae, run.sd.text_encoder, run.align]
            self.before = [copied(network.state_dict()) for network in self.frozen]
            self.drawn, self.seen, Watched.last = [], {}, self
            super().__init__(run, reward)

        def draw(self, prompts, unet, stream, title):
            images = super().draw(prompts, unet, stream, title)
            self.drawn.append((stream, prompts, images))
            return images

        def validate(self, step):
            self.seen[step] = copied(self.machine.weights())
            return super().validate(step)

    Watched.__name__ = method.__name__
    return Watched


RPO = watched(train.RPO)


def train_tiny(world, patch, *more, method=RPO, baseline=None, quick=QUICK):
    """Train on the tiny base, in the current folder; returns the exit status. The last of two equal options counts.

    By default as train.py does; method: with this class instead; baseline: as `python -m baselines NAME`.
    """
    options = ("--subject", world / "dog", "--base", world / "base", *quick, *more)
    if baseline:
        return call(baselines.__main__, patch, baseline, *options)
    return call(SimpleNamespace(__name__="train", main=lambda: train.main(method)), patch, *options)


def stopped(step, error=KeyboardInterrupt, method=RPO):
    """The method, but with an error before a step."""

    class Stopped(method):
        def batch(self, now):
            time.sleep(0.06)  # the record writes this small state at most every 0.05 s
            if now == step:
                raise error
            return super().batch(now)

    Stopped.__name__ = method.__name__
    return Stopped


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def history(folder, name="best.jsonl"):
    """The rows of a history, without their times."""
    lines = (folder / name).read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def steps(rows):
    return [row for row in rows if "total" in row]


def validations(rows):
    return [row for row in rows if "reward" in row]


def same_results(one, other):
    """Compare two results, but for the times in the history."""
    assert (one / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    assert history(one) == history(other)
    return (one / "best.png").read_bytes() == (other / "best.png").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
