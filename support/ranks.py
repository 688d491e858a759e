"""One run on many processes: `torchrun --standalone --nproc_per_node=N train.py ...`, one process a GPU.

Every process, a rank, holds the whole model and does its part: of a step's pairs, of the pictures to draw, of the
subjects to evaluate. All that they say to each other is here, on torch.distributed: gloo between CPUs, NCCL between
GPUs. All draw the same random numbers and each takes its part of them, so N processes give what one gives, to rounding.
With one process there is no group, and every function returns at once what it was given.

Gradients are averaged by plain all-reduces after backward, not by wrapping the network in DDP: the loop, the weights'
names, LoRA's switch and DPG's critic stay as they are, and only what learns is sent. The price is that sending and
backward do not overlap.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 2**25  # numbers an all-reduce, 128 MiB in fp32: few calls, and little memory beside the gradients


def world() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is; 0 writes the files, prints and shows the bars."""
    return dist.get_rank() if world() > 1 else 0


def together(main: Callable[[], int]) -> int:
    """Call `main` in each process that torchrun started, as one group; returns its exit status."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or "RANK" not in os.environ:  # some images set the first alone
        return main()
    gpus = dist.is_nccl_available() and torch.cuda.is_available()
    # Ranks wait long for each other at the end of evaluate.py; one that dies is noticed in any case.
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))
    wait()  # lest one that ends at once, over a wrong flag, is gone before the others have met it
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        status = main()
    except SystemExit as error:
        status = error.code
    if status:  # leave without a farewell, for which a rank stuck in a collective would never come
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()
    return 0


def speaks_first() -> bool:
    """Is this the first rank with something to say about its end? What the others meet is the same, or follows."""
    if world() == 1:
        return True
    try:
        at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*at, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
        return store.add(f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except RuntimeError:  # the store went with rank 0
        return False


def device(name: str) -> str:
    """This rank's own device of the kind `name`. Raises ValueError if there are not so many, or `name` is only one."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is one device, and torchrun started {world()} processes: give cpu or cuda")
    own, there = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if name == "cpu" or not there:
        return name
    if own >= there:
        raise ValueError(f"there are fewer GPUs than processes: start as many as GPUs, --nproc_per_node={there}")
    torch.cuda.set_device(own)  # where NCCL, and whoever asks for free memory, will look
    return f"cuda:{own}"


def part(n: int) -> slice:
    """This rank's part of n things: none, if there are more ranks than things."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def weighted_part(n: int) -> tuple[slice, float]:
    """This rank's part of a batch of n, and its weight in the mean. A rank without one repeats the first, weight 0."""
    mine = part(n)
    size = mine.stop - mine.start
    return (mine if size else slice(0, 1)), size / n


def gather(items: list) -> list:
    """The lists of all ranks as one, in their order, on every rank."""
    if world() == 1:
        return items
    parts = [None] * world()
    with _meeting():
        dist.all_gather_object(parts, items)
    return [item for items in parts for item in items]


def average(parameters: Iterable[Tensor], weight: float) -> None:
    """Put the sum over the ranks of weight x gradient in the place of each gradient; the weights sum to 1."""
    if world() == 1:
        return
    bucket, size = [], 0
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        size += gradient.numel()
        if i + 1 == len(gradients) or size + gradients[i + 1].numel() > BUCKET:
            flat = torch.cat([each.flatten() for each in bucket]).mul_(weight)
            with _meeting():
                dist.all_reduce(flat)
            for each, mean in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                each.copy_(mean.view(each.shape))
            bucket, size = [], 0


def mean(row: dict[str, float], weight: float) -> dict[str, float]:
    """The sum over the ranks of weight x number, by name: the same on every rank, to the last bit."""
    if world() == 1:
        return row
    numbers = weight * torch.tensor(list(row.values()), dtype=torch.float64)
    with _meeting():
        dist.all_reduce(numbers)
    return dict(zip(row, numbers.tolist(), strict=True))


def wait() -> None:
    """Until all ranks are here."""
    gather([])


@contextmanager
def _meeting():
    """A collective. Raises ConnectionError if another rank has ended, which gloo and NCCL call a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" in f"{error}":  # our own GPU's: NCCL needs some at its first collective
            raise
        time.sleep(1)  # what ended the other, such as Ctrl-C, may be on its way here too, and says more
        reason = f"{error}".splitlines()[0]
        raise ConnectionError(f"another process of this run has ended or cannot be reached ({reason})") from None
