"""What a program that trains a model has changed in it."""

import re

import torch


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set:
    """What differs between two state dicts: (layer, expert) of fused experts, and the names of other tensors."""
    assert before.keys() == after.keys()
    found = set()
    for name, tensor in before.items():
        if not torch.equal(tensor, after[name]):
            layer = re.search(r"\.(\d+)\.(?:\w+\.)*experts\.", name)
            rows = [e for e in range(len(tensor)) if not torch.equal(tensor[e], after[name][e])] if layer else []
            found |= {(int(layer[1]), expert) for expert in rows} if layer else {name}
    return found


def chosen(config: dict) -> set[tuple[int, int]]:
    """(layer, expert) of an expert config."""
    return {(int(layer), expert) for layer, ids in config["experts"].items() for expert in ids}
