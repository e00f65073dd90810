"""Runs of train_ep.py on several processes, and what goes wrong with one of them."""

import functools
import gc
import multiprocessing
import os
import pkgutil
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import train
import utils
from deepseek.files import list_checkpoints, step_of
from tests.helpers import arguments, losses, tensors_of
from training.trainer import ESFTTrainer

RANK_KEYS = {
    "batch_size": None,
    "max_steps": 12,
    "global_batch_size": 4,
    "learning_rate": 2e-3,
    "eval_steps": 4,
    "save_steps": 3,
    "save_opt_states": True,
    "ep_size": 2,
    "ddp_timeout": 300,
    "device": "cpu",
}
STEP = "training.trainer.ESFTTrainer.training_step"
GONE = r"error: rank %d: cannot go on: another process has died .*for %d seconds.* goes on from the last checkpoint"


def rank_arguments(files: Path, out: Path, **changes) -> list[str]:
    return arguments(files, out, **{**RANK_KEYS, **changes})


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: a signal; None: it had to be killed), and what it wrote."""

    code: int | None
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_on(
    world: int,
    argv: list[str] | list[list[str]],
    log: Path,
    fault: Callable[[int], None] | None = None,
    per_node: int | None = None,
    stalled: int | None = None,
    timeout: float = 300,
) -> list[Ended]:
    """Run train_ep.py with `argv` (of all ranks, or of each) on `world` processes, after `fault(rank)` in each.

    The ranks are forks of a server with the environment of torchrun, which start in no time. Rank `stalled` is not
    waited for. No process is left.
    """
    context = multiprocessing.get_context("forkserver")
    argvs = argv if isinstance(argv[0], list) else [argv] * world
    logs = [(log / f"rank-{rank}.out", log / f"rank-{rank}.err") for rank in range(world)]
    env = {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": per_node or world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    processes = []
    ends = time.monotonic() + timeout
    try:
        for rank in range(world):
            own = {**env, "RANK": rank, "LOCAL_RANK": rank % (per_node or world)}
            process = context.Process(target=_train_rank, args=(rank, argvs[rank], own, logs[rank], fault), daemon=True)
            process.start()
            processes.append(process)
        for rank, process in enumerate(processes):
            if rank != stalled:
                process.join(max(0, ends - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [Ended(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, logs)]


def _train_rank(rank: int, argv: list[str], env: dict, logs: tuple[Path, Path], fault) -> None:
    gc.freeze()
    for stream, path in enumerate(logs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    os.environ |= {key: str(value) for key, value in {**env, "OMP_NUM_THREADS": 1}.items()}
    if fault:
        fault(rank)
    utils.run_cli(lambda: train.main(argv, {"ep_size": "auto"}))


def finishes(world: int, argv: list[str], log: Path) -> list[Ended]:
    """Call `train_on` for a run that must reach its end."""
    ended = train_on(world, argv, log)
    assert [rank.code for rank in ended] == [0] * world, "".join(rank.err for rank in ended)
    return ended


def befalls(rank: int, victim: int, place: str, do: Callable[[], object], nth: int = 1, after: bool = False) -> None:
    """On rank `victim`, call `do()` before (or after) the `nth` call of the function `place`."""
    owner_name, _, name = place.rpartition(".")
    owner, calls = pkgutil.resolve_name(owner_name), []
    original = getattr(owner, name)

    @functools.wraps(original)
    def function(*args, **kwargs):
        calls.append(place)
        if len(calls) == nth and not after:
            do()
        result = original(*args, **kwargs)
        if len(calls) == nth and after:
            do()
        return result

    if rank == victim:
        setattr(owner, name, function)


def gets(rank: int, sent: signal.Signals, victim: int, place: str, **when) -> None:
    befalls(rank, victim, place, lambda: os.kill(os.getpid(), sent), **when)


def log_worse(self, logs: dict, *args, log=ESFTTrainer.log) -> None:
    """Take the place of `ESFTTrainer.log`, with validation losses that grow by 1 with every step."""
    if "eval_loss" in logs:
        logs["eval_loss"] += self.state.global_step
    log(self, logs, *args)


def copy_run(run: Path, out: Path) -> Path:
    """Copy a run's folder, to go on from there."""
    shutil.copytree(run, out)
    note = out / "run.json"
    note.write_text(note.read_text().replace(str(run), str(out)))
    return out


def steps(out: Path) -> list[int]:
    """Return the steps of a run's checkpoints."""
    return [step_of(path) for path in list_checkpoints(out)]


def told(ended: list[Ended]) -> list[str]:
    return [line for rank in ended for line in rank.err.splitlines() if line.startswith("error: ")]


def assert_near(a: Path, b: Path) -> None:
    """Assert that two runs are one within the rounding of fp32, which AdamW enlarges where a gradient is near zero."""
    left, right = losses(a), losses(b)
    assert left.keys() == right.keys()
    assert left == pytest.approx(right, rel=1e-6)
    left, right = tensors_of(a), tensors_of(b)
    assert left.keys() == right.keys()
    largest = max(tensor.abs().max() for tensor in right.values())
    for key, tensor in left.items():
        assert (tensor - right[key]).abs().max() <= 1e-5 * largest, key
