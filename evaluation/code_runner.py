"""Run a program that a model wrote in a process of its own, and say whether it ended without an error.

    run([program, ...]) -> why it failed, or "" if it passed

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


@functools.cache
def isolated() -> bool:
    """Return whether programs run without network here, and cannot outlive the process that runs them."""
    try:
        return subprocess.run([*ISOLATE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def run(programs: list[str], limits: Limits = DEFAULT_LIMITS) -> str:
    """Run the first of `programs` that is valid Python, and return in one line why it failed.

    It passes if it reaches its last line without an error. "" is returned then.
    """
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
            return f"not done after {limits.wall:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said, _, reason = output.read(300).decode(errors="replace").partition(" ")
    return " ".join(reason.split()) if said == token else "ended before its last line, or was ended by a limit"


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
        program = next(filter(_is_valid, programs), programs[-1])
        exec(compile(program, "<program>", "exec"), module.__dict__)
    except BaseException as error:
        reason = f" {type(error).__name__}:"
        with contextlib.suppress(BaseException):  # the program wrote the error's __str__ too
            reason += f" {error}"[:300]
    write(output, f"{token}{reason}".encode(errors="replace"))
    leave(0)


def _is_valid(program: str) -> bool:
    try:
        return bool(compile(program, "<program>", "exec"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


if __name__ == "__main__":
    _child()
