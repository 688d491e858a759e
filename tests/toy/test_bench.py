"""toy.bench: whole runs of its variants on a tiny random base, which results count, its tables and figures."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import call, error_line, write_base, write_metrics

import train
from support.start import parse
from toy import bench as module
from toy.results import Results
from toy.variants import CHOICES, GROUPS, LAMBDAS, LOGGED, METHODS, SCORES, SELECTED, VALIDATED

DOCS = Path(__file__).parent.parent.parent / "docs" / "bench"
MADE_WITH = {"weights": "some", "steps": 400, "images": 4, "precision": "fp32"}
COLUMNS = [*VALIDATED, *SCORES]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = write_base(tmp_path_factory.mktemp("bench") / "base")
    write_metrics(folder / "metrics", folder / "tokenizer")
    settings = {"batch": 2, "guidance": 2.0, "class_images": 4, "solver_steps": 1, "images_per_prompt": 1}
    (folder / "rpo.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture
def bench(tmp_path, base):
    return module.Bench(tmp_path / "out", steps=2, images=1, base=base)  # two steps a run, one picture a test prompt


def test_every_method_is_trained_and_scored_once(bench):
    bench.all(["dog-2"], [0], ["methods"])
    rows = bench.results.rows()
    names = [("base", ""), ("RPO", ""), *(("RPO", choice) for choice in CHOICES)]
    assert [(row["variant"], row["choice"]) for row in rows] == names + [(name, "") for name in list(METHODS)[1:]]
    assert {row["step"] for row in rows if row["variant"] != "base"} == {2}
    assert all(-1 <= row[score] <= 1 for row in rows for score in COLUMNS)
    # θ₀ has drawn negatives, its validation's pictures and class images, each once for all methods.
    assert [len(prompts) for prompts, _, _ in bench.shared] == [8, 8, 4]
    assert sorted(path.name for path in bench.out.iterdir()) == ["photos", "results.jsonl", "rows", "tables.md"]
    assert all(f"| {name} |" in (bench.out / "tables.md").read_text(encoding="utf-8") for name in METHODS)
    bench.all(["dog-2"], [0], ["methods"])  # all is done
    assert bench.results.rows() == rows


def test_the_label_may_be_the_probability(bench):
    bench.all(["dog-2"], [0], ["rpo", "coin"])
    rpo, expected = (bench.results.rows(variant=name, choice="")[0] for name in ("RPO", "RPO, P for y"))
    assert expected["label"] == pytest.approx(expected["p"]) and rpo["p"] == pytest.approx(expected["p"])
    assert rpo["label"] in (0, 0.5, 1)  # one step of two pairs


class Interrupted(train.RPO):
    def loss(self, batch):
        raise KeyboardInterrupt


def test_an_interrupted_run_leaves_no_result_and_shared_pictures_count_for_each_run(bench):
    subject = bench.subject("clock-0")
    with pytest.raises(KeyboardInterrupt):
        bench.run(subject, 0, "RPO", Interrupted, [])
    assert not bench.results.rows() and [path.name for path in bench.out.iterdir()] == ["photos"]
    assert len(bench.shared) == 2  # negatives and the base's validation
    for key, (images, _) in bench.shared.items():
        bench.shared[key] = images, 1000.0
    bench.run(subject, 0, "RPO", train.RPO, [])
    assert 2000 < bench.results.rows(variant="RPO")[0]["seconds"] < 2500


def test_each_choice_keeps_its_own_validation():
    run = object.__new__(module.Watched)
    pictures = {  # ALIGN-I and ALIGN-T of each
        0: [(1.0, 1.0)],  # the base: best, and never kept
        40: [(0.3, 0.7)],
        80: [(0.6, 0.4)],
        120: [(0.8, 0.3)],
        160: [(0.1, 0.9), (0.7, 0.6)],  # only best by the arithmetic mean, or by the harmonic mean of the two means
        200: [(0.1, 0.1)],
    }
    run.scored = {step: tuple(torch.tensor(pairs).T) for step, pairs in pictures.items()}
    arithmetic = {"λ_val 0.3, arithmetic": 160, "λ_val 0.5, arithmetic": 160, "λ_val 0.7, arithmetic": 120}
    kept = {"λ_val 0.3": 40, "λ_val 0.5": 80, "λ_val 0.7": 120, **arithmetic, "no early stopping": 200}
    assert {name: run.chosen(choice) for name, choice in CHOICES.items()} == kept


@pytest.mark.parametrize("group", GROUPS)
def test_every_variant_has_flags_of_its_method(group):
    for method, options in GROUPS[group].values():
        parse(method, "", ["--subject", "dog", *options])


def test_the_command_writes_tables_and_figures(base, tmp_path, monkeypatch, capsys):
    flags = ("--base", base, "--out", tmp_path, "--subjects", "dog-2", "--seeds", 1, "--steps", 1, "--images", 1)
    assert call(module, monkeypatch, *flags, "--only", "rpo") == 0
    assert "**λ_val (Table 3)** (one run each: dog-2)" in capsys.readouterr().out
    assert {"methods.png", "lambda_val.png", "tables.md"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("flag", ["--images=0", f"--out={__file__}", "--subjects=dog-4", "--subjects=wolf-0"])
def test_wrong_flags_are_one_line(flag, base, monkeypatch, capsys):
    assert call(module, monkeypatch, "--quick", "--base", base, flag) == 2
    assert flag.split("=")[0] in error_line(capsys)


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path, MADE_WITH)


def add(results, variant, subject, seed, score, choice="", step=40):
    scores = dict.fromkeys(COLUMNS, score) | dict.fromkeys(LOGGED.values(), 0.5)
    results.add(variant=variant, choice=choice, subject=subject, seed=seed, step=step, seconds=1.5, **scores)


def titles(results):
    results.write_tables()
    tables = (results.out / "tables.md").read_text(encoding="utf-8")
    return [line for line in tables.splitlines() if line.startswith("**")]


@pytest.mark.parametrize("other", [{"weights": "others"}, {"steps": 120}, {"images": 1}, {"precision": "bf16"}])
def test_results_made_with_something_else_and_incomplete_lines_do_not_count(results, other, tmp_path):
    add(results, "RPO", "dog-2", 0, 0.5)
    add(Results(tmp_path, MADE_WITH | other), "RPO", "dog-2", 0, 0.7)
    with results.path.open("ab") as file:
        file.write('{"variant": "β'.encode()[:-1])  # killed within a letter
    add(results, "DreamBooth", "dog-2", 1, 0.5)
    assert [row["DINO"] for row in results.rows(variant="RPO", subject="dog-2")] == [0.5]
    assert [row["variant"] for row in results.rows()] == ["RPO", "DreamBooth"]


def test_the_tables_in_docs_are_those_of_the_results_there(tmp_path):
    tables = (DOCS / "tables.md").read_text(encoding="utf-8")
    head = r"Base weights (\w+), (\d+) steps, (\d+) images a prompt, (\w+)\."
    weights, steps, images, precision = re.match(head, tables).groups()
    made_with = {"weights": weights, "steps": int(steps), "images": int(images), "precision": precision}
    shutil.copyfile(DOCS / "results.jsonl", tmp_path / "results.jsonl")
    Results(tmp_path, made_with).write_tables()
    assert (tmp_path / "tables.md").read_text(encoding="utf-8") == tables


def test_a_table_compares_run_by_run(results):
    variants = [("RPO", ""), ("DreamBooth", ""), ("unknown", "")]
    add(results, "RPO", "dog-2", 0, 0.5)
    assert not list(results.table("Methods", variants))  # nothing to compare with
    add(results, "DreamBooth", "dog-2", 1, 0.9)
    [line] = results.table("Methods", variants)
    assert line == "**Methods**: no subject and seed has a run of each of these.\n"
    add(results, "DreamBooth", "dog-2", 0, 0.6)
    title, _, _, first, second, _ = results.table("Methods", variants)
    assert "one run each: dog-2" in title and "±" not in first + second and "| 0.600 (+0.100) |" in second
    for variant, seed, score in (("RPO", 1, 0.7), ("RPO", 2, 0.1), ("DreamBooth", 2, 0.5)):
        add(results, variant, "dog-2", seed, score)
    add(results, "RPO", "cat-0", 0, 100.0)  # DreamBooth has no such run: it must not count
    title, _, _, first, second, _ = results.table("Methods", variants)
    assert "3 runs each: dog-2" in title
    assert first == "| RPO | " + " | ".join(["0.433 ± 0.306"] * len(COLUMNS)) + " | 40 | 2 |"
    # differences 0.1, 0.2, 0.4: mean 0.2333, standard deviation 0.15275, over √3
    assert second == "| DreamBooth | " + " | ".join(["0.667 ± 0.208 (+0.233 ± 0.088)"] * len(COLUMNS)) + " | 40 | 2 |"


@pytest.mark.parametrize("title, group", [("The label's coin", "coin"), ("β", "beta")])
def test_a_table_without_its_first_variant_says_what_to_run(title, group, results):
    for variant in ("base", *GROUPS[group]):
        for choice in ("", *SELECTED.get(variant, {})):
            add(results, variant, "dog-2", 0, 0.5, choice)
    assert titles(results) == [f"**{title}**: run `--only rpo` too, with which these are compared."]


def test_subjects_that_a_learning_rate_was_chosen_on_are_in_no_comparison(results):
    variants = [("base", ""), *((name, "") for name in GROUPS["loss"] | METHODS), *(("RPO", name) for name in CHOICES)]
    for variant, choice in variants:
        for subject, seed in (("dog-2", 0), ("cat-0", 1), ("dog-1", 0)):
            add(results, variant, subject, seed, 0.5, choice)
    for variant in GROUPS["lr"]:
        add(results, variant, "dog-3", 0, 0.125)
    first, *compared, last = titles(results)
    assert first == "**RPO and the base, data/dog** (one run each: dog-1)"
    assert last == "**Learning rates** (one run each: dog-3)"
    assert len(compared) == 4 and all(title.endswith("** (2 runs each: cat-0, dog-2)") for title in compared)
    assert "| RPO | 2 |" in (results.out / "tables.md").read_text(encoding="utf-8")  # of labels and margins


def test_the_figures_are_of_the_first_run_whose_lambdas_kept_different_steps(results):
    results.figures([("dog-2", 0)])  # there is nothing to draw
    assert not list(results.out.glob("*.png"))
    runs, colours = {("dog-2", 0): (40, 80, 80), ("dog-2", 1): (40, 80, 120)}, {}
    (results.out / "photos" / "dog-2").mkdir(parents=True)
    Image.new("RGB", (128, 128)).save(results.out / "photos" / "dog-2" / "00.png")
    for (subject, seed), steps in runs.items():
        kept = {("base", ""): 0, ("RPO", ""): 40, ("DreamBooth", ""): 400, ("similarity only", ""): 360}
        kept |= {("RPO", choice): step for choice, step in zip(LAMBDAS, steps, strict=True)}
        for i, ((variant, choice), step) in enumerate(kept.items()):
            add(results, variant, subject, seed, 0.5, choice, step)
            name, colour = f"{variant} {choice}".strip(), (80 * seed, 30 * i, 255)
            Image.new("RGB", (768, 128), colour).save(results.row_file(subject, seed, name))
            colours[seed, name] = colour

    def check(file, seed, *names):
        page = Image.open(results.out / file).convert("RGB")
        found = [page.getpixel((500, y)) for y in range(192, page.height, 128)]
        assert found == [colours[seed, name] for name in names]

    lambdas = ["base", *(f"RPO {choice}" for choice in LAMBDAS)]
    results.figures(list(runs))
    check("methods.png", 1, "base", "RPO", "DreamBooth", "similarity only")
    check("lambda_val.png", 1, *lambdas)
    results.row_file("dog-2", 1, lambdas[-1]).unlink()
    results.figures(list(runs))  # none has pictures of three different steps
    check("lambda_val.png", 0, *lambdas)
