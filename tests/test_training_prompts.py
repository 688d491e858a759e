"""train.py --training-prompts: what is drawn, what the header says, and which runs --resume takes for the same."""

import json

import pytest
from tiny import error_line, files_in
from trainings import RPO, stopped

from model.files.tensors import read_metadata

OWN = "a {V} {noun} in the snow\n\n  a [V] dog on the beach  \n{V}, a blue {noun}\n"
FILLED = ["a [V] dog in the snow", "a [V] dog on the beach", "[V], a blue dog"]


def prompts_of(folder):
    return json.loads(read_metadata(folder / "best.safetensors")["training_prompts"])


def test_negatives_and_validations_are_of_these_prompts(run, done, tmp_path, capsys):
    """--images-per-prompt of each. (The release has 16 negatives a prompt written into its code.)"""
    (tmp_path / "own.txt").write_text(OWN, encoding="utf-8")
    assert run("--training-prompts", "own.txt", "--steps", 1, "--images-per-prompt", 3) == 0
    assert "prompts of --training-prompts: 3" in capsys.readouterr().out
    assert [prompts for _, prompts, _ in RPO.last.drawn] == [[text for text in FILLED for _ in range(3)]] * 3
    assert len(RPO.last.record.strip[0][2]) == 3 and prompts_of(tmp_path) == FILLED
    papers = prompts_of(done[0])
    assert len(papers) == 8 and [text for text in papers for _ in range(2)] == done[1].drawn[0][1]


def test_resume_goes_by_the_prompts_not_by_their_file(run, done, tmp_path, capsys):
    papers = "\n".join(prompts_of(done[0]))
    (tmp_path / "same.txt").write_text(papers.replace("[V]", "{V}"), encoding="utf-8")
    (tmp_path / "other.txt").write_text(papers.replace("green", "blue"), encoding="utf-8")
    assert run(method=stopped(3)) == 130
    capsys.readouterr()
    assert run("--resume", "--training-prompts", "other.txt") == 2
    assert "other settings (training_prompts " in error_line(capsys)
    assert run("--resume", "--training-prompts", "same.txt") == 0


BAD = {
    "is empty": b"\n \n",
    "UTF-8": b"a {V} {noun} in a caf\xe9",
    "'a {V} {noun} {here}'": b"a {V} {noun}\na {V} {noun} {here}",
    "'a {V} {noun} in {'": b"a {V} {noun} in {",
    "'a {{V}noun}'": b"a {{V}noun}",
    "lacks '[V]'": b"a {V} {noun}\na {noun} in the snow",
    "lacks 'dog': write {noun}": b"a {V} cat",
}


@pytest.mark.parametrize("words", [*BAD, "cannot be read (No such file"])
def test_a_bad_file_is_one_line(run, tmp_path, capsys, words):
    if words in BAD:
        (tmp_path / "own.txt").write_bytes(BAD[words])
    before = files_in(tmp_path)
    assert run("--training-prompts", "own.txt") == 2
    assert words in error_line(capsys) and files_in(tmp_path) == before
