"""Test who is in the groups of ranks, and how an error of one rank reaches all others."""

import os
import time

import pytest
import torch.distributed as dist

from deepseek.process_groups import Ranks, SharedError
from tests.helpers import RANK_TIMEOUT, join_world, run_ranks


def misbehave(rank: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise KeyError("only here")
    if rank == 1 and how == "dies":
        os._exit(3)
    if how == "all hang" or (rank == 1 and how == "hangs"):
        time.sleep(1000)
    dist.barrier()
    return rank


@pytest.mark.long
def test_ranks_that_fail_are_told_and_never_waited_for():
    assert run_ranks(3, misbehave, "not at all") == [0, 1, 2]
    for how, text, timeout in (
        ("raises", r"rank 1 of 2:(.|\n)*KeyError: 'only here'", 60),
        ("dies", "exit codes {1: 3}", 60),
        ("hangs", r"rank 0 of 2:(.|\n)*barrier(.|\n)*[Tt]imed out", 2),
        ("all hang", r"ranks \[0, 1\] not done after 1 s", 1),
    ):
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=text):
            run_ranks(2, misbehave, how, timeout=timeout)
        assert time.monotonic() - start < 30


def groups(rank: int) -> list:
    world, found = join_world(), []
    for ep_size in (1, 2, 4):
        ranks = world.with_experts(ep_size, RANK_TIMEOUT)
        members = [dist.get_process_group_ranks(group) for group in (ranks.expert_group, ranks.replica_group)]
        found.append((ranks.ep_size, ranks.expert_rank, ranks.first_replica, *members))
    for ep_size in (3, 8, 0):
        with pytest.raises(SharedError, match=f"ep_size={ep_size}: it does not divide the 4 processes"):
            world.with_experts(ep_size, RANK_TIMEOUT)
    return found


def test_consecutive_ranks_make_a_replica():
    for rank, found in enumerate(run_ranks(4, groups)):
        first, place = rank // 2 * 2, rank % 2
        assert found == [
            (1, 0, rank == 0, [rank], [0, 1, 2, 3]),
            (2, place, rank < 2, [first, first + 1], [place, place + 2]),
            (4, rank, True, [0, 1, 2, 3], [rank]),
        ]
    assert join_world() == Ranks() == Ranks().with_experts(1, RANK_TIMEOUT)


def errors(rank: int) -> list:
    ranks, told = join_world(), []

    def no_disk():
        raise OSError("no disk")

    for attempt in (
        lambda: ranks.raise_on_all("no room" if rank == 1 else None),
        lambda: ranks.raise_on_all(ValueError("odd") if rank else None),
        lambda: ranks.on_rank_zero(no_disk),
    ):
        with pytest.raises(SharedError) as error:
            attempt()
        told.append(str(error.value))
    ranks.raise_on_all(None)
    return [*told, ranks.on_rank_zero(lambda: rank + 7), ranks.gather(rank * 2)]


def test_an_error_of_one_rank_is_raised_alike_on_all():
    told = run_ranks(3, errors)
    assert told == [["rank 1: no room", "rank 1: odd", "no disk", 7, [0, 2, 4]]] * 3
    with pytest.raises(SharedError, match=r"^odd$"):  # of one process: no rank to be named
        Ranks().raise_on_all(ValueError("odd"))
    Ranks().raise_on_all(None)
    assert Ranks().on_rank_zero(lambda: 3) == 3 and Ranks().gather("a") == ["a"]
