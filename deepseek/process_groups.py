"""The processes of a run: how they find each other, agree, and learn that one of them is gone.

torchrun starts them; `join` makes their process groups. Where torchrun starts them again (--max-restarts), it does so
on the store of the try before, whose keys still name processes that are dead, so rank 0 first collects those that live:

    rank r   hello/r = name            waits for welcome/<name> = attempt         here/<attempt>/r
    rank 0   reads every hello/r and welcomes that name, until all are here; the attempt prefixes all keys from then on
"""

import ctypes
import dataclasses
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class SharedError(ValueError):
    """An error that every process raises alike, so that one of them per node tells it."""

    shared = True


@dataclass(frozen=True)
class Ranks:
    """Who this process is, and the process groups it takes part in; a single process has none."""

    rank: int = 0
    world_size: int = 1
    ep_size: int = 1
    experts: Any = None  # the ranks of this replica, which share its experts
    replicas: Any = None  # the ranks that hold the same experts
    world: Any = None
    host: Any = None  # the world on gloo, for objects and tensors in host memory

    @property
    def expert_rank(self) -> int:
        return self.rank % self.ep_size

    @property
    def first_replica(self) -> bool:
        return self.rank < self.ep_size

    def gather(self, obj: object) -> list:
        """`obj` of every rank, on every rank."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.host)
        return gathered

    def agree(self, error: BaseException | str | None) -> None:
        """Raise on all ranks where any has an `error`, which is told with the rank it comes from."""
        for rank, found in enumerate(self.gather(error and (str(error) or repr(error)))):
            if found:
                raise SharedError(f"rank {rank}: {found}" if self.world_size > 1 else found)

    def on_first(self, function: Callable[[], Any]) -> Any:
        """What `function()` returns on rank 0, on every rank; a ValueError or OSError there is raised on all."""
        if self.world_size == 1:
            return function()
        answer: list = [None, None]
        if self.rank == 0:
            try:
                answer[0] = function()
            except (ValueError, OSError) as error:
                answer[1] = str(error) or repr(error)
        dist.broadcast_object_list(answer, 0, group=self.host)
        if answer[1]:
            raise SharedError(answer[1])
        return answer[0]

    def together(self, function: Callable[[], Any]) -> Any:
        """What `function()` returns here; an error of any rank that a user can mend is raised on all. `function` must
        call no collective, so that a rank that fails keeps none waiting."""
        result = error = None
        try:
            result = function()
        except (ValueError, OSError, ImportError) as found:
            error = found
        self.agree(error)
        return result

    def with_experts(self, ep_size: int, timeout: timedelta) -> "Ranks":
        """These ranks with the groups of expert parallelism: consecutive ranks make a replica.

        Raises:
            ValueError: world_size is no multiple of ep_size.
        """
        if ep_size < 1 or self.world_size % ep_size:
            raise SharedError(
                f"ep_size={ep_size} does not divide the {self.world_size} processes: start a multiple of it with "
                "torchrun --nproc-per-node, or change ep_size"
            )
        if self.world_size == 1:
            return self
        blocks, groups = torch.arange(self.world_size).view(-1, ep_size), {}
        for name, members in (("experts", blocks.tolist()), ("replicas", blocks.T.tolist())):
            groups[name], _ = dist.new_subgroups_by_enumeration(members, timeout=timeout)
        return dataclasses.replace(self, ep_size=ep_size, **groups)


def lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed since another process died or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def join(timeout: timedelta, backend: str) -> Ranks:
    """This process among those that torchrun started, with the default process group made on `backend`.

    Every collective gives up after `timeout`.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return Ranks()
    if not dist.is_initialized():
        if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
            # PR_SET_PDEATHSIG: where torchrun is killed, its workers stop after the step at work, instead of going on
            # beside those that the same command starts
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = _this_attempt(store, rank, world_size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    host = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), world=dist.group.WORLD, host=host)


def _this_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """`store` without what processes that are dead left in it."""
    name, end = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"hello/{rank}", name)
        attempt = store.get(f"welcome/{name}").decode()
        store.set(f"here/{attempt}/{rank}", "")
        return dist.PrefixStore(attempt, store)
    waiting = set(range(1, world_size))
    while waiting:
        for other in tuple(waiting):
            if store.check([f"here/{name}/{other}"]):
                waiting.remove(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", name)
        if time.monotonic() > end:
            raise TimeoutError(f"ranks {sorted(waiting)} did not start in {timeout.total_seconds():.0f} seconds")
        time.sleep(0.05)
    return dist.PrefixStore(name, store)
