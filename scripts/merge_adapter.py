"""Merge an adapter into a base checkpoint on disk, shard by shard: a plain checkpoint, for any server to load.

    python scripts/merge_adapter.py --base_model_path=M --adapter_dir=A --output_dir=O

No model is built: names and shapes come from config.json (on the meta device), and at most one shard and the adapter
are in memory. Files, shards and index stay those of the base, and so do the bits of what the adapter does not hold.

How a checkpoint spells an expert differs by family (DeepSeek's `mlp.experts.7.gate_proj`, Mixtral's
`block_sparse_moe.experts.7.w1`, gpt_oss's fused `mlp.experts.gate_up_proj`), and transformers knows it: it splits its
fused tensors again when it saves. So that is asked, and not written down once more. Fused tensors in miniature, each
entry of which is a different number, go through transformers' own reverse conversion, and where a number comes out is
where the expert's projection lives:

    gate_up_proj (E, 2F, D), entries 0, 1, 2, ...  ->  {"...experts.7.w1.weight": [[1260, 1261, ..], ..], ..}
"""

import json
import math
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek.experts import LAYOUT_FLAGS, expert_views, find_experts, fused_names, split_projections
from deepseek.loading import empty_model
from esft import ExpertConfig, adapter_views, check_base, read_adapter, router_parameters
from utils import Parser, atomic_path, check_output, environment, run_cli, write_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOTE = "merged_from.json"  # what was merged; its folder is a merge's
# other weights, what is hidden, and the model card, which speaks of the base alone
NOT_COPIED = ("README.md", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", ".*")

Edit = tuple[Callable[[Tensor], Tensor], Tensor]  # the part of a checkpoint's tensor to overwrite, and what with


def merge_adapter(base: Path, adapter: Path, output: Path, overwrite: bool = False) -> int:
    """Write to `output` the checkpoint `base` with `adapter` in it; returns the number of tensors that changed.

    `overwrite` replaces what an earlier merge wrote there.

    Raises:
        ValueError, FileNotFoundError: a folder that is not what it should be, an adapter of another base, a tensor
            that the checkpoint does not hold or holds in another shape. Nothing is written then.
    """
    ours = overwrite and (output / NOTE).is_file()
    if output.exists() and not ours and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output}: exists already; give an --output_dir that does not")
    check_output(output, folder=True)
    files = checkpoint_files(base)
    if not adapter.is_dir():
        raise FileNotFoundError(f"adapter {adapter}: no such folder")
    config = ExpertConfig.load(adapter)
    model = meta_model(base)
    try:
        config.check(model)
        load_routers(model, base, files)
        check_base(model, adapter)
        edits = plan(model, config, read_adapter(adapter, adapter_views(model, config)), files)
        check_shapes(base, files, edits)
    except ValueError as error:
        raise ValueError(f"adapter {adapter}: {error}") from error

    with atomic_path(output) as folder:
        shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        for name in tqdm(sorted(set(files.values())), desc="merging", unit="shard"):
            write_shard(base / name, folder / name, edits)
        note = {"base_model_path": str(base), "adapter_dir": str(adapter), "environment": environment()}
        write_json(folder / NOTE, note)
        if ours:
            shutil.rmtree(output)
    return len(edits)


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
        with open_shard(base / WEIGHTS) as file:
            files = dict.fromkeys(file.keys(), WEIGHTS)
    else:
        raise FileNotFoundError(f"{base}: neither {WEIGHTS} nor {INDEX} in it; save the base as safetensors first")
    for name in sorted(set(files.values())):
        if not (base / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{base}: the shard {name} of its index is missing; fetch the base again")
    return files


def open_shard(path: Path):
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); fetch it again") from error


def meta_model(base: Path) -> nn.Module:
    """The model of a folder's config.json, without weights. Raises ValueError where it is quantized."""
    model = empty_model(base)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"model {base} is quantized: merge into its unquantized form")
    return model


def load_routers(model: nn.Module, base: Path, files: dict[str, str]) -> None:
    """Give the model without weights those of its routers, for the fingerprint."""
    for name in router_parameters(model):
        for key in ordinary_keys(model, name, files)[:1]:
            with open_shard(base / files[key]) as file:
                module_name, _, attribute = name.rpartition(".")
                value = nn.Parameter(file.get_tensor(key), requires_grad=False)
                setattr(model.get_submodule(module_name), attribute, value)


def plan(
    model: nn.Module, config: ExpertConfig, loaded: dict[str, Tensor], files: dict[str, str]
) -> dict[str, list[Edit]]:
    """What to overwrite, by checkpoint key. Raises ValueError where the checkpoint has no place for a tensor."""
    edits: dict[str, list[Edit]] = {}
    loaded = dict(loaded)
    for layer, (name, module) in find_experts(model).items():
        if not config.experts.get(layer):
            continue
        places = expert_places(model, name, module, files)
        for expert in config.experts[layer]:
            for projection in expert_views(module, expert):
                key, select = places[expert, projection]
                edits.setdefault(key, []).append((select, loaded.pop(f"{name}.{expert}.{projection}")))
    for name, value in loaded.items():
        for key in ordinary_keys(model, name, files):
            edits[key] = [(lambda tensor: tensor, value)]
    return edits


def ordinary_keys(model: nn.Module, name: str, files: dict[str, str]) -> list[str]:
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


def expert_places(model: nn.Module, name: str, module: nn.Module, files: dict[str, str]) -> dict:
    """(expert, projection) -> (checkpoint key, its part of that tensor), for the experts module `name`."""
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
    reverted = revert_weight_conversion(model, dict(fused_by_key))
    if not reverted.keys() & files.keys():  # saved without the reverse conversion
        reverted = fused_by_key
    if missing := sorted(reverted.keys() - files.keys()):
        raise ValueError(f"the checkpoint does not hold {missing[0]}")

    wanted = {(e, p): view for e in range(E) for p, view in expert_views(mini, e).items()}
    owner = {number: place for place, view in wanted.items() for number in view.flatten().tolist()}
    places = {}
    for key, numbers in reverted.items():
        expert, projection = owner[numbers.flatten()[0].item()]
        view = wanted[expert, projection]
        fused = next((f for f in fused_names(module) if torch.equal(getattr(mini, f), numbers)), None)
        if fused:
            for e in range(E):
                for p in split_projections(mini, fused, numbers[e]):
                    places[e, p] = key, partial(_part_of_fused, mini, fused, e, p)
        elif torch.equal(numbers, view):
            places[expert, projection] = key, lambda tensor: tensor
        elif torch.equal(numbers, view.T):
            places[expert, projection] = key, lambda tensor: tensor.T
    if lost := sorted(wanted.keys() - places.keys()):
        raise ValueError(f"the checkpoint stores {name} in a layout that this script cannot write: {lost[0]}")
    return places


def _part_of_fused(layout, fused: str, expert: int, projection: str, tensor: Tensor) -> Tensor:
    return split_projections(layout, fused, tensor[expert])[projection]


def check_shapes(base: Path, files: dict[str, str], edits: dict[str, list[Edit]]) -> None:
    """Raise ValueError where a tensor of the checkpoint has not the shape that the adapter has."""
    for name in sorted({files[key] for key in edits}):
        with open_shard(base / name) as file:
            present = set(file.keys())
            for key in (key for key in edits if files[key] == name):
                if key not in present:
                    raise ValueError(f"the base's {name} does not hold {key}, though its index says so")
                tensor = torch.empty(file.get_slice(key).get_shape(), device="meta")
                for select, value in edits[key]:
                    if select(tensor).shape != value.shape:
                        found, wanted = tuple(select(tensor).shape), tuple(value.shape)
                        raise ValueError(f"{key} of the base has shape {found}, the adapter's is {wanted}")


def write_shard(source: Path, target: Path, edits: dict[str, list[Edit]]) -> None:
    """Copy a shard, with what is to be overwritten overwritten, in the base's dtype."""
    with open_shard(source) as file:
        keys, metadata = list(file.keys()), file.metadata()
        if not edits.keys() & set(keys):
            shutil.copyfile(source, target)
            return
        tensors = {key: file.get_tensor(key) for key in keys}
    for key in edits.keys() & tensors.keys():
        tensors[key] = tensors[key].clone()
        for select, value in edits[key]:
            select(tensors[key]).copy_(value)
    save_file(tensors, target, metadata=metadata)


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--base_model_path", "--model", type=Path, required=True, metavar="DIR", help="folder of the base: "
        "config.json, *.safetensors")  # fmt: skip
    add("--adapter_dir", type=Path, required=True, metavar="DIR", help="folder of the adapter: expert_cfg.json, "
        "*.safetensors")  # fmt: skip
    add("--output_dir", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet, or be "
        "empty")  # fmt: skip
    add("--overwrite", action="store_true", help="replace what an earlier merge left in --output_dir")
    args = parser.parse_args()
    changed = merge_adapter(args.base_model_path, args.adapter_dir, args.output_dir, args.overwrite)
    print(f"{args.output_dir}: {changed} tensors of the base replaced or edited")


if __name__ == "__main__":
    run_cli(main)
