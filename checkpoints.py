"""What an output folder holds: a run, and checkpoints that survive whatever ends it and open on other ranks.

    checkpoint-20/
        adapter.safetensors, expert_cfg.json     a loadable adapter; of `method: full` and `lora`, what Trainer writes
        states/rank-0.safetensors, ...           per trained tensor: fp32 master (of a bf16 model) and optimizer states,
                                                 by global expert id: <experts module>.<id>.<fused tensor>.exp_avg
        states/optimizer.json                    parameter groups (learning rate, betas, ...)
        scheduler.json, trainer_state.json       of Trainer
        manifest.json                            SHA-256 of every other file, written last

A rank writes the states of the experts it holds; to read, it looks its experts up in all the files, so that ep_size and
world_size may change in between.
"""

import dataclasses
import json
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import esft
from data import resolve_dataset
from deepseek.experts import find_experts
from utils import check_output, set_modes, sha256, write_json

MANIFEST = "manifest.json"
STATES = "states"
GROUPS = "optimizer.json"
BLOCK = 256  # entries that share a scale in the 8-bit optimizers of bitsandbytes
BLOCKWISE, TABLES = ("absmax1", "absmax2"), ("qmap1", "qmap2")  # their states that are not of the parameter's shape
LAYOUT = (  # how a run lies on processes: it may change when the run goes on
    "ep_size",
    "placement",
    "expert_scores_dir",
    "shard_dense",
    "global_batch_size",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "ddp_timeout",
    "activation_checkpointing",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_persistent_workers",
    "disable_tqdm",
    "logging_steps",
    "report_to",
    "output_dir",  # a folder that was moved is still that run
)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def found(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, oldest first."""
    return sorted((p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)), key=step_of)


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    set_modes(checkpoint)
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    write_json(checkpoint / MANIFEST, {str(path.relative_to(checkpoint)): sha256(path) for path in files})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: a file that its manifest does not know as it is; None where it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        for name, digest in manifest.items():
            if sha256(checkpoint / name) != digest:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def _trained(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, list[str] | None]]:
    """(trained parameter, its name, names of its rows where they are experts)."""
    known = set()
    for name, module in find_experts(model).values():
        if hasattr(module, "trained"):
            for tensor, param in module.trained.named_parameters():
                known.add(id(param))
                yield param, f"{name}.{tensor}", [f"{name}.{id}.{tensor}" for id in module.trained.expert_ids]
    for name, param in model.named_parameters():
        if param.requires_grad and id(param) not in known:
            yield param, name, None


def save_states(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Write optimizer states, and the fp32 masters of a bf16 model, of the parameters that this rank trains; of those
    that all ranks train, rank 0 writes them.

    Raises:
        ValueError: an optimizer whose states cannot be told apart by expert.
    """
    tensors: dict[str, Tensor] = {}
    for param, name, rows in _trained(model):
        if rows is None and rank:
            continue
        states = {key: torch.as_tensor(value) for key, value in optimizer.state.get(param, {}).items()}
        if model.dtype != torch.float32:
            states["master"] = param.detach()
        for key, state in states.items():
            if rows is None:
                tensors[f"{name}.{key}"] = state
            else:
                by_row = _by_row(key, state, param)
                tensors |= {f"{row}.{key}": by_row[i] for i, row in enumerate(rows)}
    save_file(
        {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()},
        folder / f"rank-{rank}.safetensors",
    )
    if rank == 0:
        plain = (int, float, bool, str, list, tuple, type(None))
        groups = [{k: v for k, v in g.items() if isinstance(v, plain)} for g in optimizer.param_groups]
        write_json(folder / GROUPS, [{k: v for k, v in group.items() if k != "params"} for group in groups])


def _by_row(key: str, state: Tensor, param: nn.Parameter) -> Tensor | list[Tensor]:
    """The part of an optimizer's state that belongs to each row (expert) of a parameter."""
    if not state.ndim or key in TABLES:  # the same for all
        return [state] * len(param)
    if state.shape == param.shape:
        return state
    if key in BLOCKWISE and param[0].numel() % BLOCK == 0:
        return state.view(len(param), -1)
    raise ValueError(
        f"the optimizer's {key} cannot be told apart by expert: take optim=adamw_torch_fused, or leave out "
        "--save_opt_states"
    )


@torch.no_grad()
def load_states(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what `save_states` wrote on any number of ranks, for the parameters that this rank trains."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
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
                raise ValueError(f"{folder}: experts of {name} have states in 8 and in 32 bits; go on with the ep_size "
                                 "of before")  # fmt: skip
            parts = [where[f"{row}.{kind}"].get_tensor(f"{row}.{kind}") for row in rows or [name]]
            if not rows or not parts[0].ndim or kind in TABLES:
                state[kind] = parts[0]
            else:
                state[kind] = torch.cat(parts) if kind in BLOCKWISE else torch.stack(parts)
            if not state[kind].ndim and not state[kind].is_floating_point():
                state[kind] = state[kind].item()  # the step, which bitsandbytes keeps as a number
        if "master" in state:
            param.copy_(state.pop("master"))
        states[number_of[id(param)]] = state
    groups = [
        {**now, **saved}
        for now, saved in zip(optimizer.state_dict()["param_groups"], json.loads((folder / GROUPS).read_text()))
    ]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


# --------------------------------------------------------------------------------------------------------------------
# the run in a folder


def find_run(config, packs_per_step: int) -> tuple[Path | None, dict | None]:
    """(checkpoint to go on from, results of a finished run): what the output folder holds already.

    Raises:
        ValueError: the folder holds another run, or files that no run of ours made.
    """
    folder = Path(config.output_dir)
    check_output(folder, folder=True)
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return None, None
    try:
        before = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        was = _flat(before)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--output_dir {folder} is not empty and holds no run of ours: give a fresh one") from error
    now = _flat(json.loads(json.dumps(run_note(config, packs_per_step))))
    differing = [key for key in sorted(now.keys() | was.keys()) if now.get(key) != was.get(key) and key != "overwrite"]
    started_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun: what is here is its own
    if config.overwrite and (differing or before.get("results") or not started_again):
        return None, None
    if differing:
        raise ValueError(
            f"--output_dir {folder} holds another run (it differs in {', '.join(differing)}): give a fresh "
            "--output_dir, or overwrite=true"
        )
    if before.get("results"):
        return None, before["results"]
    if not config.save_opt_states:
        if (kept := found(folder)) and not started_again:
            raise ValueError(
                f"--output_dir {folder} holds a run broken off, whose {kept[-1].name} is a loadable adapter, but "
                "without --save_opt_states nothing to go on from: give a fresh --output_dir, or overwrite=true"
            )
        warnings.warn(f"{folder} holds a run broken off without --save_opt_states: it starts over", stacklevel=2)
        return None, None
    for checkpoint in reversed(found(folder)):
        if (reason := damage(checkpoint)) is None:
            return checkpoint, None
        warnings.warn(f"{checkpoint} is damaged ({reason}) and will be written again", stacklevel=2)
    return None, None


def run_note(config, packs_per_step: int) -> dict:
    """What makes a run this run: its config, how much a step sees, SHA-256 of the files it reads beside its model."""
    paths = {"train_dataset": resolve_dataset(config.train_dataset)}
    if config.method in ("esft", "random"):
        path = Path(config.expert_config)
        paths["expert_config"] = path / esft.CONFIG_NAME if path.is_dir() else path
    files = {key: path for key, path in paths.items() if isinstance(path, Path) and path.is_file()}
    return {
        "config": dataclasses.asdict(config),
        "packs_per_step": packs_per_step,
        "inputs": {key: sha256(path) for key, path in files.items()},
    }


def _flat(note: dict) -> dict:
    """The keys of a run that must not change when it goes on: not how it lies on processes."""
    contents = {f"the content of {key}": digest for key, digest in note.get("inputs", {}).items()}
    keys = {**note["config"], **note["config"]["training"], "training": None, **contents}
    keys |= dict.fromkeys(note.get("inputs", {}))  # whatever the path to them
    if os.path.isdir(keys["base_model_path"]):
        keys["base_model_path"] = os.path.realpath(keys["base_model_path"])
    return {key: value for key, value in keys.items() if key not in LAYOUT} | {"packs per step": note["packs_per_step"]}


def clear(folder: Path, overwrite: bool, checkpoint: Path | None) -> None:
    """Remove what an earlier try left and this one does not go on from."""
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    for path in found(folder):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            shutil.rmtree(path)
    for path in folder.glob(".adapter.safetensors.*"):  # of a save that was killed
        shutil.rmtree(path, ignore_errors=True)
