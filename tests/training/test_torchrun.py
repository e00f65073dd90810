"""Runs that torchrun starts: killed, stalled, started again, and on two nodes. All are slow."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from deepseek.files import list_checkpoints
from tests.helpers import ROOT, same, tensors_of
from tests.rank_helpers import GONE, assert_near, finishes, free_port, rank_arguments, steps
from training.checkpoints import find_damage

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Torchrun:
    """A run that torchrun's agent has started."""

    agent: subprocess.Popen
    out: Path  # its output folder
    log: Path

    def processes(self) -> list[psutil.Process]:
        """The agent and its workers, which are sessions of their own, and outlive it."""
        mark = f"output_dir={self.out}"
        return [one for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or ())]

    def worker(self, rank: int) -> psutil.Process:
        workers = [one for one in self.processes() if one.pid != self.agent.pid]
        return next(one for one in workers if one.environ()["RANK"] == str(rank))

    def kill(self) -> None:
        while processes := self.processes():
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.agent.wait(30)
            psutil.wait_procs(processes, 30)

    def until(self, condition: Callable[[], object], seconds: float = 600) -> None:
        """Wait for it, as long as the run goes on."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s:\n{self.text()}"
            assert self.agent.poll() is None, f"the run has ended:\n{self.text()}"
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        # Trainer makes the folder, and takes it away again, before run.json is there
        self.until(lambda: (self.out / "run.json").exists() and max(steps(self.out), default=0) >= step)

    def wait(self, seconds: float = 600) -> int:
        return self.agent.wait(seconds)

    def text(self) -> str:
        return self.log.read_text()

    def told(self) -> list[str]:
        return [line for line in self.text().splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def torchrun(argv: list[str], log: Path, *flags: str, processes: int = 2, script: Path = ROOT / "train_ep.py"):
    """A Torchrun, of which nothing is left afterwards."""
    flags = flags or ("--standalone",)
    command = [sys.executable, "-m", "torch.distributed.run", *flags, f"--nproc-per-node={processes}", script, *argv]
    out = Path(next(pair.partition("=")[2] for pair in argv if pair.startswith("output_dir=")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    run = Torchrun(agent, out, log)
    try:
        yield run
    finally:
        run.kill()


def completes(argv: list[str], log: Path, *flags: str) -> None:
    with torchrun(argv, log, *flags) as run:
        assert run.wait() == 0, run.text()


LONG = {"max_steps": 80, "save_steps": 2, "eval_steps": 2, "save_total_limit": 2, "load_best_model_at_end": True}


def test_killed_twenty_times_a_run_goes_on_bit_for_bit(files, tmp_path):
    """At random moments, from the start of its processes on; every other time while it writes a checkpoint."""
    whole, out, moments = tmp_path / "whole", tmp_path / "out", random.Random(0)
    finishes(2, rank_arguments(files, whole, **LONG), tmp_path)
    argv, log = rank_arguments(files, out, **LONG), tmp_path / "log"
    writing = starting = 0
    for number in range(20):
        before = max(steps(out), default=0)
        with torchrun(argv, log) as run:
            if number % 5 == 4:
                time.sleep(moments.uniform(0, 8))
            else:
                run.until_step(before + 2 * moments.randint(0, 1))
                run.until((out / ".staging").exists)
                time.sleep(moments.uniform(0, 0.01 if number % 2 else 0.5))
            assert run.agent.poll() is None
            run.kill()
        writing += (out / ".staging").exists()
        starting += max(steps(out), default=0) == before
        if before:
            assert find_damage(list_checkpoints(out)[-1]) is None and steps(out)[-1] >= before
    assert writing >= 1 and starting < 20
    assert steps(out)[-1] < 80, "it was done before it was killed for the last time"
    print(f"{writing} of 20 kills while it wrote, {starting} without progress, the last after step {steps(out)[-1]}")
    completes(argv, log)
    assert same(whole, out)
    assert not (out / ".staging").exists() and len(list_checkpoints(out)) <= 2


def test_a_worker_that_is_killed_is_started_again(files, tmp_path):
    out = tmp_path / "out"
    finishes(2, rank_arguments(files, tmp_path / "whole", max_steps=40), tmp_path)
    argv = rank_arguments(files, out, max_steps=40)
    with torchrun(argv, tmp_path / "log", "--standalone", "--max-restarts=2") as run:
        for rank, step in ((1, 3), (0, 12)):
            run.until_step(step)
            run.worker(rank).kill()
        assert run.wait() == 0, run.text()
    went_on = re.findall(r"going on from .*checkpoint-(\d+)\n", run.text())
    assert [int(step) for step in went_on] == sorted(int(step) for step in went_on)
    assert len(went_on) == 2 and int(went_on[0]) >= 3 and int(went_on[1]) >= 12
    assert same(tmp_path / "whole", out)


def test_sigterm_to_the_agent_saves_a_checkpoint(files, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    argv = rank_arguments(files, out, max_steps=60, save_steps=3)
    finishes(2, rank_arguments(files, tmp_path / "whole", max_steps=60, save_steps=3), tmp_path)
    script = tmp_path / "script.py"  # train_ep.py, but every rank leaves its exit code
    script.write_text(
        "import os, pathlib, runpy\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train_ep.py')!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'code-' + os.environ['RANK']).write_text(str(stop.code))\n"
        "    raise\n"
    )
    with torchrun(argv, log, script=script) as run:
        run.until_step(6)
        run.agent.terminate()
        assert run.wait(60) != 0
        assert [(tmp_path / f"code-{rank}").read_text() for rank in range(2)] == ["143", "143"]
        stopped = re.findall(r"stopped by SIGTERM after step (\d+): the same command goes on", run.text())
        assert not run.told() and not run.processes()
    assert len(stopped) == 1 and int(stopped[0]) == steps(out)[-1] < 60
    assert find_damage(list_checkpoints(out)[-1]) is None
    completes(argv, log)
    assert f"going on from {out / f'checkpoint-{stopped[0]}'}" in log.read_text()
    assert same(tmp_path / "whole", out)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stalls"])
def test_a_worker_that_is_gone_ends_the_run(files, tmp_path, sent):
    argv = rank_arguments(files, tmp_path / "out", max_steps=500, ddp_timeout=10)
    with torchrun(argv, tmp_path / "log") as run:
        run.until_step(6)
        worker = run.worker(1)
        worker.send_signal(sent)
        end = time.monotonic() + 300
        while not run.told() and time.monotonic() < end:
            time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()  # the agent would wait 30 s for one that is stopped
        assert run.wait() != 0
        (line,) = run.told()
        assert re.match(GONE % (0, 10), line), line
        assert not run.processes()


@pytest.mark.parametrize("per_node", [1, 2])
def test_two_nodes_train_as_one_process(files, tmp_path, per_node):
    """ep_size=2: over both nodes where each has one process, else within each, as two replicas."""
    out = tmp_path / "out"
    finishes(1, rank_arguments(files, tmp_path / "one", ep_size=1), tmp_path)
    flags = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    argv = rank_arguments(files, out, verify_frozen=True)
    with (
        torchrun(argv, tmp_path / "log-0", *flags, "--node-rank=0", processes=per_node) as first,
        torchrun(argv, tmp_path / "log-1", *flags, "--node-rank=1", processes=per_node) as second,
    ):
        assert [run.wait() for run in (first, second)] == [0, 0], first.text() + second.text()
    assert first.text().count("trained parameters") == 1 and "trained parameters" not in second.text()
    assert tensors_of(out).keys() == tensors_of(tmp_path / "one").keys()
    assert_near(out, tmp_path / "one")
    assert sorted(path.name for path in (out / "checkpoint-12" / "states").glob("*.safetensors")) == [
        "rank-0.safetensors",
        "rank-1.safetensors",
    ]


def test_a_node_that_cannot_start_ends_the_other(files, broken, tmp_path):
    flags = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    out = tmp_path / "out"
    with (
        torchrun(rank_arguments(files, out), tmp_path / "log-0", *flags, "--node-rank=0", processes=1) as first,
        torchrun(
            rank_arguments(files, out, **broken["weights"]), tmp_path / "log-1", *flags, "--node-rank=1", processes=1
        ) as second,
    ):
        assert 0 not in [run.wait() for run in (first, second)]
    for run in (first, second):
        (line,) = run.told()
        assert re.match(r"error: rank 1: cannot read .*weights/model\.safetensors: .*damaged or truncated", line), line
    assert not out.exists()


def test_workers_do_not_outlive_their_agent(files, tmp_path):
    """Else the same command would start a second run beside them, in the same folder."""
    out, keys = tmp_path / "out", {"max_steps": 150, "save_total_limit": 2}
    finishes(2, rank_arguments(files, tmp_path / "whole", **keys), tmp_path)
    with torchrun(rank_arguments(files, out, **keys), tmp_path / "log") as run:
        run.until_step(6)
        run.agent.kill()
        run.agent.wait(10)
        end = time.monotonic() + 10
        while run.processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert not run.processes()
        assert not run.told()
    assert 6 <= steps(out)[-1] < 150 and find_damage(list_checkpoints(out)[-1]) is None
    completes(rank_arguments(files, out, **keys), tmp_path / "log")
    assert same(tmp_path / "whole", out)
