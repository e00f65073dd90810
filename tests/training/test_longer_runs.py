"""A run that is made longer, and a run that goes on from a checkpoint of the user's choice."""

import json
import re
import shutil

import pytest

from tests.helpers import Killed, arguments, at_step, fails, kill, losses, same, tensors_of
from training.checkpoints import find_damage

pytestmark = pytest.mark.long

SAVED = {"save_opt_states": True, "lr_scheduler_type": "constant"}


def assert_same_run(a, b):
    """The weights are the same bits, and so are the losses of the steps that both logged."""
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)
    one, other = losses(a), losses(b)
    assert ("loss", 9) in one and all(one[key] == other[key] for key in one.keys() & other.keys())


@pytest.mark.parametrize(
    "method, short, long",
    [
        ("esft", {"max_steps": 5}, {"max_steps": 9}),
        ("full", {"max_steps": 5}, {"max_steps": 9}),
        ("lora", {"max_steps": 5}, {"max_steps": 9}),
        ("esft", {"max_steps": None, "num_train_epochs": 1}, {"max_steps": None, "num_train_epochs": 1.5}),
        ("esft", {"max_steps": None, "num_train_epochs": 1}, {"max_steps": 9}),
    ],
)
def test_a_finished_run_can_be_made_longer(start, capsys, method, short, long):
    keys = {**SAVED, "method": method}
    start("whole", **keys, max_steps=9)
    first = start(**keys, **short)
    capsys.readouterr()
    longer = start(**keys, **long)
    assert longer["steps"] == 9 > first["steps"]
    told = capsys.readouterr().err
    assert f"is made longer, from step {first['steps']} on" in told and "schedule" not in told
    assert_same_run(start.folder / "whole", start.folder / "out")
    assert json.loads((start.folder / "out" / "run.json").read_text())["made_longer_at"] == [first["steps"]]
    assert start(**keys, **long) == longer  # finished: nothing to do


def test_a_longer_run_that_is_killed_goes_on(start, monkeypatch):
    start("whole", **SAVED, max_steps=9)
    start(**SAVED, max_steps=5)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 8, kill)
        start(**SAVED, max_steps=9)
    start(**SAVED, max_steps=9)
    assert_same_run(start.folder / "whole", start.folder / "out")
    assert json.loads((start.folder / "out" / "run.json").read_text())["made_longer_at"] == [5]


@pytest.mark.parametrize(
    "keys", [{"lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine"}, {"warmup_steps": 0.2}]
)
def test_a_schedule_that_depends_on_the_length_is_told_and_followed(start, capsys, keys):
    keys = {**SAVED, "lr_scheduler_type": "constant_with_warmup", **keys}
    start("whole", **keys, max_steps=9)
    start(**keys, max_steps=5)
    start(**keys, max_steps=9)
    assert f"follows the {keys['lr_scheduler_type']} schedule of the new length" in capsys.readouterr().err

    def rates(name):
        history = json.loads((start.folder / name / "trainer_state.json").read_text())["log_history"]
        return {row["step"]: row["learning_rate"] for row in history if "learning_rate" in row}

    whole, longer = rates("whole"), rates("out")
    assert [whole[step] for step in (6, 7, 8, 9)] == [longer[step] for step in (6, 7, 8, 9)]
    assert whole[2] != longer[2]


@pytest.mark.parametrize(
    "first, second",
    [
        ({"max_steps": 5}, {"max_steps": 4}),  # shorter
        ({"max_steps": 5}, {"max_steps": 9, "seed": 1}),  # another run
        ({"max_steps": 5, "save_opt_states": False}, {"max_steps": 9, "save_opt_states": False}),
        ({"max_steps": 5}, {"max_steps": None, "num_train_epochs": 9}),  # of an unknown length, compared with 5 steps
    ],
)
def test_another_length_that_is_no_more_than_that_is_refused(files, start, capsys, first, second):
    start(**{**SAVED, **first})
    assert "max_steps" in fails(arguments(files, start.folder / "out", **{**SAVED, **second}), capsys)


def test_a_finished_run_without_a_whole_checkpoint_cannot_be_made_longer(files, start, capsys):
    start(**SAVED, max_steps=2)
    (start.folder / "out" / "checkpoint-2" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="is damaged"):
        message = fails(arguments(files, start.folder / "out", **SAVED, max_steps=9), capsys)
    assert "no checkpoint is whole" in message
    assert tensors_of(start.folder / "out")


# ---- resume_from_checkpoint


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("how", ["path", "name"])
def test_a_run_goes_on_from_the_checkpoint_that_is_asked_for(start, whole, capsys, monkeypatch, finished, how):
    out = start.folder / "out"
    with monkeypatch.context() as patch:
        if not finished:
            at_step(patch, 6, kill)
        try:
            start(save_opt_states=True)
        except Killed:
            assert not finished
    steps = []
    at_step(monkeypatch, 3, lambda trainer: steps.append(trainer.state.global_step))
    asked = "checkpoint-2" if how == "name" else out / "checkpoint-2"
    start(save_opt_states=True, resume_from_checkpoint=asked)
    assert steps == [2] and re.search(r"going on from \S*checkpoint-2\n", capsys.readouterr().out)
    assert same(whole, out)


@pytest.mark.parametrize("given", ["true", "True"])
def test_resume_from_checkpoint_without_a_path_is_what_happens_anyway(start, whole, given):
    start(save_opt_states=True, resume_from_checkpoint=given)
    assert same(whole, start.folder / "out")


def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(files, start, monkeypatch, capsys):
    out = start.folder / "out"
    keys = {"save_opt_states": True}
    message = fails(arguments(files, out, **keys, resume_from_checkpoint=out / "checkpoint-2"), capsys)
    assert "holds no run" in message and not out.exists()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 6, kill)
        start(**keys)
    shutil.copytree(out, start.folder / "other")
    (out / "checkpoint-2" / "scheduler.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for asked, text in {
        out / "checkpoint-3": "not a checkpoint of the run in output_dir. That folder holds checkpoint-2, checkpoint-4",
        start.folder / "other" / "checkpoint-4": "not a checkpoint of the run in output_dir",
        out / "checkpoint-2": "scheduler.json is not what was written",
        "false": "overwrite=true",
    }.items():
        assert text in fails(arguments(files, out, **keys, resume_from_checkpoint=asked), capsys)
    assert "needs --save_opt_states" in fails(arguments(files, out, resume_from_checkpoint="x"), capsys)
    both = arguments(files, out, **keys, overwrite=True, resume_from_checkpoint="x")
    assert "Give one of them" in fails(both, capsys)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert find_damage(out / "checkpoint-4") is None
