"""A checkpoint folder as it is stored: which file holds which tensor, and in what part of it a model's parameter lies.

Tensors, and single experts of them, are read and overwritten in place (`Shard`), so that little is in memory at once.

How a checkpoint spells an expert differs by family (DeepSeek's `mlp.experts.7.gate_proj`, Mixtral's
`block_sparse_moe.experts.7.w1`, gpt_oss's fused `mlp.experts.gate_up_proj`), and transformers knows it: it splits its
fused tensors again when it saves. So that is asked, and not written down once more. Fused tensors in miniature, each
entry of which is a different number, go through transformers' own reverse conversion, and where a number comes out is
where the expert's projection lives:

    gate_up_proj (E, 2F, D), entries 0, 1, 2, ...  ->  {"...experts.7.w1.weight": [[1260, 1261, ..], ..], ..}
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from deepseek.adapters import DTYPES, router_parameters
from deepseek.experts import LAYOUT_FLAGS, FusedExperts, MoELayer, moe_layers
from deepseek.loading import empty_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_DTYPES = dict(zip(DTYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))

Select = Callable[[Tensor], Tensor]  # the part of a tensor that a projection is, as a view

# --------------------------------------------------------------------------------------------------------------------
# files


def checkpoint_files(base: Path) -> dict[str, str]:
    """File of each tensor of a checkpoint folder."""
    if not (base / "config.json").is_file():
        raise FileNotFoundError(f"{base}: no config.json in it, so it is no model; give a checkpoint folder on disk")
    if (base / INDEX).is_file():
        try:
            files = json.loads((base / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = {key: str(name) for key, name in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{base / INDEX}: not an index of a checkpoint ({error!r})") from error
    elif (base / WEIGHTS).is_file():
        with Shard(base / WEIGHTS) as file:
            files = dict.fromkeys(file.header, WEIGHTS)
    else:
        raise FileNotFoundError(f"{base}: neither {WEIGHTS} nor {INDEX} in it; save the base as safetensors first")
    for name in sorted(set(files.values())):
        if not (base / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{base}: the shard {name} of its index is missing; fetch the base again")
    return files


def stored_shapes(base: Path, files: dict[str, str]) -> dict[str, list[int]]:
    """Shape of each tensor of a checkpoint folder."""
    headers = {}
    for name in sorted(set(files.values())):
        with Shard(base / name) as shard:
            headers[name] = shard.header
    for key, name in files.items():
        if key not in headers[name]:
            raise ValueError(f"{base}: {name} does not hold {key}, as its index says; fetch the base again")
    return {key: headers[name][key]["shape"] for key, name in files.items()}


class Shard:
    """A safetensors file whose tensors, or single experts of them, are read and overwritten in place.

    It begins with 8 bytes that say how long a JSON header is; then come the header and the tensors' bytes, which need
    not lie at a multiple of the size of their numbers. `header` maps names to {"dtype", "shape", "data_offsets"}.
    """

    def __init__(self, path: Path, mode: str = "rb"):
        try:
            with safe_open(path, "pt"):  # checks that all of it is there
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or truncated ({error}); fetch it again") from error
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
        """Go to where a tensor, or a row of it, begins; returns its shape and dtype."""
        entry = self.header[key]
        if entry["dtype"] not in TORCH_DTYPES:
            raise ValueError(f"{key} in {self.path} is stored as {entry['dtype']}, expected {', '.join(DTYPES)}")
        shape, dtype = entry["shape"], TORCH_DTYPES[entry["dtype"]]
        at = self.start + entry["data_offsets"][0]
        if row is not None:
            shape = shape[1:]
            at += row * math.prod(shape) * dtype.itemsize
        self.file.seek(at)
        return shape, dtype

    def read(self, key: str, row: int | None = None) -> Tensor:
        """A copy of a tensor, or of one row of it."""
        shape, dtype = self._seek(key, row)
        data = bytearray(math.prod(shape) * dtype.itemsize)
        self.file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def write(self, key: str, tensor: Tensor, row: int | None = None) -> None:
        """Overwrite a tensor, or one row of it, with one of the same shape and dtype."""
        self._seek(key, row)
        self.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def reserve(path: Path, entries: dict[str, tuple[str, list[int]]]) -> None:
    """Write a safetensors file of zeros, with tensors of these (dtype, shape), for `Shard.write` to fill."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    size = {name: TORCH_DTYPES[dtype].itemsize * math.prod(shape) for name, (dtype, shape) in entries.items()}
    # the widest numbers first, so that each tensor lies at a multiple of its numbers' size
    for name in sorted(entries, key=lambda name: (-TORCH_DTYPES[entries[name][0]].itemsize, name)):
        dtype, shape = entries[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size[name]]}
        at += size[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def copy_file(source: Path, target: Path, hard_link: bool) -> None:
    """Copy a file, or make a second name for it where that can be."""
    if hard_link:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source.resolve(), target)
            return
    shutil.copyfile(source, target)


# --------------------------------------------------------------------------------------------------------------------
# the model that is stored


def open_base(base: Path) -> tuple[nn.Module, dict[str, str]]:
    """(model without weights but its routers', file of each tensor) of a checkpoint folder."""
    files = checkpoint_files(base)
    model = meta_model(base, files)
    load_routers(model, base, files)
    return model, files


def meta_model(base: Path, files: Iterable[str]) -> nn.Module:
    """The model of a folder's config.json, without weights, that reverts names as they are in its checkpoint `files`.

    transformers notes while it loads a checkpoint which of its conversions that needed (a prefix that a model of images
    and text has before its language model, experts by themselves), and when it saves reverts those. So does this.

    Raises:
        ValueError: the model is quantized, or transformers cannot build it.
    """
    model = empty_model(base)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"model {base} is quantized: merge into its unquantized form")
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = model.state_dict()
    for key in files:
        rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    model._weight_conversions = [one for one in conversions if one.was_used()]
    return model


def load_routers(model: nn.Module, base: Path, files: dict[str, str]) -> None:
    """Give the model without weights those of its routers, for the fingerprint."""
    for name in router_parameters(model):
        key = ordinary_keys(model, name, files)[0]
        with Shard(base / files[key]) as file:
            value = nn.Parameter(file.read(key), requires_grad=False)
        module_name, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, value)


# --------------------------------------------------------------------------------------------------------------------
# where in it parameters are


@dataclass(frozen=True)
class Place:
    """Where a projection is in a checkpoint: a part of the tensor `key`, or of its row `row` (the expert)."""

    key: str
    row: int | None
    select: Select

    def shape(self, stored: list[int]) -> torch.Size:
        """Of this part, where the tensor has the shape `stored`."""
        if self.row is not None and self.row >= stored[0]:
            raise ValueError(f"{self.key} of the base has shape {tuple(stored)}, so it has no expert {self.row}")
        tensor = torch.empty(stored, device="meta")
        return self.select(tensor if self.row is None else tensor[self.row]).shape


def find_places(
    model: nn.Module, experts: Mapping[int, Collection[int]], names: Iterable[str], shapes: dict[str, list[int]]
) -> dict[str, list[Place]]:
    """Where each tensor of an adapter of `config` goes: one place, or more where a tied parameter is stored twice.

    `shapes` are those of the checkpoint's tensors, by key.

    Raises:
        ValueError: the checkpoint has no place for a tensor.
    """
    places: dict[str, list[Place]] = {}
    for layer in moe_layers(model).values():
        if not experts.get(layer.index):
            continue
        of_layer = expert_places(model, layer, shapes)
        for expert in experts[layer.index]:
            for projection in layer.expert_shapes():
                places[f"{layer.name}.{expert}.{projection}"] = [of_layer[expert, projection]]
    for name in names:
        if name not in places:
            places[name] = [Place(key, None, _whole) for key in ordinary_keys(model, name, shapes)]
    return places


def ordinary_keys(model: nn.Module, name: str, files: Container[str]) -> list[str]:
    """Checkpoint keys of a parameter outside the experts: one, or more where a tied one is stored twice."""
    ties = getattr(model, "all_tied_weights_keys", {})
    keys = []
    for alias in (name, *(a for a, b in ties.items() if b == name)):
        param = model.get_parameter(alias)
        reverted = revert_weight_conversion(model, {alias: param})
        found = [key for key, value in reverted.items() if key in files and value is param]
        keys += found or [alias] * (alias in files)
    if not keys:
        raise ValueError(f"the checkpoint holds no tensor that is {name}")
    return keys


def expert_places(model: nn.Module, layer: MoELayer, shapes: dict[str, list[int]]) -> dict[tuple[int, str], Place]:
    """Where (expert, projection) is, for all experts of a layer."""
    mini, module, name = _miniature(layer), layer.module, layer.name
    wanted = {(e, p): view for e in range(layer.num_experts) for p, view in mini.expert_views(e).items()}
    real = {fused: layer.tensor(fused) for fused in layer.tensor_names}
    real_shapes = {projection: view.shape for projection, view in layer.expert_shapes().items()}

    def as_stored() -> dict[str, Tensor]:
        return revert_weight_conversion(model, {f"{name}.{fused}": mini.tensor(fused) for fused in real})

    # A conversion may transpose what has not the shape of the model's parameter (Qwen3-VL-MoE's, which is stored either
    # way): with parameters as small as the miniature it does not, with the model's own it does. The stored shapes tell.
    for fused in real:
        setattr(module, fused, nn.Parameter(mini.tensor(fused).to("meta", torch.float32)))
    try:
        variants = [as_stored()]
    finally:
        for fused, param in real.items():
            setattr(module, fused, param)
    variants.append(as_stored())
    for reverted in variants:
        if missing := sorted(key for key in reverted if key not in shapes):
            raise ValueError(f"the checkpoint does not hold {missing[0]}")
        places = _match(reverted, wanted)
        if lost := sorted(wanted.keys() - places.keys()):
            raise ValueError(
                f"the checkpoint stores {lost[0][1]} of {name} in a layout that this script cannot write (neither "
                f"whole nor as a half or every other row of a tensor such as {sorted(reverted)[0]}): merge in memory "
                "(esft.merge)"
            )
        if all(place.shape(shapes[place.key]) == real_shapes[p] for (_, p), place in places.items()):
            break
    return places  # where none fits: merge_adapter.check_places says what does not


def _miniature(layer: MoELayer) -> FusedExperts:
    """The fused tensors of an experts module with F = 2 and D = 3, all of whose entries are different numbers."""
    module, E, F, D = layer.module, layer.num_experts, 2, 3
    mini = SimpleNamespace(num_experts=E, **{flag: getattr(module, flag) for flag in LAYOUT_FLAGS})
    start = 0
    for fused in layer.tensor_names:
        out, into = (D, F) if fused.startswith("down") else (F * (1 + module.has_gate), D)
        shape = (out,) if fused.endswith("_bias") else (into, out) if module.is_transposed else (out, into)
        size = E * math.prod(shape)
        setattr(mini, fused, torch.arange(start, start + size).view(E, *shape))
        start += size
    return FusedExperts(mini)


def _match(reverted: dict[str, Tensor], wanted: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Place]:
    """Where in checkpoint tensors the projections `wanted` are, by their numbers, each of which is there once."""
    owner = {number: place for place, view in wanted.items() for number in view.flatten().tolist()}
    places = {}
    for key, numbers in reverted.items():
        fused = numbers.ndim == 1 + wanted[owner[numbers.flatten()[0].item()]].ndim
        for row in range(len(numbers)) if fused else [None]:
            for part, select in _parts(numbers if row is None else numbers[row]):
                place = owner[part.flatten()[0].item()]
                if torch.equal(part, wanted[place]):
                    places[place] = Place(key, row, select)
    return places


def _whole(tensor: Tensor) -> Tensor:
    return tensor


SELECTS: tuple[Select, ...] = (
    _whole,
    lambda tensor: tensor[: len(tensor) // 2],
    lambda tensor: tensor[len(tensor) // 2 :],
    lambda tensor: tensor[::2],
    lambda tensor: tensor[1::2],
)


def _parts(tensor: Tensor) -> Iterator[tuple[Tensor, Select]]:
    """Whatever a projection may be of an expert's tensor, and how to take it."""
    for select in SELECTS:
        yield select(tensor), select
        if tensor.ndim == 2:
            yield select(tensor.T), lambda tensor, select=select: select(tensor.T)
