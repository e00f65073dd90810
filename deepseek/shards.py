"""The safetensors files of a checkpoint: which of them are read, and single tensors in them.

Tensors, and single experts of them, are read and overwritten in place (`Shard`), with little in memory at once.
"""

import contextlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from deepseek.files import check_file, named, read_json, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")  # of weights that are not quantized, as safetensors names them
TORCH_DTYPES = dict(zip(DTYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))
TORCH_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: the name of its file, and what the header of that file says of it."""

    file: str
    dtype: str
    shape: list[int]


def stored_tensors(base: Path, files: Iterable[str] | None = None) -> dict[str, Stored]:
    """Return the tensors of `files` in a folder by key, by default of its checkpoint. Only the headers are read.

    Where a single file and an index are both there, transformers reads the single file, and so does this.
    """
    stored = {}
    for name in sorted(weight_files(base) if files is None else files):
        with Shard(base / name) as shard:
            stored |= {key: Stored(name, entry["dtype"], entry["shape"]) for key, entry in shard.header.items()}
    return stored


def weight_files(base: Path) -> set[str]:
    """Return the names of the safetensors files of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder has no weights in this format.
        ValueError: the index is damaged, or names a file outside the folder.
    """
    if (base / WEIGHTS).is_file():
        if (base / INDEX).is_file():
            warnings.warn(f"{base} holds {WEIGHTS} and {INDEX}. {WEIGHTS} is read, the index is not.", stacklevel=1)
        return {WEIGHTS}
    if (base / INDEX).is_file():
        return files_of_index(base / INDEX)
    raise FileNotFoundError(f"cannot read {base}: neither {WEIGHTS} nor {INDEX} in it. Save it as safetensors.")


def files_of_index(index: Path) -> set[str]:
    """Return the files that an index names, relative to its folder. Raise ValueError if one is not below it."""
    if not (files := read_json(index).get("weight_map")):
        raise ValueError(f"cannot read {index}: it has no weight_map. Fetch it again.")
    with named(index):
        names = {os.path.normpath(name) for name in files.values()}
    if outside := [name for name in names if name.startswith((os.pardir, os.sep))]:
        raise ValueError(f"cannot read {index}: it names {outside[0]}, which is not in its folder. Fetch it again.")
    return names


class Shard:
    """A safetensors file. Its tensors, and single experts of them, are read and overwritten in place.

    It begins with 8 bytes that say how long a JSON header is. The header and the bytes of the tensors follow. A tensor
    may begin at any byte. `header` maps names to {"dtype", "shape", "data_offsets"}.
    """

    def __init__(self, path: Path, mode: str = "rb"):
        try:
            check_file(path)
            with safe_open(path, "pt"):  # checks that all of it is there
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cannot read {path}: missing, damaged or truncated ({error}). Fetch it again.") from error
        self.path = path
        self.file = open(path, mode)  # noqa: SIM115 (__exit__ closes it)
        size = int.from_bytes(self.file.read(8), "little")
        self.header = json.loads(self.file.read(size))
        self.header.pop("__metadata__", None)
        self.start = 8 + size

    def __enter__(self) -> "Shard":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def _seek(self, key: str, row: int | None) -> tuple[list[int], torch.dtype]:
        """Go to where a tensor, or a row of it, begins. Return its shape and dtype."""
        entry = self.header[key]
        shape, dtype, start = entry["shape"], TORCH_DTYPES[entry["dtype"]], self.start + entry["data_offsets"][0]
        if row is not None:
            shape = shape[1:]
            start += row * math.prod(shape) * dtype.itemsize
        self.file.seek(start)
        return shape, dtype

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Return a copy of a tensor, or of one row of it."""
        shape, dtype = self._seek(key, row)
        data = bytearray(math.prod(shape) * dtype.itemsize)
        self.file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def read_bytes(self, key: str, start: int, count: int) -> bytes:
        """Return the bytes of `count` entries of a tensor of any dtype, from entry `start` on."""
        begin, end = self.header[key]["data_offsets"]
        width = (end - begin) // max(1, math.prod(self.header[key]["shape"]))
        self.file.seek(self.start + begin + start * width)
        return self.file.read(count * width)

    def write(self, key: str, tensor: Tensor, row: int | None = None) -> None:
        """Overwrite a tensor, or one row of it, with one of the same shape and dtype."""
        self._seek(key, row)
        self.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def check_quantization(base: Path, method: str | None) -> None:
    """Raise ValueError if the weights of a folder are not quantized as its config says (`method`, or not at all).

    transformers would read other numbers in silence: quantized ones without their scales, or ones rounded anew.
    """
    if not any((base / name).is_file() for name in (WEIGHTS, INDEX)):
        if (base / TORCH_INDEX).is_file():  # of torch's own files, which transformers reads without running code
            files_of_index(base / TORCH_INDEX)
        return
    stored = stored_tensors(base)
    weights = {
        key: stored[key].dtype for key in sorted(stored) if re.search("weight|_proj", key) and "scale" not in key
    }
    packed = [key for key, dtype in weights.items() if dtype not in DTYPES]
    in_fp8 = [key for key in packed if weights[key].startswith("F8")]
    unscaled = [key for key in in_fp8 if not any(name in stored for name in scale_names(key))]
    cause = None
    if method and not packed:
        cause = f"it is quantized as {method} by its config.json, but not its weights. Remove quantization_config there"
    elif packed and not method:
        cause = f"{packed[0]} is quantized ({weights[packed[0]]}), but config.json does not say how. Fetch it again"
    elif method == "fp8" and unscaled:
        cause = f"{unscaled[0]} is quantized as fp8, but its scales are missing. Fetch it again"
    if cause:
        raise ValueError(f"cannot load model {str(base)!r}: {cause}.")


def scale_names(key: str) -> list[str]:
    """Return the names that transformers takes for the scales of the weight `key`."""
    return [f"{key}_scale_inv", *(key.removesuffix("weight") + name for name in ("scale", "qscale_weight"))]


@contextlib.contextmanager
def readable_index(base: str | Path) -> Iterator[str | Path]:
    """Yield a model's folder or hub id, or links to its files and another index where its own lacks `metadata`.

    transformers asks for `metadata` and makes no use of it that matters here.
    """
    here = Path(base).exists()
    index = Path(base, INDEX) if here else cached_file(str(base), INDEX, _raise_exceptions_for_missing_entries=False)
    single = Path(base, WEIGHTS).is_file() or index is None or not Path(index).is_file()
    if single or isinstance((content := read_json(index)).get("metadata"), dict):
        yield base
        return
    if not here:
        base = snapshot_download(str(base), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"])
    with tempfile.TemporaryDirectory() as folder:
        for file in Path(base).iterdir():
            if file.name != INDEX:
                Path(folder, file.name).symlink_to(file.resolve())
        write_json(Path(folder, INDEX), {**content, "metadata": {}})
        yield folder


def read_tensor(base: Path, stored: Mapping[str, Stored], key: str) -> Tensor:
    """Return a copy of a tensor of a checkpoint."""
    with Shard(base / stored[key].file) as shard:
        return shard.read(key)


def reserve(path: Path, entries: dict[str, tuple[str, list[int]]]) -> None:
    """Write a safetensors file of zeros for `Shard.write` to fill. `entries` are the (dtype, shape) of its tensors."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    # the widest numbers first, so that each tensor lies at a multiple of its numbers' size
    for name in sorted(entries, key=lambda name: (-TORCH_DTYPES[entries[name][0]].itemsize, name)):
        dtype, shape = entries[name]
        size = TORCH_DTYPES[dtype].itemsize * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
