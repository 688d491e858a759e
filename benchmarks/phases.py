"""A whole run of train.py or of a baseline: seconds by phase, floating-point operations, peak memory."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import train
from benchmarks import common
from support import start
from support.randomness import VALIDATION
from train import RPO

DOG = Path(__file__).parent.parent / "data" / "dog"
PHASES = ("load", "negatives", "training", "validation", "saving", "rest")  # load: all before prepare()


class Phases:
    """Seconds by phase. Inside a phase that starts another, the time counts for the inner one."""

    def __init__(self, device: torch.device, first: str):
        self.device, self.seconds, self.calls, self.open = device, Counter(), Counter(), [first]
        self.then = time.perf_counter()

    def charge(self) -> None:
        """Add the time since the last call to the current phase."""
        common.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.then
        self.then = now

    def switch(self, name: str) -> None:
        """End the current phase and start another."""
        self.charge()
        self.open[-1] = name

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """What is done inside counts for this phase."""
        self.charge()
        self.open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self.charge()
            self.open.pop()

    def watch(self, owner: object, method: str, name: str) -> None:
        """Let every call of the object's method count for this phase."""
        inner = getattr(owner, method)

        def timed(*arguments, **options):
            with self(name):
                return inner(*arguments, **options)

        setattr(owner, method, timed)


def whole(
    base: Path,
    device_name: str,
    argv: list[str],
    threads: int,
    subject: Path = DOG,
    ckpt: Path | None = None,
    method: type[RPO] = RPO,
) -> dict:
    """Run train.py, or the baseline `method`, with the flags `argv`. Use a new process: the peak is the process's.

    ckpt: where to keep the result (default: nowhere). Returns {"seconds", "counts", "flop": by phase, "peak": bytes,
    "peak_of": what is measured, "settings"}. "counts" are pictures or steps.
    """
    torch.set_num_threads(threads)
    device, runs = torch.device(device_name), []
    phases = Phases(device, "load")

    class Watched(method):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            runs.append(self)
            phases.watch(self, "prepare", "negatives")
            for owner, name in ((self, "batch"), (self, "loss"), (self.optimizer, "minimize"), (self.record, "step")):
                phases.watch(owner, name, "training")
            phases.watch(self, "validate", "validation")
            phases.watch(self.record, "_write", "saving")
            phases.switch("rest")

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):  # stdout is for the tables
        arguments = ["--subject", subject, "--base", base, "--ckpt", ckpt or Path(folder) / "run.safetensors"]
        args = start.parse(method, "", [*map(str, arguments), "--device", device_name, *argv])
        train.fine_tune(args, Watched)
    phases.charge()
    [run], (what, peak) = runs, common.peak_memory(device)
    counts = {"negatives": len(run.c_mod), "training": sum("total" in row for row in run.record.history)}
    counts["validation"] = len(run.prompts) * phases.calls["validation"]
    result = {"seconds": {name: phases.seconds[name] for name in PHASES}, "counts": counts, "peak": peak}
    flop = {name: counts[name] * each for name, each in work(run).items()}
    return result | {"flop": flop, "peak_of": what, "settings": dataclasses.asdict(run.settings)}


def step(run: RPO) -> Tensor:
    """One training step, without the record; returns the loss."""
    loss = run.loss(run.machine.place(run.batch(1))).total
    run.optimizer.minimize(loss)
    return loss.detach()


def work(run: RPO) -> dict[str, int]:
    """FLOP of one negative, one training step and one validation picture, as torch counts them (2 a multiply-add)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def flop(call) -> int:
        # The counter does not know the CPU's fused attention, but it knows matrix products.
        plain = sdpa_kernel(SDPBackend.MATH) if run.sd.device.type == "cpu" else contextlib.nullcontext()
        with FlopCounterMode(display=False) as counter, plain:
            call()
        return counter.get_total_flops()

    prompt, image = run.prompts[:1], run.photos[:1]
    draw = flop(lambda: run.draw(prompt, run.theta, VALIDATION, "counting"))
    score = flop(lambda: run.reward.alignments(image, prompt))
    encode = flop(lambda: run.sd.encode_images(image))
    return {"negatives": draw + score + encode, "training": flop(lambda: step(run)), "validation": draw + score}


def matmul_peak(device: torch.device, quick: bool) -> tuple[str, float]:
    """FLOP/s of a large matrix product, which is taken as the machine's peak, and its description."""
    side = 8192 if device.type == "cuda" else 1024 if quick else 4096
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b, best = torch.randn(side, side, device=device, dtype=dtype), torch.randn(side, side).to(device, dtype), 0.0
    for _ in range(5):
        common.synchronize(device)
        start = time.perf_counter()
        a @ b
        common.synchronize(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return f"{side} x {side} {str(dtype).removeprefix('torch.')} matrix product", best


def whole_rows(result: dict, peak_flops: float) -> list[str]:
    """The table of a whole run: `whole`'s result, and the machine's peak in FLOP/s."""
    rows = ["| phase | what | s | share | TFLOP | of the peak |", "|---|---|---|---|---|---|"]
    total, flop = sum(result["seconds"].values()), sum(result["flop"].values())
    units = {"negatives": "pictures", "training": "steps", "validation": "pictures"}
    for name in PHASES:
        seconds, done = result["seconds"][name], result["flop"].get(name, 0)
        what = f"{result['counts'][name]} {units[name]}" if name in units else ""
        used = f"{done / 1e12:.2f} | {done / seconds / peak_flops:.0%}" if done else " | "
        rows.append(f"| {name} | {what} | {seconds:.1f} | {seconds / total:.0%} | {used} |")
    rows.append(f"| all | | {total:.1f} | 100% | {flop / 1e12:.2f} | {flop / total / peak_flops:.0%} |")
    return rows
