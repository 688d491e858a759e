"""What a run of train.py leaves on disk, all with the checkpoint's stem, each written to a temporary file and renamed:

best.safetensors   the weights of the kept validation, in the public layout, with the run's settings in the header
best.jsonl         the history: a line a step or validation
best.png           the film strip: a row of pictures a validation
best.state.pt      what --resume needs; written at step 0 and then at validations, but not more often than PAUSE allows;
                   removed at the end
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.files.errors import CheckpointError, is_out_of_memory
from model.files.tensors import read_metadata
from model.files.write import save_tensors, write_atomic
from support import ranks
from support.film_strip import Validation, film_strip, title_of
from support.machine import Optimizer, own_averages
from support.results import STATE

# Seconds between two states for each byte of a state, so that writing them takes a small part of a run: at least 200 s
# for the 10 GB of SD 1.5's whole U-Net, 2 s for the embedded one.
PAUSE = 20e-9


class Record:
    """The history of a run, its kept weights, and the state to resume from.

    ckpt: the kept weights' path, *.safetensors. header: their header's settings. identity: what must be equal for a run
    to be the same run. prompts, photos: the film strip's columns and top row. settings: steps, patience, keep_last.
    """

    def __init__(
        self,
        ckpt: Path,
        header: dict[str, str],
        identity: dict[str, str],
        prompts: list[str],
        photos: list[Image.Image],
        optimizer: Optimizer,
        settings,
    ):
        self.ckpt, self.header, self.identity = ckpt, header, identity
        self.prompts, self.photos, self.optimizer, self.settings = prompts, photos, optimizer, settings
        self.learning = optimizer.state()  # what changes from step to step; a method may add to it
        self.history: list[dict] = []
        self.strip: list[Validation] = []  # the film strip's rows
        self.best_step, self.best_reward = None, -math.inf  # of the validations so far, without step 0
        self.stale = 0  # validations since the best one, for patience
        # Three step numbers, which may differ after an interruption:
        self.done = 0  # of the last validation
        self.kept = None  # of the weights on disk, with their reward
        self.saved = None  # of the state on disk
        self.last_state = time.time()  # when that state was written
        self.clock = time.time()  # when the last row was added

    def steps(self) -> Iterator[int]:
        """The steps still to do, with a progress bar; ends early when `patience` is used up."""
        first, last, quiet = self.done + 1, self.settings.steps, ranks.rank() > 0
        with tqdm(range(first, last + 1), "training", initial=self.done, total=last, disable=quiet) as bar:
            for step in bar:
                if self.settings.patience and self.stale >= self.settings.patience:
                    tqdm.write(f"stopped: {self.stale} validations brought no better reward")
                    return
                yield step
                kept = f", kept {self.kept[1]:.4f}" if self.kept else ""
                bar.set_postfix_str(f"similarity {self.similarity:.3f}{kept}")

    def step(self, step: int, loss: NamedTuple, **more: Tensor | None) -> None:
        """Add a step to the history: the terms of its loss, and the mean of each further tensor.

        Raises FloatingPointError if the loss or the gradient is not finite.
        """
        row = self.optimizer.numbers(step, loss._asdict() | more)
        self.similarity = row["similarity"]
        self._add(step, row)

    def validation(self, step: int, pictures: list[Image.Image], **scores: Tensor) -> None:
        """Add a validation: its pictures, as many of each prompt, and their scores (pictures,), "reward" among them.

        The first picture of each prompt goes to the film strip. The weights are kept if the mean reward is the highest
        so far, or, with --keep-last, always; step 0, the base, is never kept. So the first validation after it always
        is. Raises ValueError if a file cannot be written.
        """
        row = {name: score.mean().item() for name, score in scores.items()}
        row = ranks.mean(row, 1 / ranks.world_size())  # all processes must agree on the best
        self._add(step, row)
        first = slice(None, None, len(pictures) // len(self.prompts))
        self.strip.append(Validation(step, row, pictures[first], scores["reward"][first].tolist()))
        better = step > 0 and (self.settings.keep_last or row["reward"] > self.best_reward)
        self.stale = 0 if better or step == 0 else self.stale + 1
        if better:
            self.best_step, self.best_reward = step, row["reward"]
        self.done = step
        if ranks.rank() == 0:
            self._write(better)
        ranks.barrier()  # so that an error in another process does not end rank 0 while it writes
        note = "  kept" if better else "  (the base)" if step == 0 else ""
        tqdm.write(f"step {step:4d}  {'  '.join(f'{title_of(name)} {row[name]:.4f}' for name in row)}{note}")

    def _add(self, step: int, row: dict) -> None:
        """Add a row to the history, with the seconds since the row before; the first has everything before it."""
        before, self.clock = self.clock, time.time()
        self.history.append({"step": step, **row, "seconds": round(self.clock - before, 3)})

    def _write(self, better: bool) -> None:
        """Weights, history, film strip and state."""
        if better:
            header = self.header | {"step": str(self.best_step), "reward": str(self.best_reward)}
            save_tensors(self.optimizer.machine.weights(), self.ckpt, header)
            self.kept = self.best_step, self.best_reward
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        write_atomic(self.ckpt.with_suffix(".jsonl"), lambda path: path.write_text(lines, encoding="utf-8"))
        page = film_strip(self.prompts, self.photos, self.strip, self.best_step)
        write_atomic(self.ckpt.with_suffix(".png"), lambda path: page.save(path, "PNG"))
        self._save_state()

    def _save_state(self) -> None:
        """Write what is needed to continue as if nothing had happened, unless the last state was written just now."""
        parts = {name: part.state_dict() for name, part in self.learning.items()}
        weights = self.optimizer.machine.weights().values()
        size = 3 * sum(tensor.nbytes for tensor in weights)  # with AdamW's two averages
        # The first at once: it replaces an older run's, and a checkpoint without a state is of a finished run.
        if self.saved is not None and time.time() - self.last_state < PAUSE * size:
            return
        strip = [tuple(row._replace(pictures=torch.from_numpy(np.stack(row.pictures)))) for row in self.strip]
        best = (self.best_step, self.best_reward, self.stale)
        state = {"run": self.identity, "step": self.done, "best": best, "history": self.history, "strip": strip}
        write_atomic(self.ckpt.with_suffix(STATE), lambda path: torch.save(state | parts, path))
        self.saved, self.last_state = self.done, time.time()

    def resume(self) -> None:
        """Continue from the state on disk.

        Raises CheckpointError if the state is broken, of a run with other settings, which it names, or of one that has
        done more steps, or if the weights that the run has kept are gone.
        """
        path = self.ckpt.with_suffix(STATE)
        try:
            mmap = os.name != "nt"  # or every process would read all of it; Windows cannot replace a mapped file
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
            self._check(state)
            self._load(state)
        except Exception as error:  # torch raises many kinds for a broken file
            if is_out_of_memory(error) or isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is broken ({type(error).__name__}): drop --resume to start anew") from None
        print(f"resuming after step {self.done}")

    def _check(self, state: dict) -> None:
        theirs, ours = state["run"], self.identity
        if changed := [f"{name} {theirs.get(name)} -> {ours[name]}" for name in ours if theirs.get(name) != ours[name]]:
            path = self.ckpt.with_suffix(STATE)
            raise CheckpointError(f"{path} is of a run with other settings ({'; '.join(changed)}): give the same ones")
        if state["step"] > self.settings.steps:
            raise CheckpointError(f"the interrupted run has done {state['step']} steps: give --steps of at least that")
        if state["best"][0] and not self.ckpt.is_file():
            raise CheckpointError(f"{self.ckpt} is missing, which that run has kept: put it back, or start anew")

    def _load(self, state: dict) -> None:
        for name, part in self.learning.items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                own_averages(part)
        self.best_step, self.best_reward, self.stale = state["best"]
        if self.best_step:
            header = read_metadata(self.ckpt)  # it may be of a later validation than the state
            self.kept = int(header["step"]), float(header["reward"])
        for row in map(Validation._make, state["strip"]):
            pictures = [Image.fromarray(picture) for picture in row.pictures.numpy()]
            self.strip.append(row._replace(pictures=pictures))
        self.history = state["history"]
        self.done = self.saved = state["step"]

    @contextmanager
    def session(self, resume: bool) -> Iterator[None]:
        """The run itself. At its end print the result; if it is interrupted or fails, what was kept and what to do."""
        if resume:
            self.resume()
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted: {self.summary()}; {self._advice(again=False)}") from None
        except BaseException as error:
            # Resumed, a diverged run would diverge again; flags against a full memory make it another run.
            again = isinstance(error, FloatingPointError) or (self.saved == 0 and is_out_of_memory(error))
            if self.saved is not None:
                print(f"\nfailed: {self.summary()}; {self._advice(again)}")
            raise
        self.ckpt.with_suffix(STATE).unlink(missing_ok=True)  # there is nothing to resume
        print(self.summary())

    def summary(self) -> str:
        """Where the result is, and how good it is."""
        if self.kept is None:
            return "nothing was kept yet"
        step, reward = self.kept
        base = self.history[0]["reward"]
        note = "" if reward > base else ", NOT BETTER than the base: try another --lr or other photos"
        text = f"kept step {step} in {self.ckpt} (history .jsonl, film strip .png, same name)"
        return f"{text}: reward {reward:.4f}, the base's is {base:.4f}{note}"

    def _advice(self, again: bool) -> str:
        return "start again" if again or self.saved is None else f"--resume continues after step {self.saved}"
