"""Runs on several processes that are killed, stopped, or short of disk: they end in one sentence and leave whole
checkpoints, and the same command then gives the run that nothing happened to.

Ranks are forks of the server of conftest.run_ranks, with the environment of torchrun, so that a run takes seconds: what
goes wrong is put into one of them at an exact place. Where torchrun itself matters, it starts them (slow).
"""

import contextlib
import functools
import multiprocessing
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

import train
import utils
from deepseek.files import write_json, write_jsonl
from tests.helpers import PRELOADED, ROOT, losses, make_model, same, weights
from training.checkpoints import find_damage, step_of
from training.checkpoints import list_checkpoints as saved

KEYS = {
    "seq_length": 48,
    "max_steps": 12,
    "global_batch_size": 4,
    "learning_rate": 2e-3,
    "validation_fraction": 0.2,
    "eval_steps": 4,
    "save_steps": 3,
    "save_opt_states": True,
    "ep_size": 2,
    "ddp_timeout": 60,
    "device": "cpu",
    "disable_tqdm": True,
}
GONE = r"error: rank %d: another process has died, or did not answer for %d seconds .*goes on from the last checkpoint"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_tokenizer):
    """A folder with a model, a dataset and an expert config."""
    folder = tmp_path_factory.mktemp("files")
    make_model().save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    rows = []
    for i in range(40):
        turns = [("user", f"is it {i}?"), ("assistant", " ".join([f"yes {i}"] * (1 + i % 4)))]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    write_jsonl(folder / "data.jsonl", rows)
    write_json(folder / "experts.json", {"experts": {"1": [3, 5], "2": [0, 6, 2]}})
    return folder


def arguments(files: Path, out: Path, **changes) -> list[str]:
    paths = {
        "base_model_path": files / "model",
        "train_dataset": files / "data.jsonl",
        "expert_config": files / "experts.json",
        "output_dir": out,
    }
    return [f"{key}={value}" for key, value in {**paths, **KEYS, **changes}.items() if value is not None]


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit code (negative: the signal; None: it had to be killed), what it wrote."""

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
    timeout: float = 60,
) -> list[Ended]:
    """Run train_ep.py with `argv` (of all ranks, or of each) on `world` processes, after `fault(rank)` in each.

    Rank `stalled` will not end and is not waited for. No process is left.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
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
            process = context.Process(target=_rank, args=(rank, argvs[rank], own, logs[rank], fault), daemon=True)
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


def _rank(rank: int, argv: list[str], env: dict, logs: tuple[Path, Path], fault) -> None:
    for stream, path in enumerate(logs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_num_threads(1)
    os.environ |= {key: str(value) for key, value in {**env, "OMP_NUM_THREADS": 1}.items()}
    if fault:
        fault(rank)
    utils.run_cli(lambda: train.main(argv, {"ep_size": "auto"}))


def finishes(world: int, argv: list[str], log: Path) -> list[Ended]:
    """`train_on`, of a run that must reach its end."""
    ended = train_on(world, argv, log)
    assert [rank.code for rank in ended] == [0] * world, "".join(rank.err for rank in ended)
    return ended


# What goes wrong, called in every rank before it starts: `victim` is the rank it befalls.


def befalls(rank: int, victim: int, place: str, do: Callable[[], object], nth: int = 1, after: bool = False) -> None:
    """`do()` before (or after) the `nth` call of the function `place`."""
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


def cannot_write(rank: int, victim: int, place: str, **when) -> None:
    """From there on the files of this process may have 16 KiB: room for what it prints."""
    befalls(rank, victim, place, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, -1)), **when)


def disk_fills(rank: int, disk: Path, victim: int, place: str, **when) -> None:
    befalls(rank, victim, place, lambda: fill(disk), **when)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


STEP = "trainer.ESFTTrainer.training_step"


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The folder of an unbroken run on two processes."""
    folder = tmp_path_factory.mktemp("whole")
    finishes(2, arguments(files, folder / "out"), folder)
    return folder / "out"


@pytest.fixture(scope="module")
def killed(files, tmp_path_factory):
    """(folder of a run whose rank 1 was killed in step 8, how its ranks ended)."""
    folder = tmp_path_factory.mktemp("killed")
    fault = functools.partial(gets, sent=signal.SIGKILL, victim=1, place=STEP, nth=8)
    return folder / "out", train_on(2, arguments(files, folder / "out"), folder, fault)


def copy(run: Path, out: Path) -> Path:
    """A copy of a run's folder, to go on from there."""
    shutil.copytree(run, out)
    note = out / "run.json"
    note.write_text(note.read_text().replace(str(run), str(out)))
    return out


@pytest.fixture
def broken_off(killed, tmp_path):
    """A run that was killed after checkpoint-6, for this test alone."""
    return copy(killed[0], tmp_path / "out")


def steps(out: Path) -> list[int]:
    """Of its checkpoints."""
    return [step_of(path) for path in saved(out)]


def told(ended: list[Ended]) -> list[str]:
    return [line for rank in ended for line in rank.err.splitlines() if line.startswith("error: ")]


def assert_near(a: Path, b: Path) -> None:
    """Two runs are one within the rounding of fp32, of which AdamW makes more where a gradient is near zero."""
    left, right = losses(a), losses(b)
    assert left.keys() == right.keys()
    assert left == pytest.approx(right, rel=1e-6)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    largest = max(tensor.abs().max() for tensor in right.values())
    for key, tensor in left.items():
        assert (tensor - right[key]).abs().max() <= 1e-5 * largest, key


# ---- killed ---------------------------------------------------------------------------------------------------------


def test_killed_at_any_point_of_a_checkpoint_a_run_goes_on_bit_for_bit(files, whole, tmp_path):
    out, argv = tmp_path / "out", arguments(files, tmp_path / "out")
    for victim, place, nth, after, left in (
        (1, "training.checkpoints.save_states", 2, False, [3]),  # rank 0 has written its part of checkpoint-6
        (0, "training.checkpoints.write_manifest", 1, True, [3]),  # it is whole, and not yet renamed
        (0, "training.trainer.rotate_checkpoints", 2, False, [3, 6, 9]),  # a checkpoint is renamed
        (0, "trainer.ESFTTrainer.save_state", 1, False, [3, 6, 9, 12]),  # the adapter is saved, its results are not
    ):
        fault = functools.partial(gets, sent=signal.SIGKILL, victim=victim, place=place, nth=nth, after=after)
        ended = train_on(2, argv, tmp_path, fault)
        assert ended[victim].code == -signal.SIGKILL
        assert steps(out) == left and [find_damage(path) for path in saved(out)] == [None] * len(left), place
    finishes(2, argv, tmp_path)
    assert same(whole, out)
    assert not (out / ".staging").exists()


def test_the_others_end_when_a_rank_dies(killed):
    out, ended = killed
    assert [rank.code for rank in ended] == [2, -signal.SIGKILL]
    (line,) = told(ended)
    assert re.match(GONE % (0, 60), line), line
    assert "Traceback" not in ended[0].err
    assert steps(out) == [3, 6] and not list(out.glob("*.safetensors"))


@slow
def test_the_others_end_when_a_rank_stalls(files, tmp_path):
    argv = arguments(files, tmp_path / "out", ddp_timeout=5)
    fault = functools.partial(gets, sent=signal.SIGSTOP, victim=1, place=STEP, nth=5)
    start = time.monotonic()
    ended = train_on(2, argv, tmp_path, fault, stalled=1)
    assert time.monotonic() - start < 5 + 35
    assert [rank.code for rank in ended] == [2, None]
    (line,) = told(ended)
    assert re.match(GONE % (0, 5), line), line


def test_sigterm_to_one_rank_saves_on_all(files, whole, tmp_path):
    out, argv = tmp_path / "out", arguments(files, tmp_path / "out")
    fault = functools.partial(gets, sent=signal.SIGTERM, victim=1, place=STEP, nth=5)
    ended = train_on(2, argv, tmp_path, fault)
    assert [rank.code for rank in ended] == [143, 143]
    assert "stopped by SIGTERM after step 5: the same command goes on from here" in ended[0].out
    assert not told(ended)
    assert steps(out) == [3, 5] and find_damage(out / "checkpoint-5") is None
    finishes(2, argv, tmp_path)
    assert same(whole, out)


def started_again(rank: int) -> None:
    """As torchrun's agent does after a worker has failed."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"


def test_a_run_that_overwrites_goes_on_when_torchrun_starts_it_again(files, whole, broken_off, tmp_path):
    argv = arguments(files, broken_off, overwrite=True)
    (first, _) = train_on(2, argv, tmp_path, started_again)
    assert first.code == 0, first.err
    assert f"going on from {broken_off / 'checkpoint-6'}\n" in first.out
    assert same(whole, broken_off)
    (first, _) = train_on(2, argv, tmp_path, started_again)  # what is done is not its own
    assert "steps; validation loss" in first.out and "going on" not in first.out


# ---- damaged, or on other processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, how", [("states/rank-1.safetensors", "cut"), ("adapter.safetensors", "flipped")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(files, whole, broken_off, tmp_path, name, how):
    path = broken_off / "checkpoint-6" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content if how == "flipped" else content[:-100])
    ended = finishes(2, arguments(files, broken_off), tmp_path)
    warning = f"warning: {broken_off / 'checkpoint-6'} is damaged ({name} is not what was written)"
    assert ended[0].err.count(warning) == 1 and "warning" not in ended[1].err
    assert f"going on from {broken_off / 'checkpoint-3'}\n" in ended[0].out
    assert same(whole, broken_off)
    assert find_damage(broken_off / "checkpoint-6") is None


def test_a_run_goes_on_with_another_ep_size_and_on_one_process(files, whole, broken_off, tmp_path):
    fault = functools.partial(gets, sent=signal.SIGKILL, victim=0, place=STEP, nth=5)
    train_on(2, arguments(files, broken_off, ep_size=1), tmp_path, fault)
    assert steps(broken_off) == [3, 6, 9]
    states = [path.name for path in (broken_off / "checkpoint-9" / "states").glob("*.safetensors")]
    assert states == ["rank-0.safetensors"] != list((broken_off / "checkpoint-6" / "states").glob("*.safetensors"))
    (one,) = finishes(1, arguments(files, broken_off, ep_size=1), tmp_path)
    assert f"going on from {broken_off / 'checkpoint-9'}\n" in one.out
    assert_near(broken_off, whole)


@slow
def test_a_run_goes_from_layout_to_layout(files, whole, tmp_path):
    out, moments = tmp_path / "out", random.Random(1)
    keys = {"max_steps": 18, "save_steps": 1}
    finishes(1, arguments(files, tmp_path / "whole", **keys, ep_size=1), tmp_path)
    at = 0
    for world, ep_size in ((2, 2), (2, 1), (4, 2), (1, 1), (4, 4), (2, 2)):
        step = moments.randint(2, 3)
        fault = functools.partial(gets, sent=signal.SIGKILL, victim=world - 1, place=STEP, nth=step)
        ended = train_on(world, arguments(files, out, **keys, ep_size=ep_size), tmp_path, fault)
        assert ended[-1].code == -signal.SIGKILL
        assert (at := at + step - 1) == steps(out)[-1]
        states = [path.name for path in (saved(out)[-1] / "states").glob("*.safetensors")]
        assert sorted(states) == [f"rank-{rank}.safetensors" for rank in range(ep_size)]
    (one,) = finishes(1, arguments(files, out, **keys, ep_size=1), tmp_path)
    assert f"going on from {out / f'checkpoint-{at}'}\n" in one.out
    assert_near(out, tmp_path / "whole")


# ---- no room --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "victim, place", [(0, "esft.save_adapter"), (1, "training.checkpoints.save_states")], ids=["adapter", "states"]
)
def test_a_file_that_cannot_be_written_ends_the_run_in_one_sentence(files, whole, broken_off, tmp_path, victim, place):
    fault = functools.partial(cannot_write, victim=victim, place=place)
    ended = train_on(2, arguments(files, broken_off), tmp_path, fault)
    assert [rank.code for rank in ended] == [2, 2]
    (line,) = told(ended)
    at = broken_off / "checkpoint-9"
    assert re.match(rf"error: rank {victim}: {at} could not be written \(.*File too large.*saved before is whole", line)
    assert steps(broken_off) == [3, 6] and find_damage(broken_off / "checkpoint-6") is None
    finishes(2, arguments(files, broken_off), tmp_path)
    assert same(whole, broken_off)


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


@slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_full_disk_ends_a_run_of_another_method_in_one_sentence(files, disk, tmp_path, method):
    """Their checkpoints are transformers' own."""
    out = disk / "out"
    argv = arguments(files, out, method=method, expert_config=None, ep_size=1)
    for nth, left in ((2, []), (5, [3])):  # optimizer.pt of the first checkpoint, and of the second
        fault = functools.partial(disk_fills, disk=disk, victim=0, place="torch.save", nth=nth)
        ended = train_on(2, argv, tmp_path, fault)
        assert [rank.code for rank in ended] == [2, 2], ended[0].err
        (line,) = told(ended)
        assert re.match(rf"error: rank 0: {out}/checkpoint-\d+ could not be written \(.*what was saved before", line), (
            line
        )
        assert steps(out) == left and [find_damage(path) for path in saved(out)] == [None] * len(left)
        (disk / "filler").unlink()
    finishes(2, argv, tmp_path)


@slow
@pytest.mark.parametrize(
    "victim, place, nth",
    [
        (0, "train._Begin.on_train_begin", 1),
        (0, "trainer.ESFTTrainer._save_checkpoint", 1),
        (0, "esft.save_adapter", 1),
        (1, "training.checkpoints.save_states", 1),
        (0, "write_json", 2),  # of the scheduler; the first was run.json
        (0, "training.checkpoints.write_manifest", 1),
        (0, "trainer.ESFTTrainer.save_model", 3),  # checkpoints 9 and 12 came before
        (0, "trainer.ESFTTrainer.save_state", 1),
        (0, "train.peak_memory_bytes", 1),  # the results are next
    ],
)
def test_a_full_disk_ends_the_run_in_one_sentence(files, whole, killed, disk, tmp_path, victim, place, nth):
    out = disk / "out"
    copy(killed[0], out)
    fault = functools.partial(disk_fills, disk=disk, victim=victim, place=place, nth=nth)
    ended = train_on(2, arguments(files, out), tmp_path, fault)
    assert (disk / "filler").exists()
    (line,) = told(ended)
    assert re.match(rf"error: rank [01]: {out}.* \(.*No space left on device.*\); what was saved before is whole", line)
    assert "Traceback" not in ended[0].err + ended[1].err
    assert all(rank.code == 2 for rank in ended)
    assert [find_damage(path) for path in saved(out)] == [None] * len(saved(out)) and 6 in steps(out)
    (disk / "filler").unlink()
    finishes(2, arguments(files, out), tmp_path)
    assert same(whole, out)


# ---- set-up ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(files, tmp_path_factory):
    """{name: changes of a command that cannot be run}."""
    folder = tmp_path_factory.mktemp("broken")
    folder.joinpath("data.jsonl").write_bytes((files / "data.jsonl").read_bytes() + b"{oops\n")
    write_json(folder / "experts.json", {"experts": {"1": [8]}})
    for name, file in (("weights", "model.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer.json")):
        path = shutil.copytree(files / "model", folder / name) / file
        path.write_bytes(path.read_bytes()[:-20])
    return {
        "data": {"train_dataset": folder / "data.jsonl"},
        "experts": {"expert_config": folder / "experts.json"},
        "no experts": {"expert_config": folder / "none.json"},
        "weights": {"base_model_path": folder / "weights"},
        "config": {"base_model_path": folder / "config"},
        "tokenizer": {"base_model_path": folder / "tokenizer"},
        "argument": {"eval_strategy": "sometimes"},
        "batch": {"global_batch_size": 3},
        "optimizer": {"optim": "lomo"},
    }


@pytest.mark.parametrize(
    "name, text",
    [
        ("data", r"data.jsonl:41: not valid JSON"),
        ("experts", r"names expert 8 of layer 1"),
        ("weights", r"weights' cannot be loaded"),
        ("config", r"config' cannot be loaded"),
        ("tokenizer", r"tokenizer' cannot be loaded"),
        ("argument", r"the training arguments do not fit"),
        ("batch", r"global_batch_size=3 cannot be shared out"),
        ("optimizer", r"lomo"),
    ],
)
def test_what_no_rank_can_start_with_is_told_once_on_each_node(files, broken, tmp_path, name, text):
    """Two nodes of two ranks."""
    out = tmp_path / "out"
    ended = train_on(4, arguments(files, out, **broken[name]), tmp_path, per_node=2)
    assert [rank.code for rank in ended] == [2] * 4
    lines = [told([rank]) for rank in ended]
    assert [len(own) for own in lines] == [1, 0, 1, 0], lines
    assert all(re.search(text, line) for line in (*lines[0], *lines[2])), lines
    assert not any("Traceback" in rank.err for rank in ended)
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("name", ["weights", "tokenizer", "no experts", "argument"])
def test_what_one_node_cannot_start_with_is_told_on_all(files, broken, tmp_path, name):
    """Two nodes of one rank, the second of which has bad files: no other waits for it, or speaks of a dead process."""
    out = tmp_path / "out"
    argvs = [arguments(files, out, **(broken[name] if rank else {})) for rank in range(2)]
    ended = train_on(2, argvs, tmp_path, per_node=1, timeout=20)
    assert [rank.code for rank in ended] == [2, 2]
    assert [line.startswith("error: rank 1: ") for line in told(ended)] == [True, True], told(ended)
    assert not out.exists()


# ---- under torchrun -------------------------------------------------------------------------------------------------


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

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for it, as long as the run goes on."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not in {seconds} s:\n{self.text()}"
            assert self.agent.poll() is None, f"the run has ended:\n{self.text()}"
            time.sleep(0.002)

    def until_step(self, step: int) -> None:
        self.until(lambda: max(steps(self.out), default=0) >= step)

    def wait(self, seconds: float = 180) -> int:
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


@slow
def test_killed_twenty_times_a_run_goes_on_bit_for_bit(files, tmp_path):
    """At random moments, from the start of its processes on; every other time while it writes a checkpoint."""
    whole, out, moments = tmp_path / "whole", tmp_path / "out", random.Random(0)
    finishes(2, arguments(files, whole, **LONG), tmp_path)
    argv, log = arguments(files, out, **LONG), tmp_path / "log"
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
            assert find_damage(saved(out)[-1]) is None and steps(out)[-1] >= before
    assert writing >= 1 and starting < 20
    assert steps(out)[-1] < 80, "it was done before it was killed for the last time"
    print(f"{writing} of 20 kills while it wrote, {starting} without progress, the last after step {steps(out)[-1]}")
    completes(argv, log)
    assert same(whole, out)
    assert not (out / ".staging").exists() and len(saved(out)) <= 2


@slow
def test_a_worker_that_is_killed_is_started_again(files, tmp_path):
    out = tmp_path / "out"
    finishes(2, arguments(files, tmp_path / "whole", max_steps=40), tmp_path)
    argv = arguments(files, out, max_steps=40)
    with torchrun(argv, tmp_path / "log", "--standalone", "--max-restarts=2") as run:
        for rank, step in ((1, 3), (0, 12)):
            run.until_step(step)
            run.worker(rank).kill()
        assert run.wait() == 0, run.text()
    went_on = re.findall(r"going on from .*checkpoint-(\d+)\n", run.text())
    assert [int(step) for step in went_on] == sorted(int(step) for step in went_on)
    assert len(went_on) == 2 and int(went_on[0]) >= 3 and int(went_on[1]) >= 12
    assert same(tmp_path / "whole", out)


@slow
def test_sigterm_to_the_agent_saves_a_checkpoint(files, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    argv = arguments(files, out, max_steps=60, save_steps=3)
    finishes(2, arguments(files, tmp_path / "whole", max_steps=60, save_steps=3), tmp_path)
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
    assert find_damage(saved(out)[-1]) is None
    completes(argv, log)
    assert f"going on from {out / f'checkpoint-{stopped[0]}'}" in log.read_text()
    assert same(tmp_path / "whole", out)


@slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "stalls"])
def test_a_worker_that_is_gone_ends_the_run(files, tmp_path, sent):
    argv = arguments(files, tmp_path / "out", max_steps=500, ddp_timeout=10)
    with torchrun(argv, tmp_path / "log") as run:
        run.until_step(6)
        worker, start = run.worker(1), time.monotonic()
        worker.send_signal(sent)
        while not run.told() and time.monotonic() - start < 10 + 35:
            time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()  # the agent would wait 30 s for one that is stopped
        assert run.wait(60) != 0
        assert time.monotonic() - start < 10 + 35
        (line,) = run.told()
        assert re.match(GONE % (0, 10), line), line
        assert not run.processes()


@slow
@pytest.mark.parametrize("per_node", [1, 2])
def test_two_nodes_train_as_one_process(files, tmp_path, per_node):
    """ep_size=2: over both nodes where each has one process, else within each, as two replicas."""
    out = tmp_path / "out"
    finishes(1, arguments(files, tmp_path / "one", ep_size=1), tmp_path)
    flags = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    argv = arguments(files, out, verify_frozen=True)
    with (
        torchrun(argv, tmp_path / "log-0", *flags, "--node-rank=0", processes=per_node) as first,
        torchrun(argv, tmp_path / "log-1", *flags, "--node-rank=1", processes=per_node) as second,
    ):
        assert [run.wait() for run in (first, second)] == [0, 0], first.text() + second.text()
    assert first.text().count("trained parameters") == 1 and "trained parameters" not in second.text()
    assert weights(out).keys() == weights(tmp_path / "one").keys()
    assert_near(out, tmp_path / "one")
    assert sorted(path.name for path in (out / "checkpoint-12" / "states").glob("*.safetensors")) == [
        "rank-0.safetensors",
        "rank-1.safetensors",
    ]


@slow
def test_a_node_that_cannot_start_ends_the_other(files, broken, tmp_path):
    flags = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    out = tmp_path / "out"
    with (
        torchrun(arguments(files, out), tmp_path / "log-0", *flags, "--node-rank=0", processes=1) as first,
        torchrun(
            arguments(files, out, **broken["weights"]), tmp_path / "log-1", *flags, "--node-rank=1", processes=1
        ) as second,
    ):
        assert 0 not in [run.wait() for run in (first, second)]
    for run in (first, second):
        (line,) = run.told()
        assert re.match(r"error: rank 1: .*weights' cannot be loaded", line), line
    assert not out.exists()


@slow
def test_workers_do_not_outlive_their_agent(files, tmp_path):
    """Else the same command would start a second run beside them, in the same folder."""
    out, keys = tmp_path / "out", {"max_steps": 150, "save_total_limit": 2}
    finishes(2, arguments(files, tmp_path / "whole", **keys), tmp_path)
    with torchrun(arguments(files, out, **keys), tmp_path / "log") as run:
        run.until_step(6)
        run.agent.kill()
        run.agent.wait(10)
        end = time.monotonic() + 10
        while run.processes() and time.monotonic() < end:
            time.sleep(0.1)
        assert not run.processes()
        assert not run.told()
    assert 6 <= steps(out)[-1] < 150 and find_damage(saved(out)[-1]) is None
    completes(arguments(files, out, **keys), tmp_path / "log")
    assert same(tmp_path / "whole", out)
