"""Merge adapters into a base checkpoint on disk, and take them out again: plain checkpoints, for any server to load.

    python scripts/merge_adapter.py --base_model_path=M --adapter_dir=A --output_dir=O
    python scripts/merge_adapter.py --base_model_path=M --adapter_dir A B C --output_dir=O
    python scripts/merge_adapter.py --unmerge --base_model_path=O --output_dir=M_AGAIN

No model is built: names and shapes come from config.json (on the meta device). The files of the base are copied, and in
the copies the bytes of the adapter's experts are overwritten in place, one expert at a time. So every other byte is the
base's, and a few experts' weights are all that is ever in memory, whatever the size of the shards.

What was overwritten is kept in O/replaced, as an adapter in the released format that holds the base's own experts. To
merge that one is to unmerge: the base's weight files come back bit for bit. It costs as much disk space as the
adapters in the base's dtype; --no_replaced leaves it out. vLLM, SGLang and transformers read *.safetensors at the top
only, and so do not see it. An unmerge undoes the last merge. Several adapters are merged where no two of them hold the
same expert or the same other parameter.

How a checkpoint spells an expert differs by family (DeepSeek's `mlp.experts.7.gate_proj`, Mixtral's
`block_sparse_moe.experts.7.w1`, gpt_oss's fused `mlp.experts.gate_up_proj`), and transformers knows it: it splits its
fused tensors again when it saves. So that is asked, and not written down once more. Fused tensors in miniature, each
entry of which is a different number, go through transformers' own reverse conversion, and where a number comes out is
where the expert's projection lives:

    gate_up_proj (E, 2F, D), entries 0, 1, 2, ...  ->  {"...experts.7.w1.weight": [[1260, 1261, ..], ..], ..}
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.experts import LAYOUT_FLAGS, expert_views, find_experts, fused_names
from deepseek.loading import empty_model
from esft import (
    CONFIG_NAME,
    DTYPES,
    WEIGHTS_NAME,
    ExpertConfig,
    adapter_views,
    base_note,
    check_base,
    find_adapter_tensors,
    is_lora,
    router_fingerprint,
    router_parameters,
    union,
)
from utils import Parser, atomic_path, check_output, environment, run_cli, suggest_path, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOTE = "merged_from.json"  # what was merged; its folder is a merge's
REPLACED = "replaced"  # the folder in it that holds what the merge overwrote
# other weights, what is hidden, the model card, which speaks of the base alone, and what an earlier merge left
NOT_COPIED = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*"]
NOT_COPIED += ["README.md", NOTE, REPLACED]
TORCH_DTYPES = dict(zip(DTYPES, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))
EXPERT = re.compile(r"(?:^|\.)(?P<layer>\d+)\..*?experts\.(?P<expert>\d+)\.")  # in a tensor's name in an adapter
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Select = Callable[[Tensor], Tensor]  # the part of a tensor that a projection is, as a view


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


def merge_adapter(
    base: Path,
    adapters: list[Path],
    output: Path,
    overwrite: bool = False,
    hard_links: bool = False,
    keep_replaced: bool = True,
    write_note: bool = True,
) -> int:
    """Write to `output` the checkpoint `base` with `adapters` in it; returns the number of its tensors that changed.

    Args:
        overwrite: replace what an earlier merge wrote there.
        hard_links: files of weights in which nothing changes are the base's own, not copies, where the file system can.
        keep_replaced: write what is overwritten to `output`/replaced.
        write_note: write what was merged to `output`/merged_from.json.

    Raises:
        Conflict: an expert, or another parameter, is in two of the adapters.
        ValueError, FileNotFoundError: a folder that is not what it should be, an adapter of another base, a tensor
            that the checkpoint does not hold, or holds in another shape or not as floating point numbers.
            Whatever is raised, nothing is written.
    """
    ours = overwrite and (output / NOTE).is_file()
    if output.exists() and not ours and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists already; give an --output_dir that does not")
    if output.resolve() == base.resolve():
        raise ValueError(f"{output} is the base itself; give another --output_dir")
    check_output(output, folder=True)
    files = checkpoint_files(base)
    model = meta_model(base, files)
    load_routers(model, base, files)
    config, sources, names_of = ExpertConfig({}), {}, {}
    for adapter in adapters:
        its_config, its_sources = read_adapter_names(model, adapter)
        config, sources = union(config, its_config), {**sources, **its_sources}
        names_of[str(adapter)] = set(its_sources)
    if len(names_of) < len(adapters):
        raise ValueError("--adapter_dir names a folder twice; give each once")
    if shared := conflicts(names_of):
        raise Conflict(shared)
    places = find_places(model, config, sources, stored_shapes(base, files))
    check_places(base, files, places, sources)

    with atomic_path(output) as folder:
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        changed = {place.key for among in places.values() for place in among}
        changed_files = {files[key] for key in changed}
        for name in sorted(set(files.values())):
            copy_file(base / name, folder / name, hard_links and name not in changed_files)
        kept = folder / REPLACED if keep_replaced else None
        write_tensors(
            folder, files, places, sources, kept, finite=write_note
        )  # an unmerge gives back whatever was there
        if keep_replaced:
            load_routers(model, folder, files)  # what was replaced is for the model that is written here
            note = base_note(model, router_fingerprint(model))
            write_json(folder / REPLACED / CONFIG_NAME, {**config.to_dict(), "base": note})
        if write_note:
            note = {"base_model_path": str(base), "adapter_dir": list(names_of), "environment": environment()}
            write_json(folder / NOTE, note)
        if ours:
            output.rename(folder.with_name("before"))  # which goes when the new one is in its place
    return len(changed)


def unmerge(merged: Path, output: Path, hard_links: bool = False) -> int:
    """Write to `output` the base of what `merge_adapter` wrote to `merged`; returns the number of tensors that changed.

    Raises:
        ValueError, FileNotFoundError: as `merge_adapter`, and where the folder does not hold what its merge replaced.
    """
    checkpoint_files(merged)
    if not (merged / NOTE).is_file():
        raise ValueError(f"{merged} cannot be unmerged: it has no {NOTE}, so no merge of this script wrote it")
    if not (merged / REPLACED).is_dir():
        raise ValueError(
            f"{merged} cannot be unmerged: its merge kept nothing (--no_replaced); {NOTE} in it says where its base was"
        )
    replaced = [merged / REPLACED]
    return merge_adapter(merged, replaced, output, hard_links=hard_links, keep_replaced=False, write_note=False)


# --------------------------------------------------------------------------------------------------------------------
# the base


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
# the adapters


def read_adapter_names(model: nn.Module, adapter: Path) -> tuple[ExpertConfig, dict[str, tuple[Path, str]]]:
    """(config, file and key of each tensor) of an adapter of `model`, whose routers have their weights."""
    if not adapter.is_dir():
        raise FileNotFoundError(f"adapter {adapter}: no such folder{suggest_path(adapter)}")
    if is_lora(adapter):
        raise ValueError(
            f"adapter {adapter} is a LoRA, which holds no weights to put in place: add it to the loaded model "
            "(esft.add_adapter), which merges it, and save that"
        )
    config = ExpertConfig.load(adapter)
    try:
        config.check(model)
        check_base(model, adapter)
        return config, find_adapter_tensors(adapter, adapter_views(model, config))
    except ValueError as error:
        raise ValueError(f"adapter {adapter}: {error}") from error


def conflicts(names_of: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """Names of tensors that are in two adapters, by the pair of them; only pairs that share some."""
    pairs = itertools.combinations(names_of, 2)
    shared = {(a, b): sorted(names_of[a] & names_of[b]) for a, b in pairs}
    return {pair: names for pair, names in shared.items() if names}


def by_layer(names: Iterable[str]) -> tuple[dict[int, list[int]], list[str]]:
    """(expert ids by layer, names of the others) of tensors that go by their names in an adapter."""
    experts, others = defaultdict(set), []
    for name in names:
        if place := EXPERT.search(name):
            experts[int(place["layer"])].add(int(place["expert"]))
        else:
            others.append(name)
    return {layer: sorted(experts[layer]) for layer in sorted(experts)}, sorted(others)


class Conflict(ValueError):
    """Adapters that share tensors, so that they cannot be merged together; `report` lists what they share."""

    def __init__(self, shared: dict[tuple[str, str], list[str]]):
        lines, several = [], "; ".join(f"{a} and {b} ({len(names)} tensors)" for (a, b), names in shared.items())
        for (a, b), names in shared.items():
            experts, others = by_layer(names)
            lines.append(f"{a} and {b} both hold")
            lines += [f"    layer {layer}: experts {', '.join(map(str, ids))}" for layer, ids in experts.items()]
            lines += [f"    {name}" for name in others]
        super().__init__(f"nothing was merged, as adapters hold the same experts or parameters: {several}")
        self.report = "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# where the adapters' tensors are in the base


def find_places(
    model: nn.Module, config: ExpertConfig, names: Iterable[str], shapes: dict[str, list[int]]
) -> dict[str, list[Place]]:
    """Where each tensor of an adapter of `config` goes: one place, or more where a tied parameter is stored twice.

    `shapes` are those of the checkpoint's tensors, by key.

    Raises:
        ValueError: the checkpoint has no place for a tensor.
    """
    places: dict[str, list[Place]] = {}
    for layer, (module_name, module) in find_experts(model).items():
        if not config.experts.get(layer):
            continue
        of_layer = expert_places(model, module_name, module, shapes)
        for expert in config.experts[layer]:
            for projection in expert_views(module, expert):
                places[f"{module_name}.{expert}.{projection}"] = [of_layer[expert, projection]]
    for name in names:
        if name not in places:
            places[name] = [Place(key, None, _whole) for key in ordinary_keys(model, name, shapes)]
    return places


def ordinary_keys(model: nn.Module, name: str, files: Container[str]) -> list[str]:
    """Checkpoint keys of a parameter outside the experts: one, or more where a tied one is stored twice."""
    ties = getattr(model, "all_tied_weights_keys", {})
    names = [name, *(a for a, b in ties.items() if b == name)]
    keys = []
    for name in names:
        param = model.get_parameter(name)
        reverted = revert_weight_conversion(model, {name: param})
        found = [key for key, value in reverted.items() if key in files and value is param]
        keys += found or [name] * (name in files)
    if not keys:
        raise ValueError(f"the checkpoint holds no tensor that is {names[0]}")
    return keys


def expert_places(
    model: nn.Module, name: str, module: nn.Module, shapes: dict[str, list[int]]
) -> dict[tuple[int, str], Place]:
    """Where (expert, projection) is, for all of the experts module `name`."""
    E, F, D = module.num_experts, 2, 3
    mini = SimpleNamespace(num_experts=E, **{flag: getattr(module, flag) for flag in LAYOUT_FLAGS})
    start = 0
    for fused in fused_names(module):
        out, into = (D, F) if fused.startswith("down") else (F * (1 + module.has_gate), D)
        shape = (out,) if fused.endswith("_bias") else (into, out) if module.is_transposed else (out, into)
        size = E * math.prod(shape)
        setattr(mini, fused, torch.arange(start, start + size).view(E, *shape))
        start += size
    fused_by_key = {f"{name}.{fused}": getattr(mini, fused) for fused in fused_names(module)}
    wanted = {(e, p): view for e in range(E) for p, view in expert_views(mini, e).items()}
    real = {fused: getattr(module, fused) for fused in fused_names(module)}
    real_shapes = {projection: view.shape for projection, view in expert_views(module, 0).items()}
    # A conversion may transpose what has not the shape of the model's parameter (Qwen3-VL-MoE's, which is stored either
    # way): with parameters as small as the miniature it does not, with the model's own it does. The stored shapes tell.
    for fused in real:
        setattr(module, fused, nn.Parameter(getattr(mini, fused).to("meta", torch.float32)))
    try:
        variants = [revert_weight_conversion(model, dict(fused_by_key))]
    finally:
        for fused, param in real.items():
            setattr(module, fused, param)
    variants.append(revert_weight_conversion(model, dict(fused_by_key)))
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
    return places  # where none fits: check_places says what does not


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


def check_places(
    base: Path, files: dict[str, str], places: dict[str, list[Place]], sources: dict[str, tuple[Path, str]]
) -> None:
    """Raise ValueError where the base holds not what goes by these places, or in another shape than the adapter."""
    with contextlib.ExitStack() as stack:
        shards = {name: stack.enter_context(Shard(base / name)) for name in sorted(set(files.values()))}
        adapters = {path: stack.enter_context(Shard(path)) for path, _ in sources.values()}
        for name, among in places.items():
            path, source_key = sources[name]
            wanted = adapters[path].header[source_key]["shape"]
            for place in among:
                shard = shards[files[place.key]]
                entry = shard.header[place.key]
                if entry["dtype"] not in DTYPES:
                    raise ValueError(
                        f"{place.key} of the base is stored as {entry['dtype']}, expected {', '.join(DTYPES)}: merge "
                        "into its unquantized form"
                    )
                found = list(place.shape(entry["shape"]))
                if found != wanted:
                    raise ValueError(
                        f"{place.key} of the base has shape {tuple(found)} for {name}, which in adapter {path.parent} "
                        f"has {tuple(wanted)}: it was made for another base"
                    )
            copies = [shards[files[place.key]].read(place.key) for place in among] if len(among) > 1 else []
            if any(not torch.equal(_bits(copy), _bits(copies[0])) for copy in copies):
                raise ValueError(
                    f"the base holds {' and '.join(place.key for place in among)}, which its config.json says are one "
                    "parameter, with different values: set tie_word_embeddings to false there, or save the base anew"
                )


# --------------------------------------------------------------------------------------------------------------------
# writing


def write_tensors(
    folder: Path,
    files: dict[str, str],
    places: dict[str, list[Place]],
    sources: dict[str, tuple[Path, str]],
    replaced: Path | None,
    finite: bool,
) -> None:
    """Overwrite in the copies of the base's files in `folder` what the adapters hold, in the base's dtype; what was
    there before goes to the folder `replaced`, by its name in an adapter. One tensor of an expert is in memory at once.
    """
    with contextlib.ExitStack() as stack:
        names = {files[place.key] for among in places.values() for place in among}
        shards = {name: stack.enter_context(Shard(folder / name, "r+b")) for name in sorted(names)}
        adapters = {path: stack.enter_context(Shard(path)) for path, _ in sources.values()}
        if replaced:
            entries = {}
            for name, (place, *_) in places.items():
                path, key = sources[name]
                dtype = shards[files[place.key]].header[place.key]["dtype"]
                entries[name] = dtype, adapters[path].header[key]["shape"]
            replaced.mkdir()
            reserve(replaced / WEIGHTS_NAME, entries)
            kept = stack.enter_context(Shard(replaced / WEIGHTS_NAME, "r+b"))
        for name in tqdm(sorted(places, key=lambda name: places[name][0].key), desc="merging", unit="tensor"):
            path, key = sources[name]
            value = adapters[path].read(key)
            if finite and not value.isfinite().all():
                raise ValueError(f"{path}: {key} has values that are no finite numbers; train the adapter anew")
            for place in places[name]:
                shard = shards[files[place.key]]
                stored = shard.read(place.key, place.row)
                part = place.select(stored)
                if replaced:
                    kept.write(name, part)
                if part.dtype == value.dtype:
                    _bits(part).copy_(_bits(value))
                else:
                    part.copy_(value)
                shard.write(place.key, stored, place.row)


def _bits(tensor: Tensor) -> Tensor:
    """A view as whole numbers, which are copied as they are and compared as such, NaN included."""
    return tensor.view(WORDS[tensor.dtype.itemsize])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="folder of the base: "
        "config.json, *.safetensors; with --unmerge, that of a merge")  # fmt: skip
    add("--adapter_dir", type=Path, nargs="+", metavar="DIR", help="folders of one adapter or several that share no "
        "expert: expert_cfg.json, *.safetensors (required without --unmerge)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet, or be "
        "empty")  # fmt: skip
    add("--overwrite", action="store_true", help="replace what an earlier merge left in --output_dir")
    add("--unmerge", action="store_true", help="write the base of the last merge again, bit for bit, from what "
        "the merge kept in replaced/")  # fmt: skip
    add("--no_replaced", action="store_true", help="do not keep what the merge overwrites, which takes as much disk "
        "space as the adapters in the base's dtype; the result cannot be unmerged then")  # fmt: skip
    add("--hard_links", action="store_true", help="files of weights in which nothing changes share their disk space "
        "with the base's, where the file system can; never edit one of the two in place")  # fmt: skip
    args = parser.parse_args(argv)
    if args.unmerge and (args.adapter_dir or args.no_replaced or args.overwrite):
        parser.error("--unmerge takes --base_model_path, --output_dir and --hard_links only")
    if not args.unmerge and not args.adapter_dir:
        parser.error("--adapter_dir is missing: give one folder or several (or --unmerge)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    base, output = args.base_model_path, args.output_dir
    if args.unmerge:
        changed = unmerge(base, output, args.hard_links)
    else:
        try:
            keep = not args.no_replaced
            changed = merge_adapter(base, args.adapter_dir, output, args.overwrite, args.hard_links, keep)
        except Conflict as error:
            print(error.report, file=sys.stderr)
            raise
    print(f"{output}: {changed} tensors of {base} replaced or edited")


if __name__ == "__main__":
    run_cli(main)
