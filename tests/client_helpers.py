"""Models in training: steps, logits, and what a program that trains a model has changed in it."""

import re

import torch

IDS = torch.randint(3, 128, (4, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def trainable(model) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def take_steps(model, ids=IDS, count: int = 3, lr: float = 1e-2) -> list[torch.Tensor]:
    """Take some steps of AdamW on some tokens, and return the loss before each."""
    optimizer, losses = torch.optim.AdamW(trainable(model), lr=lr), []
    for _ in range(count):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


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
