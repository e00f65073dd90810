"""The files of a checkpoint, which other ranks can open, and how to find one that is whole.

    checkpoint-20/
        adapter.safetensors, expert_cfg.json     a loadable adapter (for methods full and lora, what Trainer writes)
        states/rank-0.safetensors, ...           per trained tensor: optimizer states, and the fp32 master of a bf16
                                                 model, by expert id: <experts module>.<id>.<fused tensor>.exp_avg
        states/optimizer.json                    parameter groups (learning rate, betas, ...)
        selection.json                           the experts that are trained now, if these change (expert_schedule.py)
        scheduler.json, trainer_state.json       as Trainer has them
        manifest.json                            SHA-256 of every other file, written last

A rank writes the states of the experts that it holds. To read, it looks its experts up in all the files. So ep_size and
world_size may change in between.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deepseek.experts import moe_layers
from deepseek.files import read_json, set_modes, sha256, write_json
from deepseek.optimizer_rows import by_row, join_parts, join_rows, parts_of

MANIFEST = "manifest.json"
STATES = "states"
GROUPS = "optimizer.json"


def write_manifest(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    set_modes(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / MANIFEST, {str(path.relative_to(checkpoint)): sha256(path) for path in files})


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None where every file is the one that the manifest names."""
    try:
        manifest = read_json(checkpoint / MANIFEST)
        for name, digest in manifest.items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _trained(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, list[str] | None]]:
    """Yield (trained parameter, its name, the names of its rows where they are experts)."""
    known = set()
    for layer in moe_layers(model).values():
        if not layer.trained:
            continue
        masters = dict(layer.trained.named_parameters())
        known |= set(map(id, masters.values()))
        parts = [(part.expert_ids, part.params) for part in layer.trained.parts]
        for ids, params in parts or [(layer.trained.expert_ids, masters)]:
            for tensor, param in params.items():
                yield param, f"{layer.name}.{tensor}", [f"{layer.name}.{expert}.{tensor}" for expert in ids]
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in known:
            yield param, name, None


def save_states(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Write the optimizer states of the parameters that this rank trains, and their fp32 masters in a bf16 model.

    Rank 0 writes those of the parameters that all ranks train.

    Raises:
        ValueError: the optimizer's states cannot be told apart by expert.
    """
    tensors: dict[str, Tensor] = {}
    for param, name, rows in _trained(model):
        if rows is None and rank:
            continue
        states = parts_of(optimizer.state.get(param, {}))
        if model.dtype != torch.float32:
            states["master"] = param.detach()
        for key, state in states.items():
            if rows is None:
                tensors[f"{name}.{key}"] = state
            else:
                parts = by_row(key, state, param)
                tensors |= {f"{row}.{key}": parts[i] for i, row in enumerate(rows)}
    save_file(
        {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
        folder / f"rank-{rank}.safetensors",
    )
    if rank == 0:
        plain = (int, float, bool, str, list, tuple, type(None))
        groups = [{k: v for k, v in g.items() if isinstance(v, plain)} for g in optimizer.param_groups]
        write_json(folder / GROUPS, [{k: v for k, v in group.items() if k != "params"} for group in groups])


@torch.no_grad()
def load_states(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save_states` wrote on any number of ranks, for the parameters that this rank trains."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    kinds = defaultdict(list)
    for key in where:
        name, _, kind = key.rpartition(".")
        kinds[name].append(kind)
    number_of = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states: dict[int, dict[str, Tensor]] = {}
    for param, name, rows in _trained(model):
        state = {}
        for kind in kinds[rows[0] if rows else name]:
            if any(kind not in kinds[row] for row in rows or ()):
                raise ValueError(f"cannot resume from {folder}: its states are in 8 and in 32 bits. Keep the ep_size.")
            parts = [where[f"{row}.{kind}"].get_tensor(f"{row}.{kind}") for row in rows or [name]]
            state[kind] = join_rows(kind, parts) if rows else parts[0]
            if not state[kind].ndim and not state[kind].is_floating_point():
                state[kind] = state[kind].item()  # the step, which bitsandbytes keeps as a number
        if "master" in state:
            param.copy_(state.pop("master"))
        states[number_of[id(param)]] = join_parts(state, param, optimizer)
    groups = [
        {**now, **saved}
        for now, saved in zip(optimizer.state_dict()["param_groups"], json.loads((folder / GROUPS).read_text()))
    ]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
