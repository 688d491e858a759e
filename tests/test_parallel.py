"""parallel.py: several processes give what one gives, end together, and only one of them writes.

The processes are real ones on the CPU, with gloo. But for the last two tests they are forked from a server that has
imported torch, which is quicker than torchrun; the environment variables are torchrun's.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import call, error_line, files_in, write_base, write_photos

import evaluate
import train
from model.files.tensors import read_metadata
from model.stable_diffusion import StableDiffusion
from support import flags, ranks

QUICK = ("--steps", 4, "--validate-every", 2, "--solver-steps", 1, "--images-per-prompt", 2, "--lr", 1e-3)
QUICK = (*QUICK, "--device", "cpu")
SLOW = 300  # seconds that no test comes near, even on a machine that is busy with other work


def process(work, rank, world, port, folder):
    """What each process does: `work` as torchrun would start it, its streams in files."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    os.chdir(folder)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_CREAT | os.O_WRONLY), stream)
    status = ranks.together(work)
    sys.stdout.flush()
    sys.exit(status)


@pytest.fixture
def start(tmp_path):
    """Run `work` in `world` processes in an empty folder: their exit statuses. They print to out0, err0, out1, ..."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["torch", "train", "evaluate"])
    (tmp_path / "here").mkdir()

    def go(work, world=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [fork.Process(target=process, args=(work, r, world, port, tmp_path / "here")) for r in range(world)]
        for each in ranks:
            each.start()
        end = time.time() + SLOW
        for each in ranks:
            each.join(max(0, end - time.time()))
        for each in ranks:
            if each.is_alive():
                each.kill()
                each.join()
        return [each.exitcode for each in ranks]

    return go


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_base(folder / "base")
    write_photos(folder / "dog")
    return folder


def trains(commands):
    """train.py with each of the commands, one after the other, up to the first that fails."""
    for command in commands:
        sys.argv = ["train.py", *map(str, command)]
        if status := train.main():
            return status
    return 0


def note_draws():
    """From now on each process writes to drawn0, drawn1, ... how many pictures it draws, and the first one's prompt."""
    generate = StableDiffusion.generate

    def note(self, prompts, *rest, **options):
        with open(f"drawn{ranks.rank()}", "a", encoding="utf-8") as file:
            file.write(f"{len(prompts)} {prompts[0]}\n")
        return generate(self, prompts, *rest, **options)

    StableDiffusion.generate = note


def text(folder, name):
    return (folder / f"{name}0").read_text(), [path.read_text() for path in sorted(folder.glob(f"{name}[1-9]"))]


def history(path):
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ---------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_parts_cover_everything_once(monkeypatch, world):
    monkeypatch.setattr(ranks, "world", lambda: world)
    for n in range(1, 20):
        parts, weights = [], []
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            parts.append(list(range(n))[ranks.part(n)])
            pairs, weight = ranks.weighted_part(n)
            assert list(range(n))[pairs] == (parts[-1] or [0])  # never empty: a loss of no pairs would be NaN
            assert weight == len(parts[-1]) / n
            weights.append(weight)
        assert [i for part in parts for i in part] == list(range(n)) and sum(weights) == pytest.approx(1)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setattr(ranks.dist, "init_process_group", None)
    for size in (None, "1"):  # without torchrun, and with --nproc_per_node=1
        monkeypatch.setenv("WORLD_SIZE", size) if size else monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert ranks.together(lambda: 7) == 7
    monkeypatch.setenv("WORLD_SIZE", "4")  # as some cluster images have it
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.together(lambda: 7) == 7
    items, row, weight = [1, 2], {"a": 0.1}, torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 0.1)
    ranks.average([weight], 0.5)
    assert weight.grad.tolist() == [torch.tensor(0.1).item()] * 3
    assert ranks.gather(items) is items and ranks.mean(row, 0.5) is row
    assert (ranks.world(), ranks.rank(), ranks.speaks_first()) == (1, 0, True)


def collectives():
    """Gradients of rank r are r + 1 times `first`; weights 1/2, 1/3, 1/6."""
    rank, weight = ranks.rank(), [1 / 2, 1 / 3, 1 / 6][ranks.rank()]
    draws, shapes = torch.Generator().manual_seed(0), ((2, 3, 4, 4), (7,), (), (5, 5))
    first = [torch.randn(shape, generator=draws) for shape in shapes]
    unused, reduced, all_reduce = torch.nn.Parameter(torch.zeros(3)), [], ranks.dist.all_reduce
    ranks.dist.all_reduce = lambda flat: reduced.append(flat.numel()) or all_reduce(flat)
    for bucket in (30, ranks.BUCKET):
        ranks.BUCKET = bucket
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in first]
        for parameter, gradient in zip(parameters, first, strict=True):
            parameter.grad = (rank + 1) * gradient
        parameters[0].grad = parameters[0].grad.to(memory_format=torch.channels_last)
        ranks.average([unused, *parameters], weight)
        for parameter, gradient in zip(parameters, first, strict=True):
            assert torch.allclose(parameter.grad, (1 / 2 + 2 / 3 + 3 / 6) * gradient, rtol=1e-6)
    assert unused.grad is None
    assert reduced == [96, 8, 25, 129]
    assert ranks.gather([f"{rank}{i}" for i in range(rank)]) == ["10", "20", "21"]
    row = ranks.mean({"a": float(rank), "b": 1.0}, weight)
    assert list(row) == ["a", "b"] and abs(row["a"] - 2 / 3) < 1e-12 and abs(row["b"] - 1) < 1e-12
    print("checked")
    return 0


def test_collectives_of_three_processes(start, tmp_path):
    assert start(collectives, 3) == [0, 0, 0], (tmp_path / "here" / "err0").read_text()
    assert text(tmp_path / "here", "out") == ("checked\n", ["", ""])


# ---------------------------------------------------------------------------------------------- the same result

RUNS = {  # name: options
    "uneven": ("--batch", 3),
    "fewer": ("--batch", 1, "--images-per-prompt", 1, "--lora-rank", 2),  # pairs than processes
    "critic": ("--batch", 3, "--method", "dpg", "--class-images", 1),  # class images than processes
}


def resumed(world):
    """All RUNS, and the first again: interrupted, then resumed."""
    note_draws()
    common = ("--subject", world / "dog", "--base", world / "base", *QUICK)
    status = trains([(*common, *options, "--ckpt", f"{name}.safetensors") for name, options in RUNS.items()])
    step = train.Trainer.step

    def interrupt(self, now):
        if now == 3:
            raise KeyboardInterrupt
        return step(self, now)

    train.Trainer.step = interrupt
    again = (*common, *RUNS["uneven"], "--ckpt", "again.safetensors")
    assert trains([again]) == 130
    train.Trainer.step = step
    return status or trains([(*again, "--resume")])


def test_two_processes_give_what_one_gives(start, world, tmp_path, monkeypatch):
    """Rounding differs: sums are taken in another order. The steps of AdamW, of the size of lr, amplify it."""
    here, alone = tmp_path / "here", tmp_path / "alone"
    assert start(partial(resumed, world)) == [0, 0], (here / "err0").read_text() + (here / "err1").read_text()
    alone.mkdir()
    monkeypatch.chdir(alone)
    for name, options in RUNS.items():
        common = ("--subject", world / "dog", "--base", world / "base", *QUICK)
        assert call(train, monkeypatch, *common, *options, "--ckpt", f"{name}.safetensors") == 0
        one, two = history(alone / f"{name}.jsonl"), history(here / f"{name}.jsonl")
        for ours, theirs in zip(one, two, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), name
        ckpt = f"{name}.safetensors"
        assert read_metadata(alone / ckpt)["step"] == read_metadata(here / ckpt)["step"]
        weights, others = load_file(alone / ckpt), load_file(here / ckpt)
        assert weights.keys() == others.keys()
        worst = max((weights[key] - others[key]).abs().max().item() for key in weights)
        assert worst < 1e-4, name  # 4 steps of lr 1e-3 move a weight by up to 4e-3
    assert (here / "again.safetensors").read_bytes() == (here / "uneven.safetensors").read_bytes()
    assert history(here / "again.jsonl") == history(here / "uneven.jsonl")
    names = [f"{name}.{end}" for name in (*RUNS, "again") for end in ("jsonl", "png", "safetensors")]
    assert files_in(here) == sorted([*names, "drawn0", "drawn1", "err0", "err1", "out0", "out1"])
    drawn = [[int(line.split()[0]) for line in (here / f"drawn{r}").read_text().splitlines()] for r in (0, 1)]
    # Halves of 16 (negatives, 3 validations), of 8, of one class image and 16; interrupted; resumed: no 0, one less.
    assert drawn[0] == [8] * 4 + [4] * 4 + [8] * 3 + [8] * 3 + [8] * 2
    assert drawn[1] == [8] * 4 + [4] * 4 + [1] + [8] * 3 + [8] * 3 + [8] * 2
    out, (other,) = text(here, "out")
    assert other == "" and out.count("kept step") == 5 and "interrupted: kept step 2" in out
    assert (here / "err1").read_text() == "" and "training" in (here / "err0").read_text()


# ---------------------------------------------------------------------------------------------- errors


def spoilt(kind, world):
    """A training that fails in the third step of the second process, or in all at once."""
    step = train.Trainer.step

    def fail(self, now):
        if now == 3 and ranks.rank() == 1:
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            self.ref_context = self.ref_context * float("nan")
        return step(self, now)

    train.Trainer.step = fail if kind in ("memory", "killed", "nan") else step
    subject = world / ("spoilt" if kind == "photo" else "dog")
    return trains(
        [("--subject", subject, "--base", world / "base", *QUICK, *(("--tau", 0) if kind == "option" else ()))]
    )


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("option", "--tau"),
        ("photo", "spoilt/0.png"),
        ("memory", "--batch"),
        ("nan", "the loss is nan at step 3"),
        ("killed", "another process"),
    ],
)
def test_an_error_ends_all_with_one_line(start, world, tmp_path, kind, word):
    if kind == "photo":
        write_photos(world / "spoilt")
        (world / "spoilt" / "0.png").write_text("no picture", encoding="utf-8")
    begun = time.time()
    assert start(partial(spoilt, kind, world)) == [2, -signal.SIGKILL if kind == "killed" else 2]
    assert time.time() - begun < SLOW
    err, (other,) = text(tmp_path / "here", "err")
    told = [line for line in (err + other).splitlines() if "error: " in line]
    assert len(told) == 1 and word in told[0] and "Traceback" not in err + other
    kept = (
        ["best.jsonl", "best.png", "best.safetensors", "best.state.pt"] if kind in ("memory", "nan", "killed") else []
    )
    assert files_in(tmp_path / "here") == [*kept, "err0", "err1", "out0", "out1"]
    assert not kept or read_metadata(tmp_path / "here" / "best.safetensors")["step"] == "2"


def test_each_process_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 9)  # of all machines
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (ranks.device("cuda"), ranks.device("cpu"), chosen) == ("cuda:1", "cpu", [1])
    for name in ("cuda:0", "mps"):
        with pytest.raises(ValueError, match="give cpu or cuda"):
            flags.device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--nproc_per_node=1"):
        flags.device("cuda")


# ---------------------------------------------------------------------------------------------- evaluate.py


def evaluates(arguments):
    """evaluate.py twice; what each process drew is in drawn0, drawn1."""
    note_draws()
    sys.argv = ["evaluate.py", *map(str, arguments)]
    return max(evaluate.main(), evaluate.main())


def test_subjects_are_shared_out(start, world, tmp_path, monkeypatch, capsys):
    from test_evaluate import write_ckpt, write_metrics  # here, since each process would wait for transformers

    write_metrics(world / "base" / "metrics", world / "base" / "tokenizer")
    for name, noun in {"cat2": "cat", "dog": "dog", "duck_toy": "toy", "vase": "vase", "clock": "clock"}.items():
        write_photos(tmp_path / "dataset" / name)
        if name != "dog":  # the first that the second process has to do
            for runs in ("one", "two"):
                live = str(noun == "cat")
                write_ckpt(world / "base", tmp_path / runs / name / "best.safetensors", noun=noun, live=live)
    options = ("--dreambench", tmp_path / "dataset", "--steps", 1, "--n", 1, "--device", "cpu")
    many = (*options, "--ckpt", f"{tmp_path}/two/{{subject}}/best.safetensors")
    assert start(partial(evaluates, many)) == [1, 1]
    here = tmp_path / "here"
    assert (here / "drawn0").read_text().splitlines() == [
        f"25 a [V] {noun} in the jungle" for noun in ("cat", "toy", "vase")
    ]
    assert (here / "drawn1").read_text() == "25 a [V] clock in the jungle\n"  # once: the second time all was done
    assert call(evaluate, monkeypatch, *options, "--ckpt", f"{tmp_path}/one/{{subject}}/best.safetensors") == 1
    one, two = (json.loads((tmp_path / runs / "dreambench/best.eval.json").read_text()) for runs in ("one", "two"))
    assert one["subjects"] == two["subjects"] and list(one["subjects"]) == list(two["subjects"])
    assert one["mean"] == two["mean"] and list(one["failed"]) == list(two["failed"]) == ["dog"]
    out, (other,) = text(here, "out")
    assert other == "" and out.count("| mean of 4 |") == 2 and "duck_toy: done before" in out
    err, (other,) = text(here, "err")
    assert other.count("dog: error: ") == 2 and "error" not in err
    capsys.readouterr()
    monkeypatch.setattr(ranks, "world", lambda: 2)
    monkeypatch.setattr(ranks, "speaks_first", lambda: True)
    assert call(evaluate, monkeypatch, "--subject", tmp_path / "dataset" / "dog") == 2
    assert "--subject is work for one process" in error_line(capsys)


# ---------------------------------------------------------------------------------------------- torchrun itself


def torchrun(folder, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", train.__file__]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [*command, *map(str, arguments)], cwd=folder, **pipes, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def test_interrupted_torchrun_keeps_the_best_and_leaves_nobody(world, tmp_path, monkeypatch, capsys):
    common = ("--subject", world / "dog", "--base", world / "base", *QUICK)
    running = torchrun(tmp_path, *common, "--steps", 10**6)
    end = time.time() + SLOW
    while not (tmp_path / "best.safetensors").exists() and running.poll() is None and time.time() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=SLOW)  # returns when nobody holds these pipes any more
    assert out.count("interrupted: kept step ") == 1 and "--resume goes on" in out, err
    assert "train.py: error" not in err and "KeyboardInterrupt" not in err
    assert files_in(tmp_path) == ["best.jsonl", "best.png", "best.safetensors", "best.state.pt"]
    monkeypatch.chdir(tmp_path)  # one process goes on where two were interrupted
    done = torch.load("best.state.pt")["step"]
    assert call(train, monkeypatch, *common, "--resume", "--steps", done + 1) == 0
    assert [row["step"] for row in history(Path("best.jsonl"))][-3:] == [done, done + 1, done + 1]
    assert files_in(tmp_path) == ["best.jsonl", "best.png", "best.safetensors"]


def test_torchrun_reports_the_exit_status(world, tmp_path):
    """Its own is 1, whatever the processes': it adds a report of which failed first."""
    running = torchrun(tmp_path, "--subject", tmp_path / "nothing", "--base", world / "base")
    out, err = running.communicate(timeout=SLOW)
    assert running.returncode == 1 and out == "" and "exitcode  : 2" in err
    (line,) = [line for line in err.splitlines() if "error: " in line]
    assert line.startswith(f"train.py: error: {tmp_path / 'nothing'} cannot be read (No such file or directory)")
