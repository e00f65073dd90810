"""The adapter of a run is that of its best checkpoint, or the run says which other one it is."""

import functools
import json
import os
import shutil
import signal
import warnings

import pytest

from deepseek.files import sha256
from tests.helpers import Killed, at_step, kill, losses, same
from tests.rank_helpers import STEP, gets, log_worse, rank_arguments, steps, train_on
from training.trainer import ESFTTrainer

pytestmark = pytest.mark.long

KEYS = {"max_steps": 10, "load_best_model_at_end": True, "save_opt_states": True, "save_total_limit": 2}


def is_of(out, step: int) -> bool:
    """Whether the adapter of a run is that of a checkpoint, and its results say so if they speak of a best one."""
    result = json.loads((out / "run.json").read_text())["results"]
    return result["best_step"] in (step, None) and sha256(out / "adapter.safetensors") == sha256(
        out / f"checkpoint-{step}" / "adapter.safetensors"
    )


def spoil(checkpoint, how: str) -> None:
    if how == "gone":
        shutil.rmtree(checkpoint)
        return
    path = checkpoint / {"manifest": "manifest.json", "states": "states/rank-0.safetensors"}.get(
        how, f"{how}.safetensors"
    )
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def stopped(start, monkeypatch):
    """`stopped(step, ...)`: the folder of a run that was killed in a step."""

    def stopped(step: int, **changes):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            at_step(patch, step, kill)
            start(**{**KEYS, **changes})
        return start.folder / "out"

    return stopped


@pytest.fixture(autouse=True)
def ever_worse(monkeypatch):
    monkeypatch.setattr(ESFTTrainer, "log", log_worse)


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("limit", [2, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (1, 5))])
@pytest.mark.parametrize("how", ["moved", "linked", "relative", "unbroken"])
def test_the_best_checkpoint_is_found_wherever_the_run_is(start, stopped, silent, monkeypatch, how, limit):
    out = stopped(6 if how != "unbroken" else 1, save_total_limit=limit)
    monkeypatch.chdir(start.folder)
    to = {"moved": "elsewhere", "linked": "link", "relative": os.path.relpath(out)}.get(how, "out")
    if how == "moved":
        out.rename("elsewhere")
    if how == "linked":
        os.symlink("out", "link")
    start(output_dir=to, **{**KEYS, "save_total_limit": limit})
    assert is_of(start.folder / to, 2)
    assert json.loads((start.folder / to / "run.json").read_text())["results"]["best_step"] == 2
    assert steps(start.folder / to) == {1: [2], 2: [2, 10], 5: [2, 4, 6, 8, 10]}[limit]


@pytest.mark.parametrize("how", ["gone", "adapter", "states", "manifest"])
def test_a_best_checkpoint_that_was_lost_is_told_with_what_takes_its_place(start, stopped, capsys, how):
    out = stopped(6)
    spoil(out / "checkpoint-2", how)
    reason = "is missing" if how == "gone" else r"is damaged \(.*\)"
    with pytest.warns(UserWarning, match=rf"checkpoint-2, {reason}: checkpoint-4 takes its place"):
        start(**KEYS)
    assert is_of(out, 4)  # which the limit has left for that
    assert "at step 4, the best checkpoint; adapter in" in capsys.readouterr().out


def test_a_best_checkpoint_that_is_lost_while_the_run_goes_on_is_told(start, monkeypatch):
    at_step(monkeypatch, 6, lambda _: spoil(start.folder / "out" / "checkpoint-2", "adapter"))
    with pytest.warns(UserWarning, match=r"checkpoint-2, is damaged \(.*\): checkpoint-4 takes its place"):
        start(**{**KEYS, "save_total_limit": 5})
    assert is_of(start.folder / "out", 4)


def test_without_any_checkpoint_that_could_be_the_best_none_is_claimed(start, monkeypatch, capsys):
    finalize, out = ESFTTrainer._finalize_training, start.folder / "out"

    def spoilt(*args):
        for step in steps(out):
            spoil(out / f"checkpoint-{step}", "states")
        return finalize(*args)

    monkeypatch.setattr(ESFTTrainer, "_finalize_training", spoilt)
    with pytest.warns(UserWarning, match=r"checkpoint-2, is damaged \(.*\): no other takes its place"):
        assert start(**KEYS)["best_step"] is None
    assert is_of(out, 10)
    assert "the best" not in capsys.readouterr().out


def test_an_evaluation_without_a_checkpoint_is_not_the_best(start, silent, capsys):
    start(**{**KEYS, "save_steps": 4, "max_steps": 8})
    found = losses(start.folder / "out")
    assert found["eval_loss", 2] < found["eval_loss", 4] < found["eval_loss", 6]
    assert is_of(start.folder / "out", 4)
    assert "at step 4, the best checkpoint" in capsys.readouterr().out


def test_the_highest_loss_is_the_best_where_that_is_asked_for(start):
    result = start(**{**KEYS, "greater_is_better": True, "save_total_limit": 9})
    assert result["best_step"] == 10 and is_of(start.folder / "out", 10)  # the losses grow with every step


def test_without_load_best_model_at_end_no_step_is_the_best(start, capsys):
    result = start(**{**KEYS, "load_best_model_at_end": False, "save_strategy": "best", "save_steps": None})
    assert result["best_step"] is None and "the best" not in capsys.readouterr().out


def test_a_signal_keeps_the_last_checkpoint_beside_the_best(start, monkeypatch):
    keys = {**KEYS, "save_total_limit": 1}
    start("whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 5, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        start(**keys)
    assert steps(start.folder / "out") == [2, 5]
    start(**keys)
    assert same(start.folder / "whole", start.folder / "out")


def worse_and_killed(rank: int) -> None:
    ESFTTrainer.log = log_worse
    gets(rank, signal.SIGKILL, victim=1, place=STEP, nth=8)


def worse(rank: int) -> None:
    ESFTTrainer.log = log_worse


@pytest.mark.parametrize("how", ["moved", "adapter"])
def test_ranks_agree_on_the_best(files, tmp_path, how):
    argv = functools.partial(rank_arguments, files, **{**KEYS, "eval_steps": 3, "max_steps": 9, "disable_tqdm": False})
    train_on(2, argv(tmp_path / "out"), tmp_path, worse_and_killed)
    assert steps(tmp_path / "out") == [3, 6]
    out = tmp_path / "elsewhere"
    (tmp_path / "out").rename(out)
    if how != "moved":
        spoil(out / "checkpoint-3", how)
    ended = train_on(2, argv(out), tmp_path, worse)
    told = [
        line for rank in ended for line in rank.err.splitlines() if line.startswith("warning: the best checkpoint, ")
    ]
    assert [line.endswith("checkpoint-6 takes its place") for line in told] == [True] * (how != "moved")
    assert is_of(out, 3 if how == "moved" else 6)
