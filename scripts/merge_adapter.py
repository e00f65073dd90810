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
"""

import argparse
import contextlib
import itertools
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.adapters import DTYPES
from deepseek.checkpoint_files import (
    Place,
    Shard,
    checkpoint_files,
    copy_file,
    find_places,
    load_routers,
    open_base,
    reserve,
    stored_shapes,
)
from deepseek.files import atomic_path, check_output, suggest_path, write_json
from esft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    ExpertConfig,
    adapter_views,
    base_note,
    check_base,
    find_adapter_tensors,
    is_lora,
    router_fingerprint,
    union,
)
from utils import command_parser, environment, run_cli

NOTE = "merged_from.json"  # what was merged; its folder is a merge's
REPLACED = "replaced"  # the folder in it that holds what the merge overwrote
# other weights, what is hidden, the model card, which speaks of the base alone, and what an earlier merge left
NOT_COPIED = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*"]
NOT_COPIED += ["README.md", NOTE, REPLACED]
EXPERT = re.compile(r"(?:^|\.)(?P<layer>\d+)\..*?experts\.(?P<expert>\d+)\.")  # in a tensor's name in an adapter
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


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
    model, files = open_base(base)
    config, sources, names_of = ExpertConfig({}), {}, {}
    for adapter in adapters:
        its_config, its_sources = read_adapter_names(model, adapter)
        config, sources = union(config, its_config), {**sources, **its_sources}
        names_of[str(adapter)] = set(its_sources)
    if len(names_of) < len(adapters):
        raise ValueError("--adapter_dir names a folder twice; give each once")
    if shared := conflicts(names_of):
        raise Conflict(shared)
    places = find_places(model, config.experts, sources, stored_shapes(base, files))
    check_places(base, files, places, sources)

    with atomic_path(output, folder=True) as folder:
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        changed = {place.key for among in places.values() for place in among}
        changed_files = {files[key] for key in changed}
        for name in sorted(set(files.values())):
            copy_file(base / name, folder / name, hard_links and name not in changed_files)
        kept = folder / REPLACED if keep_replaced else None
        # an unmerge gives back whatever was there, finite or not
        write_tensors(folder, files, places, sources, kept, finite=write_note)
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
# places in the base: checked, then overwritten in its copy


def check_places(
    base: Path, files: dict[str, str], places: dict[str, list[Place]], sources: dict[str, tuple[Path, str]]
) -> None:
    """Raise ValueError where the base holds not what goes by these places, or in another shape than the adapter."""
    with contextlib.ExitStack() as stack:
        shards = {name: stack.enter_context(Shard(base / name)) for name in sorted(set(files.values()))}
        adapters = {path: stack.enter_context(Shard(path)) for path in {path for path, _ in sources.values()}}
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
        adapters = {path: stack.enter_context(Shard(path)) for path in {path for path, _ in sources.values()}}
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
                raise ValueError(f"{path}: {key} has values that are not finite; train the adapter anew")
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
    parser = command_parser(__doc__)
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
