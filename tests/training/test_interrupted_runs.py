"""Runs on several processes that are killed or stopped end in one sentence and leave whole checkpoints.

The same command then gives the run that nothing happened to.
"""

import functools
import os
import random
import re
import signal

import pytest

from deepseek.files import list_checkpoints
from tests.helpers import same
from tests.rank_helpers import GONE, STEP, assert_near, finishes, gets, rank_arguments, steps, told, train_on
from training.checkpoints import find_damage

pytestmark = pytest.mark.long


def test_killed_at_any_point_of_a_checkpoint_a_run_goes_on_bit_for_bit(files, unbroken, tmp_path):
    out, argv = tmp_path / "out", rank_arguments(files, tmp_path / "out")
    for victim, place, nth, after, left in (
        (1, "training.checkpoints.save_states", 2, False, [3]),  # rank 0 has written its part of checkpoint-6
        (0, "training.checkpoints.write_manifest", 1, True, [3]),  # it is unbroken, and not yet renamed
        (0, "training.saving.rotate_checkpoints", 2, False, [3, 6, 9]),  # a checkpoint is renamed
        (
            0,
            "training.trainer.ESFTTrainer.save_state",
            1,
            False,
            [3, 6, 9, 12],
        ),  # saved, without results
    ):
        fault = functools.partial(gets, sent=signal.SIGKILL, victim=victim, place=place, nth=nth, after=after)
        ended = train_on(2, argv, tmp_path, fault)
        assert ended[victim].code == -signal.SIGKILL
        assert steps(out) == left and [find_damage(path) for path in list_checkpoints(out)] == [None] * len(left), place
    finishes(2, argv, tmp_path)
    assert same(unbroken, out)
    assert not (out / ".staging").exists()


def test_the_others_end_when_a_rank_dies(killed):
    out, ended = killed
    assert [rank.code for rank in ended] == [2, -signal.SIGKILL]
    (line,) = told(ended)
    assert re.match(GONE % (0, 300), line), line
    assert "Traceback" not in ended[0].err
    assert steps(out) == [3, 6] and not list(out.glob("*.safetensors"))


@pytest.mark.slow
def test_the_others_end_when_a_rank_stalls(files, tmp_path):
    argv = rank_arguments(files, tmp_path / "out", ddp_timeout=5)
    fault = functools.partial(gets, sent=signal.SIGSTOP, victim=1, place=STEP, nth=5)
    ended = train_on(2, argv, tmp_path, fault, stalled=1)
    assert [rank.code for rank in ended] == [2, None]
    (line,) = told(ended)
    assert re.match(GONE % (0, 5), line), line


def test_sigterm_to_one_rank_saves_on_all(files, unbroken, tmp_path):
    out, argv = tmp_path / "out", rank_arguments(files, tmp_path / "out")
    fault = functools.partial(gets, sent=signal.SIGTERM, victim=1, place=STEP, nth=5)
    ended = train_on(2, argv, tmp_path, fault)
    assert [rank.code for rank in ended] == [143, 143]
    assert "stopped by SIGTERM after step 5: the same command goes on from here" in ended[0].out
    assert not told(ended)
    assert steps(out) == [3, 5] and find_damage(out / "checkpoint-5") is None
    finishes(2, argv, tmp_path)
    assert same(unbroken, out)


def started_again(rank: int) -> None:
    """As torchrun's agent does after a worker has failed."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def test_a_run_that_overwrites_goes_on_when_torchrun_starts_it_again(files, unbroken, broken_off, tmp_path):
    argv = rank_arguments(files, broken_off, overwrite=True)
    (first, _) = train_on(2, argv, tmp_path, started_again)
    assert first.code == 0, first.err
    assert f"going on from {broken_off / 'checkpoint-6'}\n" in first.out
    assert same(unbroken, broken_off)
    (first, _) = train_on(2, argv, tmp_path, started_again)  # what is done is not its own
    assert "steps; validation loss" in first.out and "going on" not in first.out


@pytest.mark.parametrize("name, how", [("states/rank-1.safetensors", "cut"), ("adapter.safetensors", "flipped")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(files, unbroken, broken_off, tmp_path, name, how):
    path = broken_off / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content if how == "flipped" else content[:-100])
    ended = finishes(2, rank_arguments(files, broken_off), tmp_path)
    warning = f"warning: {broken_off / 'checkpoint-6'} is damaged ({name} is not what was written)"
    assert ended[0].err.count(warning) == 1 and "warning" not in ended[1].err
    assert f"going on from {broken_off / 'checkpoint-3'}\n" in ended[0].out
    assert same(unbroken, broken_off)
    assert find_damage(broken_off / "checkpoint-6") is None


def test_a_run_goes_on_with_another_ep_size_and_on_one_process(files, unbroken, broken_off, tmp_path):
    fault = functools.partial(gets, sent=signal.SIGKILL, victim=0, place=STEP, nth=5)
    train_on(2, rank_arguments(files, broken_off, ep_size=1), tmp_path, fault)
    assert steps(broken_off) == [3, 6, 9]
    states = [path.name for path in (broken_off / "checkpoint-9" / "states").glob("*.safetensors")]
    assert states == ["rank-0.safetensors"] != list((broken_off / "checkpoint-6" / "states").glob("*.safetensors"))
    (one,) = finishes(1, rank_arguments(files, broken_off, ep_size=1), tmp_path)
    assert f"going on from {broken_off / 'checkpoint-9'}\n" in one.out
    assert_near(broken_off, unbroken)


@pytest.mark.slow
def test_a_run_goes_from_layout_to_layout(files, unbroken, tmp_path):
    out, moments = tmp_path / "out", random.Random(1)
    keys = {"max_steps": 18, "save_steps": 1}
    finishes(1, rank_arguments(files, tmp_path / "whole", **keys, ep_size=1), tmp_path)
    at = 0
    for world, ep_size in ((2, 2), (2, 1), (4, 2), (1, 1), (4, 4), (2, 2)):
        step = moments.randint(2, 3)
        fault = functools.partial(gets, sent=signal.SIGKILL, victim=world - 1, place=STEP, nth=step)
        ended = train_on(world, rank_arguments(files, out, **keys, ep_size=ep_size), tmp_path, fault)
        assert ended[-1].code == -signal.SIGKILL
        assert (at := at + step - 1) == steps(out)[-1]
        states = [path.name for path in (list_checkpoints(out)[-1] / "states").glob("*.safetensors")]
        assert sorted(states) == [f"rank-{rank}.safetensors" for rank in range(ep_size)]
    (one,) = finishes(1, rank_arguments(files, out, **keys, ep_size=1), tmp_path)
    assert f"going on from {out / f'checkpoint-{at}'}\n" in one.out
    assert_near(out, tmp_path / "whole")
