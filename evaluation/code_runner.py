"""Run a program that a model wrote in a process of its own, and say whether it ended without an error.

    run([program, ...]) -> Outcome(passed, reason)

The process gets an empty temporary folder to work in, the standard library, an environment without keys, no input, and
limits on the clock, CPU time, memory, file size and number of processes. Where Linux allows it (`unshare`), it has no
network, and all that it started ends with it.

What this does not contain. It is not a sandbox: a program can read and write every file that you can, and where
`isolated()` is False it has your network. The limits hold for each process, and root may start any number of processes.
A program that looks for it can find out how success is reported. Run code that you have reason to fear in a container
or a virtual machine without secrets.
"""

import contextlib
import functools
import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
import types
from typing import NamedTuple

ISOLATE = ("unshare", "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")


class Limits(NamedTuple):
    """Seconds on the clock, seconds of CPU, MB of address space, and MB of a file."""

    wall: float = 30  # three times the CPU's, for programs that share a core
    cpu: int = 10
    memory_mb: int = 1024
    file_mb: int = 4


DEFAULT_LIMITS = Limits()


class Outcome(NamedTuple):
    """Whether a program passed, and in one line why not."""

    passed: bool
    reason: str


@functools.cache
def isolated() -> bool:
    """Return whether programs run without network here, and cannot outlive the process that runs them."""
    try:
        return subprocess.run([*ISOLATE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def run(programs: list[str], limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run the first of `programs` that is valid Python. It passes if it reaches its last line without an error."""
    token = secrets.token_hex(16)  # the program does not know it, so it cannot claim success by chance
    prefix = ISOLATE if isolated() else ()
    with (
        tempfile.TemporaryDirectory(prefix="code.", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,
    ):
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        process = subprocess.Popen(
            [*prefix, sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)], cwd=folder, env=environment,
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps([programs, token, limits]).encode(), timeout=limits.wall)
        except subprocess.TimeoutExpired:
            return Outcome(False, f"not done after {limits.wall:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said, _, reason = output.read(1000).decode(errors="replace").partition(" ")
    if said != token:
        return Outcome(False, "ended before its last line, or was ended by a limit")
    return Outcome(not reason, reason)


def _child() -> None:
    """Run the program that stdin holds, then write the token and, after a blank, what went wrong."""
    programs, token, (_, cpu, memory_mb, file_mb) = json.load(sys.stdin)
    output = os.dup(1)
    with open(os.devnull, "r+b") as null:
        os.dup2(null.fileno(), 0)
        os.dup2(null.fileno(), 1)
    sizes = {"CPU": cpu, "AS": memory_mb * 2**20, "FSIZE": file_mb * 2**20, "CORE": 0, "NPROC": 0}
    for name, size in sizes.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that lacks one has the others
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (size, size))
    write, leave = os.write, os._exit
    module = sys.modules["program"] = types.ModuleType("program")  # dataclasses look it up
    reason = ""
    try:
        while len(programs) > 1 and not _is_valid(programs[0]):
            del programs[0]
        exec(compile(programs[0], "<program>", "exec"), module.__dict__)
    except BaseException as error:
        reason = f" {_sentence(error)}"
    write(output, f"{token}{reason}".encode(errors="replace"))
    leave(0)


def _is_valid(program: str) -> bool:
    try:
        return bool(compile(program, "<program>", "exec"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _sentence(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
    except BaseException:  # the program wrote the error's __str__ too
        return "an error"


if __name__ == "__main__":
    _child()
