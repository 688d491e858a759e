"""One run on several processes: `torchrun --standalone --nproc_per_node=N train.py ...`, one process for each GPU.

Every process (rank) holds the whole model and does its part of a step's pairs, of the pictures to draw, of the subjects
to evaluate. All ranks draw the same random numbers, so N processes give what one gives, to rounding. With one process
there is no process group, and every function returns its argument at once.

Gradients are averaged after backward(), one tensor at a time, not by DDP: the loop, the weights' names and LoRA stay as
they are. The price is that communication and backward() do not overlap.
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

from model.files.errors import is_out_of_memory


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 writes the files, prints and shows the progress bars."""
    return dist.get_rank() if world_size() > 1 else 0


def distributed(main: Callable[[], int]) -> int:
    """Call `main` in each process that torchrun started, as one group; return its exit status."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:  # some images set WORLD_SIZE alone
        return main()
    if os.environ["RANK"] == "0":
        print(f"waiting for {os.environ['WORLD_SIZE']} processes", file=sys.stderr)
    gpus = dist.is_nccl_available() and torch.cuda.is_available()
    try:
        # A day: at the end of evaluate.py a rank may wait long for the others. One that ends is noticed at once.
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(days=1))
        barrier()  # all connect before one may end, over a wrong flag
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        print(f"error: WORLD_SIZE and RANK are set: start with torchrun, or unset them ({reason})", file=sys.stderr)
        return 2
    if rank() > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        status = main()
    except SystemExit as error:
        status = error.code
    if status:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(min(rank(), 1))  # torchrun ends all ranks when one ends: let the first print its error
        os._exit(status)  # at once: destroy_process_group() would hang on a blocked rank
    dist.destroy_process_group()
    return 0


def local_device(name: str) -> str:
    """This rank's own device of the kind `name`, "cpu" or "cuda". Raises ValueError if there are too few GPUs."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device {name} is one device for {world_size()} processes: give cpu or cuda")
    index, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if name == "cpu" or not count:
        return name
    if index >= count:
        raise ValueError(f"there are fewer GPUs than processes: start as many as GPUs, --nproc_per_node={count}")
    return f"cuda:{index}"


def part(n: int) -> slice:
    """This rank's part of n things: none, if there are more ranks than things."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def weighted_part(n: int) -> tuple[slice, float]:
    """This rank's part of a batch of n, and its weight in the mean: of 3 pairs on 2 ranks, 1/3 and 2/3.

    A rank without a pair repeats the first, with weight 0.
    """
    mine = part(n)
    size = mine.stop - mine.start
    return (mine if size else slice(0, 1)), size / n


def gather(items: list) -> list:
    """The lists of all ranks as one, in their order, on every rank. Waits until all ranks are here."""
    if world_size() == 1:
        return items
    parts = [None] * world_size()
    with _collective():
        dist.all_gather_object(parts, items)
    return [item for items in parts for item in items]


def average_gradients(parameters: Iterable[Tensor], weight: float) -> None:
    """Replace each gradient by the sum over the ranks of weight * gradient; the weights sum to 1."""
    if world_size() == 1:
        return
    with _collective():
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.mul_(weight))


def mean(row: dict[str, float], weight: float) -> dict[str, float]:
    """The sum over the ranks of weight * number, by name: the same on every rank, to the last bit."""
    if world_size() == 1:
        return row
    numbers = weight * torch.tensor(list(row.values()), dtype=torch.float64)
    with _collective():
        dist.all_reduce(numbers)
    return dict(zip(row, numbers.tolist(), strict=True))


def barrier() -> None:
    """Wait until all ranks are here."""
    gather([])


@contextmanager
def _collective():
    """A collective call. Raises ConnectionError if another rank has ended, which gloo and NCCL call a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):  # of this rank's own GPU: NCCL needs some at its first collective
            raise
        time.sleep(1)  # the signal that ended the other rank, such as Ctrl-C, may arrive here too, and says more
        reason = f"{error}".splitlines()[0]
        raise ConnectionError(f"another process of this run has ended or cannot be reached ({reason})") from None
