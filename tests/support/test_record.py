"""record.py on its own. test_train.py has what a run keeps, when it stops and how it resumes."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from support.record import Record

PICTURE = Image.new("RGB", (8, 8))


def new_record(folder, patience):
    layer = torch.nn.Linear(1, 1)
    adamw = torch.optim.AdamW(layer.parameters(), fused=True)
    optimizer = SimpleNamespace(adamw=adamw, machine=SimpleNamespace(weights=layer.state_dict))
    optimizer.state = lambda: {"unet": layer, "optimizer": adamw}
    optimizer.numbers = lambda step, row: {"similarity": 0.5}
    settings = SimpleNamespace(steps=9, patience=patience, keep_last=False)
    return Record(folder / "best.safetensors", {}, {"lr": "1"}, ["a dog"], [PICTURE], optimizer, settings)


def test_patience_that_is_used_up_stops_a_resumed_run_at_once(tmp_path, capsys):
    record = new_record(tmp_path, patience=9)
    with pytest.raises(KeyboardInterrupt, match=r"kept step 1 in .* continues after step 3"), record.session(False):
        record.validation(0, [PICTURE], reward=torch.tensor([0.1]))
        for step, reward in zip(record.steps(), (0.4, 0.3, 0.4), strict=False):  # equal is not better
            record.step(step, SimpleNamespace(_asdict=dict))
            record.validation(step, [PICTURE], reward=torch.tensor([reward]))
        raise KeyboardInterrupt
    resumed = new_record(tmp_path, patience=2)
    with resumed.session(resume=True):
        assert [*resumed.steps()] == []
    out = capsys.readouterr().out
    assert "resuming after step 3" in out and "stopped: 2 validations" in out and "kept step 1" in out


def test_the_strip_shows_each_prompts_first_picture_with_its_own_reward(tmp_path):
    """After --resume too."""
    pictures = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6)]
    rewards = torch.arange(6) / 8
    record = new_record(tmp_path, patience=None)
    record.prompts = ["a dog", "a cat"]
    with pytest.raises(KeyboardInterrupt), record.session(False):
        record.validation(0, pictures, align_i=1 - rewards, reward=rewards)
        raise KeyboardInterrupt
    resumed = new_record(tmp_path, patience=None)
    resumed.resume()
    for row in (*record.strip, *resumed.strip):
        assert row == (0, {"align_i": 0.6875, "reward": 0.3125}, [pictures[0], pictures[3]], [0, 3 / 8])
    assert len(resumed.strip) == 1
