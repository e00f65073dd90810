"""Write files whole or not at all, read JSON lines, list checkpoints, and suggest the nearest known name or package."""

import codecs
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

UMASK = os.umask(0)  # read once: reading it sets it for a moment, which other threads would see
os.umask(UMASK)


def check_output(path: str | Path, folder: bool = False) -> None:
    """Raise ValueError if no file (or folder) can be written to `path`. Call this before hours of work."""
    path = Path(path)
    cause, place = None, next(place for place in path.absolute().parents if place.exists())
    if folder and path.is_symlink() and not path.exists():
        cause = "it is a link that leads nowhere"
    elif path.exists() and path.is_dir() != folder:
        cause = f"it is a {'file' if folder else 'folder'}"
    elif path.is_fifo() and path.resolve().exists():  # /dev/stdout and >(command) are pipes without a name
        cause = "it is a pipe, which nobody may read"
    elif not (place.is_dir() and os.access(place, os.W_OK)):
        cause = f"{place} is not a writable folder"
    if cause:
        raise ValueError(f"cannot write {path}: {cause}. Give another path.")


@contextlib.contextmanager
def atomic_path(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Yield a path to write a file (or a folder) to. On success it becomes `path`, on failure it is removed.

    The yielded path has the name of `path` and lies in a hidden folder beside it. So a killed run leaves nothing that
    looks like an output. If `path` is a folder, it must be empty. A pipe or a device is yielded itself.

    Raises:
        ValueError: nothing can be written there.
    """
    path = Path(path)
    check_output(path, folder)
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as hidden:
        temporary = Path(hidden, path.name)
        yield temporary
        set_modes(temporary)
        os.replace(temporary, path)


def set_modes(path: Path) -> None:
    """Give a file, or the files in a folder, the permissions of the umask. safetensors gives fewer."""
    for file in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if file.is_file() and not file.is_symlink() and file.stat().st_nlink == 1:
            file.chmod(0o666 & ~UMASK)


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


@contextlib.contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Say in an error about the content of `path` that this cannot be used.

    A key that is missing, a value of another type and a number out of range become a ValueError, too.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from error
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot use {path}: it does not hold what it should ({reason}). Make it again.") from error


def check_file(path: str | Path) -> None:
    """Raise FileNotFoundError unless `path` is a file. A pipe could be waited for forever, and a device has no end."""
    if not Path(path).is_file():
        what = f"no such file{suggest_path(path)}"
        if Path(path).exists():
            what = f"it is not a file, but a {'folder' if Path(path).is_dir() else 'pipe or a device'}"
        raise FileNotFoundError(f"cannot read {path}: {what}.")


def read_json(path: str | Path, *keys: str) -> dict:
    """Return the object in a JSON file, which has `keys`. A ValueError names the file, and a key that is repeated."""
    check_file(path)
    try:
        value = _loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: not valid JSON ({error}). Make it again, or move it away.") from error
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {path}: an object is expected, found {type(value).__name__}. Move it away.")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"cannot read {path}: it has no {missing[0]!r}, so another program wrote it. Move it away.")
    return value


def _loads(text: str, **options) -> object:
    value = json.loads(text, **options)
    if "\\ud" in text.lower():
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but it is not text
    return value


def unique_keys(pairs: Iterable[tuple[str, object]]) -> dict:
    """Return a dict of (key, value) pairs. Raise ValueError for a key that is there twice."""
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return dict(pairs)


def parse_json(text: bytes | str, path: str | Path, line: int) -> object:
    """Return what JSON says. A ValueError names the file and the line of a fault in a text that begins at `line`."""
    try:
        return _loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
            reason = f"{error.msg.removesuffix(' at')} at column {error.colno}"
        raise ValueError(f"{path}:{line}: not valid JSON ({reason})") from error


def read_jsonl(path: str | Path) -> list[dict]:
    """Return the objects of JSON lines, or of the array in a .json file. A ValueError names the file and a bad line.

    Blank lines are skipped.
    """
    check_file(path)
    path, found = Path(path), []
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if path.suffix == ".json" and content.lstrip().startswith(b"["):
        rows = ((f"{path}: row {number}", row) for number, row in enumerate(parse_json(content, path, 1), 1))
    else:  # only \n ends a line: str.splitlines would cut inside a string
        lines = ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())
        rows = ((f"{path}:{number}", parse_json(line, path, number)) for number, line in lines)
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
        found.append(row)
    return found


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of a file, or of several, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        check_file(path)
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a run's folder, oldest first. Copies with names of their own are not among them."""
    return sorted((p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` with the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(str(word), [str(k) for k in known], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def suggest_path(path: str | Path) -> str:
    """Return what to add to "no such file": what stands there instead, or a `suggest` for the part that is missing."""
    missing = next((part for part in [*reversed(Path(path).parents), Path(path)] if not part.exists()), None)
    if missing is None:
        return "" if Path(path).is_file() or Path(path).is_dir() else " (it is a pipe or a device)"
    if missing.is_symlink():
        return f" ({missing} is a link that leads nowhere)"
    if not missing.parent.is_dir():
        return ""
    return suggest(missing.name, (beside.name for beside in missing.parent.iterdir()))


def import_extra(module: str, extra: str):
    """Import a module of an optional dependency. Raises ValueError with the way to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        hint = f"pip install -e '.[{extra}]' -c constraints.txt in a clone, pip install {package} elsewhere"
        raise ValueError(f"cannot import {module}: {error}. Install what is missing: {hint}") from error
