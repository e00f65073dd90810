"""Prove that what is frozen keeps its bits (`verify_frozen`): for the whole run, or for the part in which it is frozen.

Everything that is frozen is hashed when a run begins, and must have these hashes at its end. Where the trained experts
change, that holds for each part of the run between two changes:

    start | ... | checkpoint ... | change          | ...            | end
    hash          verify           verify    hash                     verify

A run that goes on from a checkpoint reads what was never trained from the base again. An expert that was trained and
frozen again comes from the checkpoint's adapter. The SHA-256 of that file is in the checkpoint's manifest.
"""

import hashlib
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from deepseek.experts import moe_layers
from deepseek.process_groups import Ranks
from training.expert_schedule import ExpertSchedule

logger = logging.getLogger("esft")


class FrozenProof:
    """The hashes of what is frozen now on this rank. `schedule` changes the experts."""

    def __init__(self, model: nn.Module, ranks: Ranks, schedule: ExpertSchedule | None = None):
        self.model, self.ranks, self.schedule = model, ranks, schedule
        self.hashes = frozen_hashes(model)
        if schedule:
            schedule.proof = self

    def verify(self, what: str = "go on", but: Mapping[int, Collection[int]] | None = None) -> None:
        """Raise on all ranks if a frozen tensor has lost its hash. Then take the hashes of what is frozen now.

        `but` are the experts, by layer, that begin to be trained or were given other values.
        """
        layers, before = moe_layers(self.model), self.hashes
        left_out = {f"{layers[layer].name}.{expert}" for layer, ids in (but or {}).items() for expert in ids}
        self.hashes = frozen_hashes(self.model)
        changed = [name for name in before if name not in left_out and before[name] != self.hashes.get(name)]
        lost = f"{len(changed)} of {len(before)} frozen tensors changed in training, {', '.join(changed[:1])} the first"
        self.ranks.raise_on_all(changed and f"cannot {what}: {lost}. This is a bug. Please report it.")

    def check(self, step: int) -> None:
        """Verify all at the end of a run of `step` steps, and log for how long it was proven. All ranks call this."""
        self.verify("save the model")
        on_all = " on every rank" if self.ranks.world_size > 1 else ""
        logger.info(f"  frozen: all {len(self.hashes)} tensors and experts kept their bits{on_all}")
        if spans := frozen_spans(self.schedule.changes, step) if self.schedule else []:
            how = f"{min(spans)} to {max(spans)} of {step} steps"
            logger.info(f"  frozen for a time: {len(spans)} times an expert kept its bits while it was frozen ({how})")


def frozen_spans(changes: Iterable[Mapping], steps: int) -> list[int]:
    """Return for how many steps of a run experts that it trained for a part of its `steps` were frozen, each time."""
    spans, since = [], {}
    for change in changes:
        layer, step = change["layer"], change["step"]
        spans += [step - since.pop((layer, expert), 0) for expert in change["added"]]
        since |= {(layer, expert): step for expert in change["removed"]}
    return spans + [steps - step for step in since.values()]


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """Return SHA-256 of what is not trained, as this rank holds it.

    A routed expert has the name <experts module>.<id>, and any other parameter or persistent buffer its own.
    """
    hashes = {name: _hash(*tensors) for name, tensors in _frozen_experts(model)}
    fused = {id(layer.tensor(name)) for layer in moe_layers(model).values() for name in layer.tensor_names}
    tensors = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        buffers, left_out = module.named_buffers(prefix, recurse=False), module._non_persistent_buffers_set
        tensors |= {name: buffer for name, buffer in buffers if name.rpartition(".")[2] not in left_out}
    others = {name: t for name, t in tensors.items() if not (t.requires_grad or id(t) in fused)}
    return hashes | {name: _hash(tensor) for name, tensor in others.items()}


def _frozen_experts(model: nn.Module) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield (name, tensors) of each frozen expert on this rank. LoRA on an expert leaves the expert itself frozen."""
    for layer in moe_layers(model).values():
        for row, expert in enumerate(layer.ids_by_row):
            if row < layer.num_trained and not layer.lora:
                continue
            tensors = [layer.tensor(name)[row] for name in layer.tensor_names if row < len(layer.tensor(name))]
            if layer.frozen and row >= layer.frozen.kept:
                tensors += [t[row - layer.frozen.kept] for ts in layer.frozen.stored.values() for t in ts]
            yield f"{layer.name}.{expert}", tensors


def _hash(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
