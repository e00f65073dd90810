"""Shared by the commands: flags, errors in one sentence, locks, child commands, and the environment of a result."""

import argparse
import contextlib
import fcntl
import functools
import importlib.metadata
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from deepseek.files import suggest

ROOT = Path(__file__).resolve().parent
PYTHON = sys.executable.removeprefix(f"{Path.cwd()}/")  # as it is typed here
AUTO_DTYPE = "as stored, but float32 on a CPU without instructions for bfloat16"  # see evaluation/workers.py


def run_cli(main: Callable[[], object]) -> None:
    """Run a command and turn the errors that a user can cause into `error: <sentence>` on stderr and exit code 2.

    These are ValueError, OSError, a missing library and a GPU without memory. Under torchrun the sentence names its
    rank. An error that all ranks share (its attribute `shared`) is printed once per node. Ctrl-C exits with 130, and a
    closed pipe (`| head`) with 141. The environment variable ESFT_DEBUG keeps the traceback. A warning is one line.
    """
    warnings.formatwarning = one_line
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
            print(f"error: {who}{reason_of(error)}", file=sys.stderr)
        sys.exit(2)


def one_line(message: Warning | str, *_: object, **__: object) -> str:
    """Return a warning without the file and the line that it comes from."""
    return f"warning: {message}\n"


def reason_of(error: Exception) -> str:
    """Return an error's text in one line. The system's own errors name a file, but not what cannot be done."""
    text = str(error)
    if isinstance(error, shutil.Error):  # of several files
        source, _, cause = error.args[0][0]
        text = f"cannot copy {source:.200}: {cause:.200}"
    elif isinstance(error, OSError) and error.filename is not None:
        text = f"cannot use {error.filename!s:.200}: {error.strerror}"
    return " ".join(text.split())


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
def locked(output: str | Path) -> Iterator[int | None]:
    """Own a file or a folder that is written, in a `with` block. Yield the lock's file descriptor.

    The lock is a hidden file beside `output`. It ends with this process, even if that is killed. Forks do not keep it,
    but a command that inherits the descriptor does. A pipe or a device has no lock: None is yielded.

    Raises:
        ValueError: another process owns it. The message names that process.
    """
    output = Path(output).resolve()
    if output.exists() and not (output.is_file() or output.is_dir()):
        yield None
        return
    path = output.with_name(f".{output.name}.lock")
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while (file := _lock(path, output)) is None:
        pass
    os.register_at_fork(after_in_child=file.close)
    try:
        file.truncate(0)
        file.write(f"{Path(sys.argv[0]).name}, process {os.getpid()} on {platform.node()}")
        file.flush()
        yield file.fileno()
    finally:
        path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):  # a folder that is no longer empty
            for folder in made:
                folder.rmdir()


def _lock(path: Path, output: Path) -> IO | None:
    """Return the locked file at `path`; None if its owner removed it meanwhile."""
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        with file:
            raise ValueError(
                f"cannot write {output}: another run is at work there ({file.read()}, or a command that it started). "
                "Wait for its end, or give another path."
            ) from None
    except OSError as error:  # some file systems of clusters have no locks
        note(f"{path} cannot be locked ({error.strerror}): start no second run in {output}")
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
    file.close()
    return None


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; a cell is written with `str`."""
    lines = [f"| {' | '.join(map(str, line))} |" for line in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def counted(count: int, what: str) -> str:
    """Return "1 pack", or "2 packs"."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def split_names(text: str) -> list[str]:
    """Return the names between commas, without blanks around them and without empty ones."""
    return [name.strip() for name in text.split(",") if name.strip()]


def size(nbytes: float) -> str:
    """Return "1.25 GiB", or "300.10 MiB" for less than 1 GiB."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.2f} MiB"


def note(text: str) -> None:
    """Print a remark on stderr, beside the output of a command; under torchrun, from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


class _Print(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode():  # a progress bar gives way to the line
            print(record.getMessage(), flush=True)


def log_to_stdout(rank: int) -> None:
    """Print what the logger "esft" is told, as bare lines on stdout, from rank 0 alone."""
    logger = logging.getLogger("esft")
    logger.handlers = [_Print()]
    logger.setLevel(logging.WARNING if rank else logging.INFO)


def positive(text: str) -> int:
    """Convert a flag to a whole number above 0, as argparse's `type`."""
    return _whole(text, 1, 2**31, "above 0 and below 2**31")


def seed_number(text: str) -> int:
    """Convert a flag to a whole number from 0 that every generator takes, as argparse's `type`."""
    return _whole(text, 0, 2**32, "from 0 and below 2**32")


def _whole(text: str, least: int, end: int, bounds: str) -> int:
    if not (text.isdecimal() and len(text) < 20 and least <= int(text) < end):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number {bounds}")
    return int(text)


def flag_words(**flags: object) -> list[str]:
    """Return `--name=value` for each flag; nothing for one that is None or False, and `--name` for one that is True."""
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


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
    text = reason_of(error)
    return text if text and isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
