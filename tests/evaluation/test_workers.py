"""The runner of several processes: its devices; what a rank sends arrives whole, whenever it is read."""

import time

import pytest
import torch

from evaluation.workers import plan_devices, run_ranks


def send_tensors(share, _devices):
    yield from (torch.full((1000,), number) for number in share)


def test_tensors_of_a_rank_that_has_ended_arrive():
    """torch would send handles of shared memory, which end with the rank; their reader then takes them for its end."""
    messages = run_ranks(send_tensors, [1, 2, 3, 4], [["cpu"], ["cpu"]])
    found = [int(next(messages)[0])]
    time.sleep(2)  # by now both ranks have sent everything and ended
    found += [int(tensor[0]) for tensor in messages]
    assert sorted(found) == [1, 2, 3, 4]


def test_ranks_own_their_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert plan_devices("auto", 2, 2) == [["cuda:0", "cuda:1"], ["cuda:2", "cuda:3"]]
    assert plan_devices("cuda", 3, 1) == [["cuda:0"], ["cuda:1"], ["cuda:2"]]
    assert plan_devices("cpu", 2, 1) == [["cpu"], ["cpu"]]
    with pytest.raises(ValueError, match="needs 6 GPUs and there are 4"):
        plan_devices("auto", 3, 2)


def test_no_gpu_where_one_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert plan_devices("auto", 1, 1) == [["cpu"]]
    with pytest.raises(ValueError, match="needs 1 GPUs and there are 0"):
        plan_devices("cuda", 1, 1)
    with pytest.raises(ValueError, match="gpus_per_rank 2: that needs 2 GPUs and there are 0"):
        plan_devices("cuda", 1, 2)
    assert not capsys.readouterr().err
    assert plan_devices("auto", 4, 2) == plan_devices("cpu", 4, 2) == [["cpu"]] * 4
    assert capsys.readouterr().err == "note: gpus_per_rank has no effect on the CPU\n" * 2
