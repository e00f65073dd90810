"""Merge adapters into a base checkpoint on disk, and take them out again. Any server loads the result.

    python scripts/merge_adapter.py --base_model_path=M --adapter_dir=A --output_dir=O
    python scripts/merge_adapter.py --base_model_path=M --adapter_dir A B C --output_dir=O
    python scripts/merge_adapter.py --base_model_path=M --adapter_dir=A --output_dir=O --strength=0.7
    python scripts/merge_adapter.py --unmerge --base_model_path=O --output_dir=M_AGAIN

No model is built. The script copies the files of the base and overwrites the bytes of the adapter's experts in the
copies, one expert at a time. So every other byte stays that of the base, and memory holds a few experts at most.

O/replaced keeps what was overwritten, as an adapter with the base's own experts, and --unmerge merges that. It takes as
much disk space as the adapters. Servers do not see it, because they read *.safetensors at the top only.

--adapter_dir may also be a LoRA adapter of peft, or a whole model that was fine-tuned from the base. These are merged
in memory, without replaced/.
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import esft
from deepseek.adapters import BASE_NAME, DTYPES, Source, experts_by_layer, find_adapter_tensors, read_sources
from deepseek.checkpoint_files import Place, find_places, load_routers, open_base
from deepseek.experts import moe_layers
from deepseek.files import UMASK, atomic_path, check_output, read_json, write_json
from deepseek.loading import empty_model
from deepseek.lora import LORA_CONFIG_NAME, LORA_WEIGHTS_NAME, PREFIX, factor_shapes, of_single_experts, read_lora
from deepseek.shards import INDEX, WEIGHTS, Shard, Stored, reserve
from deepseek.strength import blend, check_strength, is_whole
from esft import CONFIG_NAME, WEIGHTS_NAME, ExpertConfig
from utils import command_parser, environment, locked, note, run_cli

NOTE = "merged_from.json"  # says what was merged, and marks its folder as a merge
NOTHING = "at strength 0 the merge is the base"
REPLACED = "replaced"  # the folder in it that holds what the merge overwrote
GENERATION = "generation_config.json"  # names the tokens at which generation stops
# other weights, hidden files, the model card of the base, and what an earlier merge left
NOT_COPIED = ["*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*"]
NOT_COPIED += ["README.md", NOTE, REPLACED]

Files = dict[str, Stored]  # the tensors of the base, by key
Places = dict[str, list[Place]]  # a tensor's name in an adapter -> where it goes in the base
Sources = dict[str, Source]  # a tensor's name in an adapter -> where its new value is


def merge_adapter(
    base: Path,
    adapters: list[Path],
    output: Path,
    overwrite: bool = False,
    hard_links: bool = False,
    keep_replaced: bool = True,
    write_note: bool = True,
    strength: float = 1.0,
) -> int:
    """Write the checkpoint `base` with `adapters` in it to `output`, and return the number of tensors that changed.

    The options are those of the command. Without `write_note` nothing marks the output as a merge.

    Raises:
        ValueError, FileNotFoundError: a wrong folder, an adapter of another base, an expert or another parameter that
            is in two of the adapters, or a tensor that the checkpoint does not hold, or holds in another shape or not
            as floating point numbers. Then nothing is written.
    """
    if output.resolve() == base.resolve():
        raise ValueError(f"cannot write {output}: it is the base itself. Give another --output_dir.")
    check_strength(strength)
    replaces = check_free(output, overwrite)
    if in_memory := [adapter for adapter in adapters if esft.is_for_peft(adapter) or is_whole(adapter)]:
        if len(adapters) > 1:
            raise ValueError(f"cannot merge {in_memory[0]} with others: it is a LoRA or a whole model. Merge it alone.")
        return merge_in_memory(base, in_memory[0], output, strength, replaces)
    model, stored = open_base(base)
    config, sources = read_adapters(model, adapters, finite=write_note)  # an unmerge gives back whatever was there
    places = find_places(model, config.experts, sources, stored)
    shapes = esft.adapter_shapes(model, config)
    check_places(stored, places, shapes)

    with atomic_path(output, folder=True) as folder:
        changed = {place.key for among in places.values() for place in among}
        copy_base(base, folder, stored, changed, hard_links)
        kept = folder / REPLACED / WEIGHTS_NAME if keep_replaced else None
        if kept:
            kept.parent.mkdir()
            reserve(kept, {name: (stored[among[0].key].dtype, shapes[name]) for name, among in places.items()})
        differs = write_tensors(folder, stored, places, sources, kept, strength)
        if write_note and not differs:
            note(f"{base} holds the weights of the adapter already: nothing changed" if strength else NOTHING)
        if kept:
            load_routers(model, folder, stored)  # what was replaced is an adapter of the model that is written here
            model.name_or_path = str(folder)
            write_json(kept.with_name(CONFIG_NAME), {**config.to_dict(), "base": esft.base_note(model)})
        if write_note:
            write_end_tokens(model, adapters, folder, kept)
            write_merged_from(folder, base, adapters, strength)
        else:
            restore_end_tokens(adapters[0], folder)
        if replaces:
            output.rename(folder.with_name("before"))  # deleted once the new folder is in its place
    return len(changed)


def merge_in_memory(base: Path, adapter: Path, output: Path, strength: float, replaces: bool) -> int:
    """Write a base with a LoRA adapter in it, or moved towards a whole model. Return the number of its parameters."""
    esft.check_adapter(empty_model(base), adapter)
    model, tokenizer = esft.load_esft_model(base, adapter, strength)
    with atomic_path(output, folder=True) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_end_tokens(model, [adapter], folder, None)
        write_merged_from(folder, base, [adapter], strength)
        if replaces:
            output.rename(folder.with_name("before"))
    return len(list(model.parameters()))


def write_merged_from(folder: Path, base: Path, adapters: list[Path], strength: float) -> None:
    """Write the note that marks a folder as a merge."""
    made = {"base_model_path": str(base), "adapter_dir": list(map(str, adapters)), "strength": strength}
    files = {name: path.stat().st_size for name, path in files_in(folder)}
    write_json(folder / NOTE, {**made, "environment": environment(), "files": files})


def check_free(output: Path, overwrite: bool) -> bool:
    """Return whether `output` holds a merge that may be replaced. Raise ValueError if anything else is there."""
    check_output(output, folder=True)
    if not output.is_dir() or not any(output.iterdir()):
        return False
    is_merge = (output / NOTE).is_file()
    if not (overwrite and is_merge):
        hint = " or --overwrite" * is_merge
        raise ValueError(f"cannot write {output}: it exists already. Give another --output_dir{hint}.")
    made = read_json(output / NOTE).get("files", {})
    if own := [name for name, path in files_in(output) if name != NOTE and made.get(name) != path.lstat().st_size]:
        raise ValueError(
            f"cannot overwrite {output}: its {NOTE} does not name {own[0]}, or names it with another size, so the "
            "merge did not write it. Move it away, or give another --output_dir."
        )
    return True


def files_in(folder: Path) -> list[tuple[str, Path]]:
    """Return (name, path) of all that is not a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return [(str(path.relative_to(folder)), path) for path in paths]


def fill_lora(base: Path, adapter: Path, output: Path) -> int:
    """Write a LoRA adapter of single experts with zeros for the others of its layers. Return the number of tensors.

    The zeros take no room on disk where the file system knows sparse files.

    Raises:
        ValueError, FileNotFoundError: it is another adapter, or does not fit the base; or the output is there.
    """
    check_free(output, overwrite=False)
    if not of_single_experts(adapter):
        raise ValueError(
            f"cannot fill {adapter}: it is not LoRA on selected experts (lora_experts=selected). Merge it."
        )
    model, _ = open_base(base)
    config, _ = esft.find_adapter(model, adapter)
    layers, rank = moe_layers(model), read_lora(adapter).rank
    whole = dataclasses.replace(config, experts={i: tuple(range(layers[i].num_experts)) for i in config.experts})
    held, shapes = (factor_shapes(esft.adapter_shapes(model, one), rank) for one in (config, whole))
    with atomic_path(output, folder=True) as folder:
        folder.mkdir()
        changed = sorted({name.rpartition(".lora_")[0] for name in shapes})
        write_json(folder / LORA_CONFIG_NAME, {**read_json(adapter / LORA_CONFIG_NAME), "target_modules": changed})
        write_json(folder / BASE_NAME, {"base": esft.base_note(model)})
        reserve(folder / LORA_WEIGHTS_NAME, {f"{PREFIX}{name}": ("F32", [*shape]) for name, shape in shapes.items()})
        with Shard(folder / LORA_WEIGHTS_NAME, "r+b") as new:
            for name, (factor,) in read_sources(find_adapter_tensors(adapter, held, PREFIX), held):
                new.write(f"{PREFIX}{name}", factor.float())
    return len(shapes)


def unmerge(merged: Path, output: Path, **options: bool) -> int:
    """Write the base of a merge to `output`, and return how many tensors changed. Raise as `merge_adapter`."""
    replaced = merged / REPLACED
    if not replaced.is_dir():
        raise ValueError(f"cannot unmerge {merged}: no folder {REPLACED} is in it. If {NOTE} is, that names the base.")
    return merge_adapter(merged, [replaced], output, keep_replaced=False, write_note=False, **options)


# --------------------------------------------------------------------------------------------------------------------
# the adapters


def read_adapters(model: nn.Module, adapters: list[Path], finite: bool = True) -> tuple[ExpertConfig, Sources]:
    """Return the union of the configs of adapters, and where their tensors are. Print what two of them share."""
    found = {adapter: esft.find_adapter(model, adapter, finite) for adapter in adapters}
    shared = []
    for (a, (_, of_a)), (b, (_, of_b)) in itertools.combinations(found.items(), 2):
        if names := of_a.keys() & of_b.keys():
            shared.append(f"{a} and {b} ({len(names)} tensors)")
            experts, others = experts_by_layer(names)
            lines = [f"layer {layer}: experts {', '.join(map(str, ids))}" for layer, ids in experts.items()]
            print(f"{a} and {b} both hold", *lines, *others, sep="\n    ", file=sys.stderr)
    if shared:
        raise ValueError(f"cannot merge adapters that hold the same experts or parameters: {'; '.join(shared)}")
    config, sources = ExpertConfig({}), {}
    for its_config, its_sources in found.values():
        config, sources = esft.union(config, its_config), sources | its_sources
    return config, sources


# --------------------------------------------------------------------------------------------------------------------
# the base: checked, then copied, then overwritten in the copy


def check_places(stored: Files, places: Places, shapes: dict[str, torch.Size]) -> None:
    """Refuse places in which the base does not hold floating point numbers of the shape that its config asks for."""
    for name, among in places.items():
        for place in among:
            there = stored[place.key]
            if there.dtype not in DTYPES or place.shape(there.shape) != shapes[name]:
                raise ValueError(
                    f"cannot merge {name} of shape {tuple(shapes[name])} into {place.key} of the base: it is "
                    f"{there.dtype} of shape {tuple(there.shape)}. Give the unquantized base."
                )


def copy_base(base: Path, folder: Path, stored: Files, changed: set[str], hard_links: bool) -> None:
    """Copy a checkpoint. Files in which no tensor of `changed` lies may be links.

    The copies are writable, also where the base is read-only, and links are followed, as those of a hub cache.
    """
    files = {one.file for one in stored.values()}
    unread = [INDEX] if WEIGHTS in files else []  # a server may read the index, where there is one
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*NOT_COPIED, *unread), copy_function=shutil.copyfile)
    for copy in (folder, *folder.rglob("*")):
        if copy.is_dir():
            copy.chmod(0o777 & ~UMASK)
    changed_files = {stored[key].file for key in changed}
    for name in sorted(files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if hard_links and name not in changed_files:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link((base / name).resolve(), folder / name)
                continue
        shutil.copyfile(base / name, folder / name)


def write_tensors(
    folder: Path, stored: Files, places: Places, sources: Sources, kept: Path | None, strength: float
) -> bool:
    """Overwrite what the adapters hold in the copied files, in the dtype of the base, one tensor at a time.

    What was there before goes to the reserved file `kept`, under its name in an adapter. Return whether anything
    differed from it.
    """
    differs = False
    written = {folder / stored[place.key].file for among in places.values() for place in among}
    with contextlib.ExitStack() as stack:
        shards = {path: stack.enter_context(Shard(path, "r+b")) for path in written | ({kept} if kept else set())}
        adapters = {path: stack.enter_context(Shard(path)) for path in {one.path for one in sources.values()}}
        for name in tqdm(sorted(places, key=lambda name: places[name][0].key), desc="merging", unit="tensor"):
            source = sources[name]
            read = source.read(adapters[source.path])
            for place in places[name]:
                shard = shards[folder / stored[place.key].file]
                tensor = shard.read(place.key, place.row)
                part = place.select(tensor)
                value = source.value(read, part)
                if kept:
                    shards[kept].write(name, part)
                new = blend(part, value, strength).to(part.dtype)
                differs = differs or not torch.equal(part, new)
                part.copy_(new)
                shard.write(place.key, tensor, place.row)
    return differs


def write_end_tokens(model: nn.Module, adapters: list[Path], folder: Path, kept: Path | None) -> None:
    """Let generation also stop at what training taught as the end of an answer, as run.json of an adapter has it."""
    runs = [read_json(adapter / "run.json") for adapter in adapters if (adapter / "run.json").is_file()]
    taught = {token for run in runs for token in run.get("end_token_ids", [])}
    path = folder / GENERATION
    before = path.read_bytes() if path.is_file() else b""
    config = read_json(path) if before else model.generation_config.to_diff_dict()
    known = config.get("eos_token_id")
    known = set(known if isinstance(known, list) else [known]) - {None}
    if taught <= known:
        return
    if kept:
        kept.with_name(GENERATION).write_bytes(before)
    write_json(path, {**config, "eos_token_id": sorted(taught | known)})


def restore_end_tokens(replaced: Path, folder: Path) -> None:
    """Undo `write_end_tokens`."""
    if (kept := replaced / GENERATION).is_file():
        (folder / GENERATION).unlink()
        if before := kept.read_bytes():
            (folder / GENERATION).write_bytes(before)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="folder of the base, "
        "with config.json and *.safetensors; with --unmerge, the folder of a merge")  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--adapter_dir", type=Path, nargs="+", metavar="DIR", help="folders of adapters, with "
                      "expert_cfg.json and *.safetensors, that share no expert and no other parameter")  # fmt: skip
    what.add_argument("--unmerge", action="store_true", help="write the base of the last merge again, bit for bit")
    add("--strength", type=float, default=1.0, metavar="S", help="how much of the change to make: base + S x (tuned - "
        "base), computed in fp32 and rounded once. 0 is the base, 1 is as trained, up to 2 (default: 1)")  # fmt: skip
    add("--fill_lora", action="store_true", help="merge nothing: write a LoRA adapter of selected experts again, with "
        "zeros for the others of its layers, for servers that load all experts of a layer or none (vLLM)")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write: new or empty")
    again = "replace an earlier merge in --output_dir; refused if another file is in it"
    add("--overwrite", action="store_true", help=again)
    add("--no_replaced", action="store_true", help="do not keep what the merge overwrites: saves disk space, but the "
        "result cannot be unmerged")  # fmt: skip
    add("--hard_links", action="store_true", help="share the disk space of unchanged weight files with the base, where "
        "the file system can; never edit one of the two in place")  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    base, output = args.base_model_path, args.output_dir
    options = {"overwrite": args.overwrite, "hard_links": args.hard_links}
    if args.unmerge and args.strength != 1:
        raise ValueError("cannot unmerge with --strength: the base comes back bit for bit. Leave it out.")
    unused = [name for name in ("unmerge", "overwrite", "no_replaced", "hard_links") if getattr(args, name)]
    unused += ["strength"] * (args.strength != 1) + ["adapter_dir twice"] * (len(args.adapter_dir or [0]) > 1)
    if args.fill_lora and unused:
        raise ValueError(f"cannot fill a LoRA adapter with --{unused[0]}: nothing is merged. Leave it out.")
    with locked(output):
        if args.fill_lora:
            print(f"{output}: {fill_lora(base, args.adapter_dir[0], output)} tensors")
            return
        if args.unmerge:
            changed = unmerge(base, output, **options)
        else:
            options |= {"keep_replaced": not args.no_replaced, "strength": args.strength}
            changed = merge_adapter(base, args.adapter_dir, output, **options)
    print(f"{output}: {changed} tensors of {base} written anew")


if __name__ == "__main__":
    run_cli(main)
