"""Shared by the commands: flags, errors in one sentence, locks, child commands, and the environment of a result."""

import argparse
import contextlib
import fcntl
import functools
import importlib
import importlib.metadata
import logging
import os
import platform
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from deepseek.files import suggest

ROOT = Path(__file__).resolve().parent


def run_cli(main: Callable[[], object]) -> None:
    """Run a command and turn the errors that a user can cause into `error: <sentence>` on stderr and exit code 2.

    These are ValueError, OSError, a missing library and a GPU without memory. Under torchrun the sentence names its
    rank. An error that all ranks share (its attribute `shared`) is printed once per node. Ctrl-C exits with 130, and a
    closed pipe (`| head`) with 141. The environment variable ESFT_DEBUG keeps the traceback. A warning is one line.
    """
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit would fail again
        sys.exit(141)
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        if os.environ.get("ESFT_DEBUG"):
            raise
        shared, rank = getattr(error, "shared", False), os.environ.get("RANK")
        if not shared or os.environ.get("LOCAL_RANK", "0") == "0":
            who = f"rank {rank}: " if rank and not shared else ""
            print(f"error: {who}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class CommandParser(argparse.ArgumentParser):
    """A parser that reads `key=value` as `--key=value`, and `key=true` as the flag `--key`. An error is one line."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_args(self._with_dashes(args), namespace)

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        return super().parse_intermixed_args(self._with_dashes(args), namespace)

    def _with_dashes(self, words: Sequence[str] | None) -> list[str]:
        found = []
        for word in sys.argv[1:] if words is None else words:
            key, equals, value = word.partition("=")
            action = self._option_string_actions.get(flag := f"--{key.removeprefix('--')}") if equals else None
            if action is not None and action.nargs == 0 and value in ("true", "false"):
                found += [flag] * (value == "true")
            else:
                found.append(word if action is None else f"{flag}={value}")
        return found

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            words = message.split()[2:]
            names = [word.partition("=")[0] for word in words if "=" in word or word.startswith("--")] or words
            message = f"unrecognized arguments: {' '.join(names)}"  # not the values, as one may be a secret
            message += suggest(f"--{names[0].removeprefix('--')}", self._option_string_actions)
        self.exit(2, f"error: {message}. --help explains the flags.\n")


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with a module's docstring as its help, no abbreviated flags, and errors of one line."""
    return CommandParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[int]:
    """Lock `folder` against other runs of `what`, and yield the lock's file descriptor.

    A child process that inherits the descriptor keeps the lock, even after this process was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"cannot use {folder}: another {what}, or a command it started, is using it. Wait for it, or give "
                "another folder."
            ) from None
        yield file.fileno()


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; a cell is written with `str`."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def counted(count: int, what: str) -> str:
    """Return "1 pack", or "2 packs"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def note(text: str) -> None:
    """Print a remark on stderr, beside the output of a command; under torchrun, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


class _Print(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), flush=True)


def log_to_stdout(rank: int) -> None:
    """Print what the logger "esft" is told, as bare lines on stdout, from rank 0 alone."""
    logger = logging.getLogger("esft")
    logger.handlers = [_Print()]
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def positive(text: str) -> int:
    """Convert a flag to a whole number above 0, as argparse's `type`."""
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
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> str:
    """Run a script of the repository, the first of `words`, with the others. Return what it printed, if `quiet`.

    The command never outlives this one: Ctrl-C, or any other exception here, ends it first. A training that is ended
    writes a checkpoint. Several processes are started by torchrun and share the CPU's cores. `env` is added to the
    environment, and the command inherits the descriptor `lock` of `locked`.

    Raises:
        ChildProcessError: a quiet command failed. The message holds its error.
        SystemExit: another command failed and has said why. The code is its own, or 128 + the number of a signal.
    """
    words = list(map(str, words))
    script = ROOT / words[0]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else {}
    process = subprocess.Popen(
        [sys.executable, *torchrun(processes), script, *words[1:]],
        cwd=cwd,
        env={**threads, **os.environ, **(env or {})},
        pass_fds=() if lock is None else (lock,),
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    try:
        printed, told = process.communicate()
    finally:
        process.terminate()  # does nothing after the command has ended
        process.wait()
    if process.returncode and quiet:
        lines = [line for line in told.splitlines() if line.strip()] or ["it printed no error"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise ChildProcessError(f"cannot run {' '.join(words)}: {reason.removeprefix('error: ')}")
    if process.returncode:
        sys.exit(process.returncode if process.returncode > 0 else 128 - process.returncode)
    return printed


def import_extra(module: str, extra: str):
    """Import a module of an optional dependency. Raises ValueError with the way to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f"Install what is missing: pip install -e '.[{extra}]' -c constraints.txt"
        raise ValueError(f"cannot import {module}: {error}. {hint}") from error


def environment() -> dict:
    """Return what a result depends on beside its config: date (UTC), git hash, device, versions; None where unknown."""

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
        with contextlib.suppress(Exception):  # a missing fact must not cost the result
            facts[key] = find()
    return facts


def peak_memory_bytes() -> int:
    """Return the peak of this process so far: of the GPU where it was used, else of resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return torch.cuda.max_memory_allocated() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def sentence(error: Exception) -> str:
    """Return an error's text in one line, with its type where the text was not written for users."""
    text = " ".join(str(error).split())
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
