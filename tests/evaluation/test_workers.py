"""The runner of several processes: what a rank sends arrives whole, whenever it is read."""

import time

import torch

from evaluation.workers import run_ranks


def send_tensors(share, _devices):
    yield from (torch.full((1000,), number) for number in share)


def test_tensors_of_a_rank_that_has_ended_arrive():
    """torch would send handles of shared memory, which end with the rank; their reader then takes them for its end."""
    messages = run_ranks(send_tensors, [1, 2, 3, 4], [["cpu"], ["cpu"]])
    found = [int(next(messages)[0])]
    time.sleep(2)  # by now both ranks have sent everything and ended
    found += [int(tensor[0]) for tensor in messages]
    assert sorted(found) == [1, 2, 3, 4]
