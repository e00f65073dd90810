"""The state dict of a module with trained experts: names, shapes and order of the base, in and out.

The masters of the trained experts (experts.py) are not in it. Their values stand in their rows of the fused tensors,
whose rows are those of the base again. Tensors may be sharded by FSDP2.
"""

import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that FSDP2 has sharded as a whole one. All ranks call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


@torch.no_grad()
def state_dict_in_base_order(module: nn.Module, state_dict: dict, prefix: str, _metadata) -> None:
    trained = module.trained
    masters = dict(trained.named_parameters())
    for name in trained.tensor_names:
        if name in masters:
            state_dict.pop(f"{prefix}trained.{name}", None)
        if f"{prefix}{name}" in state_dict:
            fused = state_dict[f"{prefix}{name}"]
            rows = whole(fused)[trained.row_of_e.to(fused.device)]
            if name in masters:
                first = trained.order_e[: trained.num_trained].to(fused.device)
                rows[first] = whole(masters[name].data).to(rows)
            state_dict[f"{prefix}{name}"] = _sharded_like(rows, fused)


def load_in_base_order(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    trained = module.trained
    masters = dict(trained.named_parameters())
    names = trained.tensor_names
    here = {f"{prefix}{name}" for name in names} | {f"{prefix}trained.{name}" for name in masters}
    if not here & state_dict.keys() and any(re.search(r"experts\.\d+\.", key) for key in state_dict):
        raise ValueError(
            "cannot load the trained experts: this state dict names single experts, as save_pretrained writes "
            "them. Train with esft.ESFTCallback(), so that checkpoints can be loaded."
        )
    for name in names:
        if f"{prefix}{name}" in state_dict:
            loaded = state_dict[f"{prefix}{name}"]
            rows = whole(loaded)[trained.order_e.to(loaded.device)]
            state_dict[f"{prefix}{name}"] = _sharded_like(rows, loaded)
            if name in masters:
                state_dict[f"{prefix}trained.{name}"] = _sharded_like(rows[: trained.num_trained].float(), loaded)
