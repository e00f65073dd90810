"""Merge adapters into a base checkpoint on disk, and take them out again. Any server loads the result.

    python scripts/merge_adapter.py --base_model_path=M --adapter_dir=A --output_dir=O
    python scripts/merge_adapter.py --base_model_path=M --adapter_dir A B C --output_dir=O
    python scripts/merge_adapter.py --unmerge --base_model_path=O --output_dir=M_AGAIN

No model is built. Names and shapes come from config.json. The script copies the files of the base and overwrites the
bytes of the adapter's experts in the copies, one expert at a time. Every other byte stays that of the base, and memory
holds a few experts' weights at most, whatever the size of a file.

O/replaced keeps what was overwritten. It is an adapter in the released format with the base's own experts, and merging
it gives back the base's weights bit for bit. That is what --unmerge does, for the last merge. It takes as much disk
space as the adapters in the dtype of the base; --no_replaced leaves it out. vLLM, SGLang and transformers do not see
it, because they read *.safetensors at the top only. Several adapters can be merged if no two of them hold the same
expert or the same other parameter.
"""

import argparse
import contextlib
import itertools
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import esft
from deepseek.adapters import DTYPES, experts_by_layer
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
from esft import CONFIG_NAME, WEIGHTS_NAME, ExpertConfig
from utils import command_parser, environment, run_cli

NOTE = "merged_from.json"  # says what was merged, and marks its folder as a merge
REPLACED = "replaced"  # the folder in it that holds what the merge overwrote
# other weights, hidden files, the model card of the base, and what an earlier merge left
NOT_COPIED = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*"]
NOT_COPIED += ["README.md", NOTE, REPLACED]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Places = dict[str, list[Place]]  # a tensor's name in an adapter -> where it goes in the base
Sources = dict[str, tuple[Path, str]]  # a tensor's name in an adapter -> its file, and its key there


def merge_adapter(
    base: Path,
    adapters: list[Path],
    output: Path,
    overwrite: bool = False,
    hard_links: bool = False,
    keep_replaced: bool = True,
    write_note: bool = True,
) -> int:
    """Write the checkpoint `base` with `adapters` in it to `output`, and return the number of tensors that changed.

    Args:
        overwrite: replace what an earlier merge wrote there.
        hard_links: link the weight files in which nothing changes to those of the base, where the file system can.
        keep_replaced: write what is overwritten to `output`/replaced.
        write_note: write what was merged to `output`/merged_from.json.

    Raises:
        Conflict: an expert, or another parameter, is in two of the adapters.
        ValueError, FileNotFoundError: a wrong folder, an adapter of another base, or a tensor that the checkpoint does
            not hold, or holds in another shape or not as floating point numbers. Then nothing is written.
    """
    replaces = overwrite and (output / NOTE).is_file()
    if output.resolve() == base.resolve():
        raise ValueError(f"cannot write {output}: it is the base itself. Give another --output_dir.")
    if output.exists() and not replaces and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"cannot write {output}: it exists already. Give another --output_dir.")
    check_output(output, folder=True)
    model, files = open_base(base)
    config, sources = read_adapters(model, adapters)
    places = find_places(model, config.experts, sources, stored_shapes(base, files))
    check_places(base, files, places, sources)

    with atomic_path(output, folder=True) as folder:
        changed = {place.key for among in places.values() for place in among}
        copy_base(base, folder, files, changed, hard_links)
        kept = folder / REPLACED if keep_replaced else None
        # an unmerge gives back whatever was there, also NaN
        write_tensors(folder, files, places, sources, kept, check_finite=write_note)
        if keep_replaced:
            load_routers(model, folder, files)  # what was replaced is an adapter of the model that is written here
            note = esft.base_note(model, esft.router_fingerprint(model))
            write_json(folder / REPLACED / CONFIG_NAME, {**config.to_dict(), "base": note})
        if write_note:
            note = {"base_model_path": str(base), "adapter_dir": list(map(str, adapters)), "environment": environment()}
            write_json(folder / NOTE, note)
        if replaces:
            output.rename(folder.with_name("before"))  # deleted once the new folder is in its place
    return len(changed)


def unmerge(merged: Path, output: Path, hard_links: bool = False) -> int:
    """Write the base of a merge to `output`, and return the number of tensors that changed.

    Raises:
        ValueError, FileNotFoundError: as `merge_adapter`, and where the folder does not hold what its merge replaced.
    """
    checkpoint_files(merged)
    if not (merged / NOTE).is_file():
        raise ValueError(f"cannot unmerge {merged}: it has no {NOTE}, so it is not a merge of this script")
    replaced = merged / REPLACED
    if not replaced.is_dir():
        raise ValueError(f"cannot unmerge {merged}: its merge kept nothing. {NOTE} in it names the base.")
    return merge_adapter(merged, [replaced], output, hard_links=hard_links, keep_replaced=False, write_note=False)


# --------------------------------------------------------------------------------------------------------------------
# the adapters


def read_adapters(model: nn.Module, adapters: list[Path]) -> tuple[ExpertConfig, Sources]:
    """Return the union of the configs of adapters, and where their tensors are."""
    if len({path.resolve() for path in adapters}) < len(adapters):
        raise ValueError("cannot merge an adapter twice: --adapter_dir names a folder twice")
    found = {adapter: read_adapter_names(model, adapter) for adapter in adapters}
    shared = {}
    for a, b in itertools.combinations(found, 2):
        if names := sorted(found[a][1].keys() & found[b][1].keys()):
            shared[str(a), str(b)] = names
    if shared:
        raise Conflict(shared)
    config, sources = ExpertConfig({}), {}
    for its_config, its_sources in found.values():
        config, sources = esft.union(config, its_config), sources | its_sources
    return config, sources


def read_adapter_names(model: nn.Module, adapter: Path) -> tuple[ExpertConfig, Sources]:
    """Return the config of an adapter and where its tensors are. Only the routers of `model` need weights."""
    if not adapter.is_dir():
        raise FileNotFoundError(f"cannot read adapter {adapter}: no such folder{suggest_path(adapter)}")
    if esft.is_lora(adapter):
        raise ValueError(f"cannot merge adapter {adapter}: it is a LoRA. Use esft.add_adapter and save the model.")
    config = ExpertConfig.load(adapter)
    try:
        config.check(model)
        esft.check_base(model, adapter)
        return config, esft.find_adapter_tensors(adapter, esft.adapter_views(model, config))
    except ValueError as error:
        raise ValueError(f"adapter {adapter}: {error}") from error


class Conflict(ValueError):
    """Adapters share tensors, so they cannot be merged together. `report` lists what they share."""

    def __init__(self, shared: dict[tuple[str, str], list[str]]):
        lines = []
        for (a, b), names in shared.items():
            experts, others = experts_by_layer(names)
            lines.append(f"{a} and {b} both hold")
            lines += [f"    layer {layer}: experts {', '.join(map(str, ids))}" for layer, ids in experts.items()]
            lines += [f"    {name}" for name in others]
        self.report = "\n".join(lines)
        pairs = "; ".join(f"{a} and {b} ({len(names)} tensors)" for (a, b), names in shared.items())
        super().__init__(f"cannot merge adapters that hold the same experts or parameters: {pairs}")


# --------------------------------------------------------------------------------------------------------------------
# the base: checked, then copied, then overwritten in the copy


@contextlib.contextmanager
def open_shards(paths: Iterable[Path], mode: str = "rb") -> Iterator[dict[Path, Shard]]:
    """Open each of these files once."""
    with contextlib.ExitStack() as stack:
        yield {path: stack.enter_context(Shard(path, mode)) for path in sorted(set(paths))}


def check_places(base: Path, files: dict[str, str], places: Places, sources: Sources) -> None:
    """Refuse places in which the base does not hold floating point numbers of the adapter's shape."""
    adapter_paths = (path for path, _ in sources.values())
    with open_shards(base / name for name in files.values()) as shards, open_shards(adapter_paths) as adapters:
        for name, among in places.items():
            path, key = sources[name]
            wanted = adapters[path].header[key]["shape"]
            for place in among:
                entry = shards[base / files[place.key]].header[place.key]
                if entry["dtype"] not in DTYPES:
                    raise ValueError(
                        f"cannot merge into {place.key} of the base: it is stored as {entry['dtype']}. Give an "
                        "unquantized base."
                    )
                found = list(place.shape(entry["shape"]))
                if found != wanted:
                    raise ValueError(
                        f"cannot merge {name} of shape {tuple(wanted)} into {place.key} of shape {tuple(found)}: "
                        f"adapter {path.parent} is for another base"
                    )
            if len(among) > 1:
                first, *copies = (shards[base / files[place.key]].read(place.key) for place in among)
                if any(not torch.equal(as_words(copy), as_words(first)) for copy in copies):
                    raise ValueError(
                        f"cannot merge into {' and '.join(place.key for place in among)}: they are one parameter but "
                        "differ. Set tie_word_embeddings to false in config.json."
                    )


def copy_base(base: Path, folder: Path, files: dict[str, str], changed: set[str], hard_links: bool) -> None:
    """Copy a checkpoint. Files in which no tensor of `changed` lies may be links."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    changed_files = {files[key] for key in changed}
    for name in sorted(set(files.values())):
        copy_file(base / name, folder / name, hard_links and name not in changed_files)


def write_tensors(
    folder: Path, files: dict[str, str], places: Places, sources: Sources, replaced: Path | None, check_finite: bool
) -> None:
    """Overwrite what the adapters hold in the copied files, in the dtype of the base, one tensor at a time.

    What was there before goes to the folder `replaced`, under its name in an adapter.
    """
    written = (folder / files[place.key] for among in places.values() for place in among)
    adapter_paths = (path for path, _ in sources.values())
    with open_shards(written, "r+b") as shards, open_shards(adapter_paths) as adapters:
        if replaced:
            entries = {}
            for name, (place, *_) in places.items():
                path, key = sources[name]
                dtype = shards[folder / files[place.key]].header[place.key]["dtype"]
                entries[name] = dtype, adapters[path].header[key]["shape"]
            replaced.mkdir()
            reserve(replaced / WEIGHTS_NAME, entries)
        with open_shards([replaced / WEIGHTS_NAME] if replaced else [], "r+b") as kept:
            for name in tqdm(sorted(places, key=lambda name: places[name][0].key), desc="merging", unit="tensor"):
                path, key = sources[name]
                value = adapters[path].read(key)
                if check_finite and not value.isfinite().all():
                    raise ValueError(f"cannot merge {key} of {path}: it has NaN or infinite values")
                for place in places[name]:
                    shard = shards[folder / files[place.key]]
                    stored = shard.read(place.key, place.row)
                    part = place.select(stored)
                    if replaced:
                        kept[replaced / WEIGHTS_NAME].write(name, part)
                    if part.dtype == value.dtype:
                        as_words(part).copy_(as_words(value))  # every bit, also of NaN
                    else:
                        part.copy_(value)
                    shard.write(place.key, stored, place.row)


def as_words(tensor: Tensor) -> Tensor:
    """View floating point numbers as whole numbers, which are copied and compared bit by bit."""
    return tensor.view(WORDS[tensor.dtype.itemsize])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="folder of the base with "
        "config.json and *.safetensors; with --unmerge, the folder of a merge")  # fmt: skip
    add("--adapter_dir", type=Path, nargs="+", metavar="DIR", help="folders of adapters that share no expert, with "
        "expert_cfg.json and *.safetensors (required without --unmerge)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write: new or empty")
    add("--overwrite", action="store_true", help="replace what an earlier merge left in --output_dir")
    add("--unmerge", action="store_true", help="write the base of the last merge again, bit for bit")
    add("--no_replaced", action="store_true", help="do not keep what the merge overwrites: saves disk space, but the "
        "result cannot be unmerged")  # fmt: skip
    add("--hard_links", action="store_true", help="share the disk space of unchanged weight files with the base, where "
        "the file system can; never edit one of the two in place")  # fmt: skip
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
