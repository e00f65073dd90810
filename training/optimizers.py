"""The optimizers of a run: those of transformers by their names, and Muon. Their states are those of single experts.

An 8-bit or 4-bit optimizer keeps one scale for every BLOCK entries of a parameter, and the experts of a layer are one
parameter. So a block can hold entries of two experts, unless the number of an expert's entries is a multiple of BLOCK.
Small parameters have 32-bit states, and what is small depends on the number of experts. `keep_experts_apart` makes the
states of an expert independent of its neighbours.
"""

import re

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import ExplicitEnum

from deepseek.adapters import find_state
from deepseek.experts import moe_layers
from deepseek.muon import Muon
from deepseek.optimizer_rows import BLOCK

MUON = {"momentum": r"0?\.\d+|0", "ns_steps": r"[1-9]\d?"}  # settings of Muon, and what they may be
SMALL = 4096  # entries of a parameter, below which bitsandbytes and torchao keep 32-bit states


class OwnOptimizer(ExplicitEnum):
    """Values of the key optim that transformers does not know."""

    MUON = "muon"


def optimizer_class(args: TrainingArguments, model: nn.Module) -> tuple[type[torch.optim.Optimizer], dict]:
    """Return the class of a run's optimizer and its settings, as Trainer.get_optimizer_cls_and_kwargs does."""
    if args.optim is not OwnOptimizer.MUON:
        return Trainer.get_optimizer_cls_and_kwargs(args, model)
    given = dict(pair.partition("=")[::2] for pair in (args.optim_args or "").replace(" ", "").split(",") if pair)
    if not all(re.fullmatch(MUON.get(key, "(?!)"), value) for key, value in given.items()):
        raise ValueError(
            f"optim_args={args.optim_args} is not momentum, from 0 to below 1, or ns_steps, from 1, of muon"
        )
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    settings |= {"layers": moe_layers(model, dense_ok=True).values()}
    return Muon, settings | {key: int(value) if key == "ns_steps" else float(value) for key, value in given.items()}


def keep_experts_apart(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Give 32-bit states to parameters of experts whose 8-bit or 4-bit states would have blocks in common.

    They are known by the shape of a row, since parameters come and go where a run changes its experts.
    """
    layers = moe_layers(model, dense_ok=True).values()
    rows = {param.shape[1:] for layer in layers if layer.trained for param in layer.trained.parameters()}
    if find_state(model) and not rows:  # this process has none yet
        rows = {layer.tensor(name).shape[1:] for layer in layers for name in layer.tensor_names}
    whole = {shape for shape in rows if shape.numel() % BLOCK or shape.numel() < SMALL}
    library = type(optimizer).__module__.partition(".")[0]
    if library == "bitsandbytes":  # its own way to do this holds for all optimizers of the process
        config_of = optimizer.get_config

        def get_config(group_index: int, index: int, group: dict) -> dict:
            bits = {"optim_bits": 32} if group["params"][index].shape[1:] in whole else {}
            return config_of(group_index, index, group) | bits

        optimizer.get_config = get_config
    if library == "torchao":
        quantized = optimizer._new_buffer
        optimizer._new_buffer = lambda p, signed: torch.zeros_like(p) if p.shape[1:] in whole else quantized(p, signed)
