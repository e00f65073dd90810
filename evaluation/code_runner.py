"""Runs a program that a model wrote, in a process with limits, and says whether it came to its end without an error.

    run([program, ...]) -> Outcome(passed, reason, fence)

What holds it, from the outside in:

    this process        reads one line of result, and kills the whole process group after `wall` seconds
    -> a child          an empty temporary folder as working folder and HOME, a bare environment (no keys), no input,
                        output thrown away; where Linux allows it, namespaces of its own (user, processes, IPC, and a
                        network without a device), so that nothing outside can be reached or signalled
       -> the program   limits of CPU time, memory, file size and open files, and no new processes (but see below);
                        Landlock, where Linux has it: the kernel refuses files outside the folder and the libraries,
                        and TCP; an audit hook, which refuses the same in Python, and any socket, process, signal and
                        ctypes, and lets the program write so many files and no more

The child is this file, run as a script by `python -I -S -B`: the standard library and nothing else can be imported.
`Outcome.fence` names the layers that depend on the machine and were there ("namespaces", "landlock").

It is a fence, not a sandbox. It contains mistakes: endless loops, memory, output, processes, deleted files. It is not
made for an attacker: an audit hook can be got around from inside Python, a program can find out how its result is
reported, the kernel's other interfaces stay open, and RLIMIT_NPROC does not count the processes of root. Without
namespaces and Landlock the hook is all that keeps a program from the network and from files. For code you have reason
to fear take a container or a virtual machine without secrets.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

if __name__ == "__main__":  # the child
    import ctypes
    import resource
    import types


class Limits(NamedTuple):
    """Seconds on the clock and of CPU, MB of address space, MB of a file, and files that may be written."""

    wall: float = 30  # three times the CPU's: a program that shares a core need not be late
    cpu: int = 10
    memory_mb: int = 1024
    file_mb: int = 4
    files: int = 50


class Outcome(NamedTuple):
    """Did it pass, why not (one line, "" where it did), and the layers of the fence that the machine allowed."""

    passed: bool
    reason: str
    fence: list[str]


_USUAL = Limits()
_LONGEST = 65536  # bytes of a result that are read


def run(programs: list[str], limits: Limits = _USUAL) -> Outcome:
    """Run the first of `programs` that is Python at all; it passes where it reaches its last line without an error."""
    token = secrets.token_hex(16)  # a program that writes to the pipe does not know it
    reader, writer = os.pipe()
    with (
        tempfile.TemporaryDirectory(prefix="code.", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as source,
    ):
        folder = os.path.realpath(folder)
        work = {"programs": programs, "token": token, "pipe": writer, "folder": folder, "limits": limits._asdict()}
        source.write(json.dumps(work).encode())
        source.seek(0)
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__)],
            stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=folder, env=environment, pass_fds=[writer], start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        try:
            line = _read(reader, time.monotonic() + limits.wall)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _read(reader, time.monotonic() + 5)  # ends once no process holds the other end
            os.close(reader)
    if line is None:
        return Outcome(False, f"not done after {limits.wall:g} s", [])
    try:
        result = json.loads(line)
        if result["token"] == token:
            return Outcome(result["passed"], result["reason"], result["fence"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return Outcome(False, "ended before its end, or was killed at a limit", [])


def _read(reader: int, deadline: float) -> bytes | None:
    """What comes before a line break, the end, or too much; None where none of them came by `deadline`."""
    found = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                part = os.read(reader, _LONGEST)
                found += part
                if not part or b"\n" in part or len(found) > _LONGEST:
                    return found
    return None


# ------------------------------------------------------------------------------------------------ the child

_NEW_SPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000  # CLONE_NEWUSER, NEWNET, NEWPID, NEWIPC
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# Landlock's rights by bit: execute 0, write_file 1, read_file 2, read_dir 3, then those that change a folder; the
# second version adds refer 13, the third truncate 14
_SYSTEM = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache"]  # what libraries link to


def _landlock(libc, writable: str, readable: list[str]) -> bool:
    """Let the kernel refuse this process all other files, TCP, and signals to others; False where it cannot."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    files = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    handled = [files, *([0b11] if version >= 4 else []), *([0b11] if version >= 6 else [])]  # files, network, scopes
    ruleset = libc.syscall(444, (ctypes.c_uint64 * len(handled))(*handled), ctypes.c_size_t(8 * len(handled)), 0)
    for path in [writable, os.devnull, *readable]:
        rights = files & ~1 if path == writable else 0b110 if path == os.devnull else 0b1101
        rights &= 0b110 if not os.path.isdir(path) else files
        opened = os.open(path, os.O_PATH)
        rule = rights.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
        if libc.syscall(445, ruleset, 1, ctypes.c_char_p(rule), 0):
            return False
        os.close(opened)
    done = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _limit(limits: dict) -> None:
    sizes = {
        "RLIMIT_CPU": limits["cpu"],
        "RLIMIT_AS": limits["memory_mb"] << 20,
        "RLIMIT_FSIZE": limits["file_mb"] << 20,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    for name, size in sizes.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a system that lacks one has the others
            resource.setrlimit(getattr(resource, name), (size, size))


# by the beginning of an audit event's name
_REFUSED = (
    "socket.", "ctypes.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.kill",
    "os.startfile", "pty.", "signal.pthread_kill", "resource.", "gc.get_", "sys.remote_exec", "syslog.", "winreg.",
)  # fmt: skip
_READING = ("os.listdir", "os.scandir", "os.chdir", "os.getxattr", "os.listxattr")
_WRITING = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.chflags", "os.utime", "os.setxattr", "os.removexattr", "os.lchmod", "os.lchown", "sqlite3.connect", "dbm.",
)  # fmt: skip
_OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _hook(folder: str, library: list[str], files: int):
    """An audit hook that refuses files outside `folder` and, to read, `library`, and more than `files` changes."""
    realpath, isdir, fsdecode, sep = os.path.realpath, os.path.isdir, os.fsdecode, os.sep
    left = [files]

    def inside(path: object, places: list[str]) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return True  # a file that is open already
        real = realpath(fsdecode(path))
        return any(real == place or real.startswith(place + sep) for place in places)

    def hook(event: str, args: tuple) -> None:
        places = [folder, *library]
        if event == "open":
            path, _, flags = args
            writes = bool(flags & _OPENED_TO_WRITE) and path != os.devnull
            paths = [path]
            if not writes and isinstance(path, (str, bytes, os.PathLike)) and isdir(path):
                places = [folder]  # what is named relative to an open folder looks as if it were in the working folder
        elif event.startswith(_WRITING):
            writes, paths = True, list(args)
        elif event in _READING:
            writes, paths = False, [args[0] if args else None]
        elif event.startswith(_REFUSED):
            raise PermissionError(f"not allowed here: {event}")
        else:
            return
        if not all(inside(path, [folder] if writes else places) for path in paths):
            raise PermissionError(f"not allowed here: {event} outside the working folder")
        if writes:
            left[0] -= 1
            if left[0] < 0:
                raise PermissionError(f"not allowed here: more than {files} files written")

    return hook


def _child() -> None:
    work = json.loads(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fence = []
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if libc.unshare(_NEW_SPACES) == 0:
            fence.append("namespaces")
    if inner := os.fork():  # the first process of its namespace: with it everything in there ends
        os.close(work["pipe"])
        os.waitpid(inner, 0)
        return
    library = sorted({os.path.realpath(p) for p in [*sys.path, os.path.dirname(os.__file__)] if os.path.exists(p)})
    if libc:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if fence:  # the capabilities that came with the namespace
            libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        linked = [path for path in [*_SYSTEM, os.path.join(sys.base_prefix, "lib")] if os.path.exists(path)]
        if _landlock(libc, work["folder"], [*library, *linked]):
            fence.append("landlock")
    _limit(work["limits"])
    program, passed, reason = None, False, ""
    for text in work["programs"]:
        try:
            program = compile(text, "<program>", "exec")
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = reason or _sentence(error)
    module = sys.modules["program"] = types.ModuleType("program")  # dataclasses and pickle look it up
    dumps, write, leave = json.dumps, os.write, os._exit
    if program:
        try:
            sys.addaudithook(_hook(work["folder"], [*library, os.devnull], work["limits"]["files"]))
            exec(program, module.__dict__)
            passed, reason = True, ""
        except BaseException as error:
            reason = _sentence(error)
    result = {"token": work["token"], "passed": passed, "reason": reason, "fence": fence}
    write(work["pipe"], dumps(result).encode() + b"\n")
    leave(0)


def _sentence(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(": ")
    except BaseException:  # its text is the program's, too
        return "an error"


if __name__ == "__main__":
    _child()
