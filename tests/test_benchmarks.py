"""benchmarks/: what is compared is the same, the ratio says who is faster, every part runs; on a tiny random base."""

import shutil
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch
from PIL import Image
from test_evaluate import write_metrics
from tiny import call, error_line, write_base, write_photos

import train
from benchmarks import common, dreambooth_peer, memory, phases, release, run
from model.align import ALIGN
from model.files.tensors import read_tensors
from model.stable_diffusion import StableDiffusion
from model.tokenizer import BertTokenizer
from reward import Reward
from subject import load_photos, load_subject

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("benchmarks") / "base")
    write_metrics(folder / "metrics", folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def dog(tmp_path_factory):
    return load_subject(write_photos(tmp_path_factory.mktemp("photos") / "dog"))


@pytest.fixture(scope="module")
def pair(base):
    return common.Pair(base, CPU)


def spoil(pair):
    """Another number in diffusers' U-Net; returns what puts it back."""
    bias = pair.theirs.unet.conv_out.bias
    bias.data += 0.1
    return lambda: bias.data.sub_(0.1)


JOBS = {
    "unet": lambda pair, base: run.unet_rows(pair, 1, 8, 1),
    "drawing": lambda pair, base: run.drawing_rows(pair, 1, 2, 16, 1),
    "training": lambda pair, base: run.training_rows(pair, base, [], 1),
    "lora": lambda pair, base: run.training_rows(pair, base, ["--lora-rank", "2"], 1),
}


@pytest.mark.parametrize("job", JOBS)
def test_the_same_job_is_timed_in_each_layout_and_another_is_refused(job, pair, base):
    rows = JOBS[job](pair, base)
    assert len(rows) == (4 if job == "unet" else 2)
    assert sum("both channels_last" in row for row in rows) == len(rows) / 2
    assert pair.theirs.unet.conv_in.weight.is_contiguous()  # of the last row
    assert pair.ours.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not pair.ours.unet.conv_in.weight.requires_grad and not hasattr(pair.ours, "lora")  # left as they were
    assert not any("lora" in name for name, _ in pair.ours.unet.named_modules())
    restore = spoil(pair)
    with pytest.raises(ValueError, match="cannot be compared"):
        JOBS[job](pair, base)
    restore()


def test_the_ratio_is_above_1_where_ours_is_faster():
    calls = []

    def side(name, seconds):
        return lambda: (calls.append(name), time.sleep(seconds))

    ours, theirs = common.alternate(side("o", 0.001), side("t", 0.02), 3, CPU)
    assert "".join(calls) == "ot" * 4 and len(ours) == len(theirs) == 3  # the first of each is not counted
    assert common.ratio(ours, theirs) > 1 > common.ratio(theirs, ours)
    assert common.row("x", [1.0, 2.0, 4.0], [3.0, 6.0, 7.0]) == "| x | 1 / 2 / 4 | 3 / 6 / 7 | 3.00 |"


@pytest.mark.parametrize("other", [torch.tensor([1.0, 2.1]), torch.tensor([1.0, torch.nan]), torch.tensor([1.0])])
def test_outputs_that_differ_or_are_no_numbers_are_refused(other):
    with pytest.raises(ValueError, match="cannot be compared"):
        common.check_same(torch.tensor([1.0, 2.0]), other, 0.05, "x")


def test_a_phase_within_a_phase_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    clock = phases.Phases(CPU)

    class Work:
        def outer(self):
            now[0] += 1
            self.inner()
            now[0] += 2

        def inner(self):
            now[0] += 10

    with clock.wrap(Work, "outer", "validation"), clock.wrap(Work, "inner", "saving"):
        Work().outer()
    now[0] += 4
    Work().inner()  # no longer watched
    clock.charge()
    assert clock.seconds == {"validation": 3, "saving": 10, "rest": 14}


def test_a_whole_run_by_phase(base, dog, tmp_path):
    trainer, flags = train.Trainer, ["--steps", "3", "--validate-every", "2", "--images-per-prompt", "1"]
    ckpt = tmp_path / "run.safetensors"
    result = phases.whole(base, "cpu", [*flags, "--solver-steps", "2"], 1, dog.folder, ckpt)
    assert train.Trainer is trainer
    assert result["counts"] == {"negatives": 8, "training": 3, "validation": 3 * 8} and ckpt.exists()
    assert all(result["seconds"][name] > 0 for name in phases.PHASES) and result["peak"] > 1e7
    flop = {name: result["flop"][name] / count for name, count in result["counts"].items()}
    assert flop["negatives"] > flop["validation"] > 0  # a negative is encoded too
    # A step is θ forward and backward and θ₀ forward, all of 2; a picture is 2 solver steps of 2, and its decoding.
    assert 1.5 < flop["training"] / flop["validation"] < 4

    *_, training, validation, _, _, _ = phases.whole_rows(result | {"flop": {"training": 4e9}}, 1e9)
    assert f"| {4 / result['seconds']['training']:.0%} |" in training and validation.endswith("|  |  |")


def test_a_section_of_results_is_replaced_and_others_stay(tmp_path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    monkeypatch.setattr(common, "RESULTS", path)
    for command, text in (("a", "first"), ("b", "other"), ("a", "second")):
        report = common.Report(command, CPU)
        report(text)
        report.write()
    text = path.read_text()
    assert text.count("## a: ") == text.count("## b: ") == 1 and text.startswith("# ")
    assert "first" not in text and "second" in text and "other" in text


def test_the_release_draws_one_by_one_and_encodes_anew(base, dog, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "SOLVER_STEPS", 3)
    job = release.Release(base, dog, tmp_path, {"lr": 1e-3, "batch": 2, "guidance": 3.0}, CPU)
    calls = []
    monkeypatch.setattr(common, "pipeline", watched(common.pipeline, calls))
    pieces = release.measure(job, dict.fromkeys(release.job(8, 4, 4, 400, 11), 1) | {"negative": 2, "training step": 2})
    assert [len(seconds) for seconds in pieces.values()] == [1, 1, 2, 2, 1, 1]
    drawn = ["text", "text", *["unet"] * 3, "decode"]  # DDIM asks once a step
    assert type(job.pipe.scheduler).__name__ == "DDIMScheduler"
    step = ["encode", "text", "unet", "unet"]  # θ₀ and θ
    assert [name for name, _ in calls] == drawn * 3 + step * 3 + drawn * 2  # the first of each does not count
    assert all(count == (4 if name == "encode" else 1) for name, count in calls if name in ("encode", "decode"))
    assert sorted(path.name for path in tmp_path.glob("*.jpg")) == ["0.jpg", "1.jpg", "2.jpg"]
    assert Image.open(tmp_path / "0.jpg").format == "JPEG" and (tmp_path / "unet").is_dir()
    assert not torch.equal(job.unet.conv_in.weight, job.base_unet.conv_in.weight)


def watched(pipeline, calls):
    """`common.pipeline`, whose networks note what they are asked, and for how many."""

    def build(*arguments, **options):
        pipe = pipeline(*arguments, **options)
        for name, owner, method in (
            ("encode", pipe.vae, "encode"),
            ("decode", pipe.vae, "decode"),
            ("text", pipe.text_encoder, "forward"),
            ("unet", pipe.unet, "forward"),
        ):
            inner = getattr(owner, method)

            def note(*inputs, name=name, inner=inner, **more):
                calls.append((name, len(inputs[0]) if inputs else 0))
                return inner(*inputs, **more)

            setattr(owner, method, note)
        return pipe

    return build


def test_the_release_scores_as_we_do_but_for_the_token(base, dog, tmp_path):
    job = release.Release(base, dog, tmp_path, {"lr": 1e-3, "batch": 1, "guidance": 3.0}, CPU)
    job.load()
    job.load_align()
    photos = load_photos(dog, 16)
    reward = Reward(ALIGN.from_pretrained(base / "reward"), BertTokenizer.from_pretrained(base / "reward"), photos, "@")
    expected = reward(photos[:1], ["a [V] dog"], 0.3).item()  # "@": the token that the text lacks is taken out
    assert job.score(photos[0], "a [V] dog") == pytest.approx(expected, abs=1e-4)


def test_the_release_draws_more_negatives_and_does_not_validate_the_base():
    same, released = release.both_jobs(400)
    assert same == release.job(8, 4, 4, 400, 11)  # train.py's: steps 0, 40, ..., 400
    assert released == release.job(8, 4, 16, 400, 10)
    same, released = release.both_jobs(60)
    assert (same["save"], released["save"]) == (3, 1)  # ours at 0, 40 and 60, the last


def test_totals_of_the_release_and_of_ours():
    same = release.job(8, 4, 4, 400, 11)
    assert same["negative"] == 32 and same["validation picture"] == 352 and same["load ALIGN, embed the photos"] == 12
    pieces = {name: [1.0, 3.0] for name in same}
    assert release.total(pieces, same) == 2 * sum(same.values())

    seconds = {"load": 1.0, "negatives": 10.0, "training": 4.0, "validation": 6.0, "saving": 2.0, "rest": 1.0}
    short = {"seconds": seconds, "counts": {"negatives": 32, "training": 8, "validation": 64}}
    assert release.ours(short, same) == pytest.approx(1 + 10 + 4 * 50 + (6 + 2) * 5.5 + 1)
    whole = {"seconds": seconds, "counts": {"negatives": 32, "training": 400, "validation": 352}}
    assert release.ours(whole, same) == sum(seconds.values())

    lines = []
    release.table(lines.append, pieces, same, same | {"negative": 128}, whole)
    other = 2 * sum(same.values())
    assert f"| **ratio** | | | **{other / 24:.1f}** | **{(other + 2 * 96) / 24:.1f}** |" in lines


def test_both_dreambooths_are_trained_and_scored(base, dog, monkeypatch):
    monkeypatch.setattr(common, "alone", lambda function, *arguments: function(*arguments))
    more = ["--class-images", "3", "--solver-steps", "2", "--images-per-prompt", "1", "--lr", "1e-3", "--batch", "2"]
    rows, seconds = dreambooth_peer.compare(base, dog.folder, CPU, [0, 1], 2, 1, more)
    assert [len(scores) for scores in rows.values()] == [2, 2, 2]
    assert len({rows[side][0]["dino"] for side in rows}) == 3  # base, ours and theirs are three networks
    assert rows["ours"][0] != rows["ours"][1]
    assert all(value > 0 for side in seconds.values() for one in side for value in one.values())
    lines = []
    dreambooth_peer.tables(lines.append, rows, seconds)
    assert sum("±" in line and line.startswith("| ") for line in lines) == 3


def test_the_recipe_learns_photos_and_keeps_the_class(base, dog, tmp_path, monkeypatch):
    from diffusers import DDPMScheduler

    seen, build = {}, common.pipeline  # what the last call of each was given, and gave back

    def spy(owner, method, name):
        inner = getattr(owner, method)

        def call(*inputs, **more):
            output = inner(*inputs, **more)
            seen[name] = inputs, output
            return output

        monkeypatch.setattr(owner, method, call)

    def pipeline(*arguments):
        pipe = seen["pipe"] = build(*arguments)
        for owner, method in ((pipe.vae, "encode"), (pipe.text_encoder, "forward"), (pipe.unet, "forward")):
            spy(owner, method, type(owner).__name__)
        return pipe

    monkeypatch.setattr(common, "pipeline", pipeline)
    spy(dreambooth_peer, "class_images", "drawn")
    spy(DDPMScheduler, "add_noise", "noised")
    spy(torch.Tensor, "backward", "loss")
    settings = {"batch": 2, "class_images": 3, "guidance": 3.0, "solver_steps": 2, "lr": 1e-3}
    result = tmp_path / "theirs.safetensors"
    seconds = dreambooth_peer.recipe(base, dog, settings, 2, 0, CPU, result)
    assert seconds.keys() == {"load", "class images", "training"}

    pipe, ((pixels,), _), ((ids,), encoded) = (seen[name] for name in ("pipe", "AutoencoderKL", "CLIPTextModel"))
    photos, drawn = map(pipe.image_processor.preprocess, (load_photos(dog, 16), seen["drawn"][1]))
    for picture, among in zip(pixels, (photos, photos, drawn, drawn), strict=True):
        assert any(torch.equal(picture, one) for one in among)
    prompts = ["a photo of [V] dog"] * 2 + ["a photo of a dog"] * 2
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    assert dog.instance_prompt == prompts[0] and torch.equal(ids, pipe.tokenizer(prompts, **options).input_ids)

    (_, _, eps, t), x_t = seen["noised"]
    (asked, at, given), prediction = seen["UNet2DConditionModel"]
    assert len(t) == 4 and torch.equal(asked, x_t) and torch.equal(at, t) and torch.equal(given, encoded[0])
    error = (prediction.sample - eps).square()
    of_photos, of_class = error[:2].mean().item(), error[2:].mean().item()
    assert seen["loss"][0][0].item() == pytest.approx(of_photos + 1.0 * of_class, rel=1e-5)

    before, after = StableDiffusion.from_pretrained(base).unet.state_dict(), read_tensors(result)
    assert after.keys() == before.keys() and not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


@pytest.mark.parametrize(
    "module, flags, expected",
    [
        (
            run,
            ("--size", "toy", "--only", "unet", "whole"),
            ["| U-Net forward + backward, 8 x 16x16", "| saving |", "MB."],
        ),
        (run, ("--size", "sd15", "--only", "whole"), ["Left out on a CPU"]),
        (release, (), ["| **ratio** |", "| training step |", "negative from 1 of 32"]),
        (dreambooth_peer, ("--seeds", "3"), ["| ours |", "| diffusers |", "| base |", "| all but validation |"]),
    ],
)
def test_the_command_prints_and_writes_its_tables(module, flags, expected, base, dog, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.flags, "EMBEDDED_BASE", base)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(common, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(common, "write_sd15", lambda folder: folder)
    monkeypatch.setattr(release, "SOLVER_STEPS", 2)
    assert call(module, monkeypatch, *flags, "--quick", "--device", "cpu", "--threads", 1, "--write") == 0
    printed, written = capsys.readouterr().out, (tmp_path / "RESULTS.md").read_text()
    for text in expected:
        assert text in printed and text in written


def test_the_spread_decides():
    assert dreambooth_peer.within_the_spread([0.50, 0.52, 0.54], [0.51, 0.53, 0.55])
    assert not dreambooth_peer.within_the_spread([0.50, 0.51, 0.52], [0.60, 0.61, 0.62])
    assert not dreambooth_peer.within_the_spread([0.5], [0.5])


def test_the_peak_of_memory_counts_from_where_it_is_told_to():
    size = 200_000_000
    torch.ones(size, dtype=torch.uint8)  # and given back
    before = common.peak()
    common.forget_peak(CPU)
    low = common.peak()
    assert low < before - 0.9 * size
    torch.ones(size // 2, dtype=torch.uint8)
    assert 0.4 * size < common.peak_memory(CPU)[1] - low < 0.9 * size


@pytest.fixture
def small(base, tmp_path, monkeypatch):
    """The benchmark of memory at tiny size, in this process."""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(common, "alone", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(common, "write_sd15", lambda folder: shutil.copytree(base, folder, dirs_exist_ok=True))
    monkeypatch.setattr(memory, "ALIGN", torch.nn.Identity)  # not the public one, which is large
    monkeypatch.setattr(memory, "write_part", lambda *_: None)


def rows_of(text):
    """The cells of the table's lines, without its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")][2:]


def test_the_memory_of_one_step_is_measured_in_each_mode(small, monkeypatch, capsys):
    seen, inner, forget = [], train.Trainer.step, common.forget_peak

    def step(trainer, number):
        side, args = trainer.ref_posterior[0].shape[-1], trainer.args
        averages = len(trainer.optimizer.state) == len(list(trainer.learned.parameters()))
        free = all(parameter.grad is None for parameter in trainer.learned.parameters())
        seen.append((side, args.batch, args.lora_rank, args.checkpoint_gradients, averages, free))
        return inner(trainer, number)

    monkeypatch.setattr(train.Trainer, "step", step)
    monkeypatch.setattr(common, "forget_peak", lambda device: (seen.append("forget"), forget(device)))
    assert call(memory, monkeypatch, "--device", "cpu", "--side", 128, "--write") == 0
    modes = [(16, True), (16, False), (None, True), (None, False)]
    assert seen == [one for mode in modes for one in ("forget", (16, 1, *mode, True, True))]
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert [row[-1] for row in rows] == ["at most 6", "at most 10", "", "at most 18"]
    assert rows[0][1] == rows[1][1] != rows[2][1] == rows[3][1] and all(row[1].endswith(" M") for row in rows)
    assert all(float(row[2]) >= 0 and float(row[3]) >= 0 for row in rows)
    assert "resident" in printed and printed.strip() in common.RESULTS.read_text()


def test_a_mode_without_the_memory_is_left_out_and_the_next_is_tried(small, monkeypatch, capsys):
    asked = []

    def alone(function, *arguments):
        if function is memory.write_base:
            return function(*arguments)
        asked.append(arguments)
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(common, "alone", alone)
    monkeypatch.setattr(common, "free_memory", lambda device: 1000 if asked else 10**12)
    assert call(memory, monkeypatch, "--device", "cpu", "--side", 64, "--modes", "full", "lora") == 0
    full, lora = rows_of(capsys.readouterr().out)
    assert len(asked) == 1 and full[3] == "the memory did not suffice" and lora[3] == "left out: 0.0 GB are free"


@pytest.mark.parametrize("flags", [("--side", 100), ("--modes", "half"), ("--device", "none")])
def test_memory_of_what_there_is_not_is_one_line(flags, small, monkeypatch, capsys):
    assert call(memory, monkeypatch, "--device", "cpu", *flags) == 2
    assert error_line(capsys)
