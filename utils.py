"""What every command shares: arguments, errors in one sentence, whole files or none, what a result was made with."""

import argparse
import codecs
import contextlib
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
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


class Parser(argparse.ArgumentParser):
    """argparse's, for a module's docstring: no abbreviated flags, required ones marked as such in the help, and a wrong
    flag is one sentence and exit code 2."""

    def __init__(self, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def add_argument(self, *names, **options):
        if options.get("required"):
            options["help"] += " (required)"
        return super().add_argument(*names, **options)

    def parse_args(self, args=None, namespace=None):
        self._check_flags(args)
        return super().parse_args(args, namespace)

    def parse_intermixed_args(self, args=None, namespace=None):
        self._check_flags(args)
        return super().parse_intermixed_args(args, namespace)

    def _check_flags(self, args: list[str] | None) -> None:
        """Refuse an unknown flag before argparse does, which would first ask for the required one it may stand for."""
        for word in sys.argv[1:] if args is None else args:
            flag = word.partition("=")[0]
            if re.fullmatch(r"--?[a-zA-Z][\w-]*", flag) and flag not in self._option_string_actions:
                self.error(f"unrecognized flag {flag}{suggest(flag, self._option_string_actions)}")

    def has_flag(self, flag: str) -> bool:
        return flag in self._option_string_actions

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help explains the flags\n")


def check_output(path: str | Path, folder: bool = False) -> None:
    """Raise ValueError where no file (or folder) can be made at `path`, before hours of work are spent on it."""
    path = Path(path)
    if path.exists() and path.is_dir() != folder:
        raise ValueError(f"{path} cannot be written: it is a {'file' if folder else 'folder'}; give another path")
    place = next(place for place in path.absolute().parents if place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{path} cannot be written: {place} is no folder that may be written to; give another path")


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


@contextlib.contextmanager
def atomic_path(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A path to write a file to (or a folder), renamed to `path` on success and removed on failure; parents are made.

    It has the name of `path`, in a hidden folder beside it, so that a run killed here leaves nothing that looks like an
    output. A folder that is there must be empty; what is neither (/dev/null, a pipe) is yielded itself.

    Raises ValueError where nothing can be made there.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    check_output(path, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as hidden:
        temporary = Path(hidden, path.name)
        yield temporary
        set_modes(temporary)
        os.replace(temporary, path)


def set_modes(path: Path) -> None:
    """Give a file, or those in a folder, the permissions that the umask asks for, where safetensors gave fewer."""
    umask = os.umask(0)
    os.umask(umask)
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~umask)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: object) -> None:
    """Write `obj` as indented JSON, atomically."""
    write_text(path, json.dumps(obj, ensure_ascii=False, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file, blank lines skipped; a bad line is a ValueError that names file and line."""
    return [row for _, row in read_json_rows(Path(path))]


def read_json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """(where, object) of JSON lines, or of one array in a .json file."""

    def parse(text: bytes, line: int) -> object:
        try:
            value = json.loads(text)
            if b"\\ud" in text.lower():  # half of a surrogate pair: JSON allows it, a tokenizer or a file does not
                json.dumps(value, ensure_ascii=False).encode()
            return value
        except UnicodeEncodeError as error:
            raise ValueError(f"{path}:{line}: a broken character, {error.object[error.start]!r}: mend it") from error
        except json.JSONDecodeError as error:
            line += error.lineno - 1
            reason = error.msg.removesuffix(" at")
            raise ValueError(f"{path}:{line}: not valid JSON ({reason} at column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{line}: not UTF-8 text (byte {error.start})") from error

    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        rows = ((f"{path}: row {number}", row) for number, row in enumerate(parse(content, 1), 1))
    else:  # only \n ends a line: str.splitlines would cut inside a string
        lines = ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
        rows = ((f"{path}:{number}", parse(line, number)) for number, line in lines)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        yield where, row


def sha256(path: Path) -> str:
    """Of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def suggest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def suggest_path(path: str | Path) -> str:
    """`suggest` for the first part of a path that is not there, among what is beside it."""
    missing = next((part for part in [*reversed(Path(path).parents), Path(path)] if not part.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return ""
    return suggest(missing.name, (beside.name for beside in missing.parent.iterdir()))


def note(text: str) -> None:
    """Say something that is no error, beside what a command prints."""
    print(f"note: {text}", file=sys.stderr)


def positive(text: str) -> int:
    """A type for argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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
