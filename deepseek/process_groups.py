"""The processes of a run: how they find each other, share results, and raise one error together.

torchrun starts the processes. `join` makes their process groups, and `Ranks` says what this process is among them.

    world_size 4, ep_size 2      expert_group:  {0, 1} {2, 3}      the ranks of one replica, which share its experts
                                 replica_group: {0, 2} {1, 3}      the ranks that hold the same experts
"""

import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class SharedError(ValueError):
    """An error that all processes raise alike. One process per node prints it."""

    shared = True


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and the process groups it belongs to. A single process has no groups."""

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    expert_group: Any = None
    replica_group: Any = None
    world_group: Any = None
    host_group: Any = None  # the world on gloo, for objects and for tensors in host memory

    @property
    def expert_rank(self) -> int:
        """The rank within the replica."""
        return self.rank % self.ep_size

    @property
    def first_replica(self) -> bool:
        return self.rank < self.ep_size

    def gather(self, obj: object) -> list:
        """Return the `obj` of every rank, in order, on every rank."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.host_group)
        return gathered

    def raise_on_all(self, error: BaseException | str | None) -> None:
        """Raise a SharedError on all ranks if any rank has an `error`. It names the first such rank."""
        for rank, found in enumerate(self.gather(error and (str(error) or repr(error)))):
            if found:
                raise SharedError(f"rank {rank}: {found}" if self.world_size > 1 else found)

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Run `function` on rank 0 and return its result on all ranks. A ValueError or OSError is raised on all."""
        if self.world_size == 1:
            return function()
        answer: list = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except (ValueError, OSError) as error:
                answer[1] = str(error) or repr(error)
        dist.broadcast_object_list(answer, 0, group=self.host_group)
        if answer[1]:
            raise SharedError(answer[1])
        return answer[0]

    def run_or_fail_together(self, function: Callable[[], Any]) -> Any:
        """Run `function` on every rank and return its result. An error that a user can mend is raised on all ranks.

        `function` must not call a collective. Otherwise the other ranks would wait for a rank that has failed.
        """
        result = error = None
        try:
            result = function()
        except (ValueError, OSError, ImportError) as found:
            error = found
        self.raise_on_all(error)
        return result

    def check_ep_size(self, ep_size: int) -> None:
        if ep_size < 1 or self.world_size % ep_size:
            raise SharedError(
                f"cannot use ep_size={ep_size}: it does not divide the {self.world_size} processes. Start a "
                "multiple with torchrun --nproc-per-node, or change ep_size."
            )

    def with_experts(self, ep_size: int, timeout: timedelta) -> "Ranks":
        """Return these ranks with the groups of expert parallelism. Consecutive ranks make a replica.

        Raises:
            ValueError: ep_size does not divide world_size.
        """
        self.check_ep_size(ep_size)
        if self.world_size == 1:
            return self
        blocks, groups = torch.arange(self.world_size).view(-1, ep_size), {}
        for name, members in (("expert_group", blocks.tolist()), ("replica_group", blocks.T.tolist())):
            groups[name], _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
        return dataclasses.replace(self, ep_size=ep_size, **groups)


def lost_contact(error: RuntimeError) -> bool:
    """Return whether a collective failed because another process died or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def join(timeout: timedelta, backend: str) -> Ranks:
    """Make the process groups of the processes that torchrun started. `backend` is that of the default group.

    Every collective fails after `timeout`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # PR_SET_PDEATHSIG. If torchrun is killed, its workers stop after the current step. Without this they would
            # go on, beside the workers that the same command starts next.
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun --max-restarts gives the restarted workers the store of those that died, with their addresses
            store = dist.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    host = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), world_group=dist.group.WORLD, host_group=host)
