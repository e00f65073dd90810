"""What every command shares: arguments, errors in one sentence, whole files or none, what a result was made with."""

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent


def run_cli(main: Callable[[], object]) -> None:
    """Run a command: a ValueError, OSError, or want of a library or of GPU memory, becomes `error: <sentence>` on
    stderr and exit code 2.

    Under torchrun the sentence names the rank, unless the error is `shared` by all: then one per node tells it.
    ESFT_DEBUG in the environment keeps the traceback. Ctrl-C exits 130 with a word, a closed pipe (`| head`) 141.
    """
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains again
        sys.exit(141)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        shared, rank = getattr(error, "shared", False), os.environ.get("RANK")
        if not shared or os.environ.get("LOCAL_RANK", "0") == "0":
            who = f"rank {rank}: " if rank and not shared else ""
            print(f"error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return argparse's parser with a module's docstring as its help, and no abbreviated flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[int]:
    """Hold the folder against other runs of `what`; yields the lock's file descriptor.

    Whoever holds the descriptor holds the lock, so a child that has it outlives a killed parent with the folder shut.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another {what}, or a command that one left behind, is at work in {folder}: wait for it, or give "
                "another folder"
            ) from None
        yield file.fileno()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; a cell is written with `str`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def note(text: str) -> None:
    """Say something that is no error, beside what a command prints."""
    print(f"note: {text}", file=sys.stderr)


def positive(text: str) -> int:
    """A type for argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def torchrun(processes: int) -> list[str]:
    """Return the words that go before a script to start it in several processes; none for one process."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []


def run_command(
    words: Iterable[object],
    *,
    processes: int = 1,
    quiet: bool = False,
    lock: int | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run `python WORDS` in the repository's root and wait for its end. Return what it printed, if `quiet`.

    The command never outlives this one: Ctrl-C, or any other exception here, ends it first. A training that is ended
    writes a checkpoint. Several processes are started by torchrun and share the CPU's cores. `env` is added to the
    environment, and the command inherits the descriptor `lock` of `locked`.

    Raises:
        ChildProcessError: a quiet command failed. The message holds its error.
        SystemExit: another command failed and has said why. The code is its own, or 128 + the number of a signal.
    """
    words = list(map(str, words))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    process = subprocess.Popen(
        [sys.executable, *torchrun(processes), *words],
        cwd=ROOT,
        env={**threads, **os.environ, **(env or {})},
        pass_fds=() if lock is None else (lock,),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    try:
        printed, told = process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.returncode and quiet:
        lines = [line for line in told.splitlines() if line.strip()] or ["it printed no error"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise ChildProcessError(f"cannot run {' '.join(words)}: {reason.removeprefix('error: ')}")
    if process.returncode:
        raise SystemExit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    return printed


def environment() -> dict:
    """What a result depends on beside its config: date (UTC), git hash, device, versions. None where unknown."""

    def git_hash() -> str:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()

    def device() -> str:
        if torch.cuda.is_available():
            return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"

    libraries = ("torch", "transformers", "accelerate", "safetensors", "datasets", "tokenizers", "peft")
    versions = {name: functools.partial(importlib.metadata.version, name) for name in libraries}
    facts = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version()}
    for key, find in {"git": git_hash, "device": device, **versions}.items():
        facts[key] = None
        with contextlib.suppress(Exception):  # a note beside a result must not cost the result
            facts[key] = find()
    return facts


def sentence(error: Exception) -> str:
    """What went wrong in one line, with the error's type where its text was not written for users."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
