"""Two runs of train.py in one folder, on one process and on several."""

import os

import pytest

import train
import utils
from tests.helpers import arguments, at_step, same
from tests.rank_helpers import rank_arguments, told, train_on

AT_WORK = "another run is at work there"


def test_a_second_run_is_refused_while_the_first_is_at_work(files, start, whole, monkeypatch):
    def second(_) -> None:
        for changes in ({}, {"seed": 1}, {"overwrite": True}):
            with pytest.raises(ValueError, match=AT_WORK):
                train.main(arguments(files, start.folder / "out", **changes))

    for step in (1, 5):  # before there is a checkpoint, and after
        at_step(monkeypatch, step, second)
    start()
    assert same(whole, start.folder / "out")
    assert start()["steps"] == 6  # finished, and nobody's


def test_no_rank_of_a_second_run_begins(files, tmp_path):
    with utils.locked(tmp_path / "run" / "out"):
        ended = train_on(4, rank_arguments(files, tmp_path / "run" / "out", ep_size=1), tmp_path, per_node=2)
        assert os.listdir(tmp_path / "run") == [".out.lock"]
    assert [rank.code for rank in ended] == [2] * 4
    assert [len(told([rank])) for rank in ended] == [1, 0, 1, 0] and all(AT_WORK in line for line in told(ended))
