"""Count the floating-point operations that a model needs for a training step, and their share of a GPU's peak (MFU).

    forward            2 N  for a token, N the entries of the matrices that it meets: K of the E experts, and all else
    weight gradients   2 N' of the trained entries alone
    input gradients    2 N  of the layers above the first trained one, where the backward ends
    attention          2 (H d_qk + H d_v) for a query and a key that it sees, and twice that in the backward
    head               for tokens with a label alone

These are the operations of the mathematics, as in PaLM (arXiv 2204.02311, appendix B): what is computed again for
activation checkpointing or for a trained head is not counted. Tokens see the tokens before them in their document; a
sliding window is taken for full attention. Routed rows are taken to spread evenly over experts. Selected experts get
more than that, so the share is rather too low. Norms, convolutions, gates, and peft's products of adapters without a
token are left out.
"""

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import esft
from deepseek.experts import base_name, moe_layers
from training.data import IGNORE

# dense bf16 in FLOP/s, by a part of the device's name; the first that fits counts (NVIDIA's data sheets)
PEAKS = {
    "GB200": 2.5e15, "B300": 2.25e15, "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "A40": 150e12,
    "L40S": 362e12, "L4": 121e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class ModelFlops:
    """The operations of a training step, forward and backward, for each unit of work."""

    per_token: float
    per_label: float
    per_key: float  # a query and a key that it sees

    def of(self, work: Tensor) -> float:
        """Return the operations of the `work_of` batches."""
        costs = torch.tensor([self.per_token, self.per_label, self.per_key], dtype=work.dtype)
        return (work.cpu() @ costs).item()


def work_of(inputs: dict) -> Tensor:
    """Return (tokens, tokens with a label, keys that queries see) of a batch, as a tensor (3,) on its device."""
    positions_BT = inputs["position_ids"]
    tokens = torch.full((), positions_BT.numel(), device=positions_BT.device)
    labels, keys = (inputs["labels"][:, 1:] != IGNORE).sum(), (positions_BT + 1).sum()
    return torch.stack([tokens, labels, keys]).double()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the peak of a device in FLOP/s. None for a CPU, an unknown GPU, and dtypes other than bf16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass
class _Layer:
    """Entries of the matrices of a decoder layer that a token meets."""

    all: float = 0
    trained: float = 0
    trained_last: float = 0  # of these, in second matrices of an MLP: they need the gradient of their input
    trains_attention: bool = False
    attention: float = 0  # H d_qk + H d_v


def count_flops(model: nn.Module, references: int = 0) -> ModelFlops | None:
    """Count the operations of a prepared model. None if its config does not say how many experts a token meets.

    `references` are the forwards of a step that have no backward, as DPO's.
    """
    top_k = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if top_k is None:
        return None
    layers = _layers(model, top_k)
    head = model.get_output_embeddings().weight
    trained = [index for index, layer in layers.items() if layer.trained]
    if model.get_input_embeddings().weight.requires_grad:
        trained.append(-1)
    first = min(trained, default=len(layers))
    per_token = per_key = 0.0
    for index, layer in layers.items():
        back = index > first or layer.trains_attention
        per_token += (1 + references + back) * layer.all + layer.trained
        per_token += layer.trained_last if index == first and not back else 0
        per_key += (1 + references + 2 * back) * layer.attention
    per_label = head.numel() * (1 + references + bool(trained) + head.requires_grad)
    return ModelFlops(2.0 * per_token, 2.0 * per_label, 2.0 * per_key)


def _layers(model: nn.Module, top_k: int) -> dict[int, _Layer]:
    """Return the decoder layers by index."""
    layers: dict[int, _Layer] = defaultdict(_Layer)
    routed, selected = moe_layers(model, dense_ok=True), esft.trained_config(model)
    for name, param in model.named_parameters():
        if not (found := re.search(r"\.layers\.(\d+)\.", name)) or param.ndim < 2:
            continue
        index = int(found[1])
        layer, moe, lora = layers[index], routed.get(index), "lora_" in name
        entries = param.numel()
        if moe and base_name(name).startswith(f"{moe.name}."):
            if param.ndim == 2 and not lora:  # a bias
                continue
            entries *= top_k / moe.num_experts
            if ".trained." in name:  # this rank may hold only some of the trained experts
                entries *= len(selected.experts[index]) / moe.num_trained
            layer.all += entries if lora else 0  # the experts themselves are added below
        else:
            layer.all += entries
            if re.search(r"\.(q|q_b|o)_proj\.", name):
                layer.attention += 0 if lora else param.shape[".o_proj." in name]
                layer.trains_attention |= param.requires_grad
        layer.trained += entries * param.requires_grad
        layer.trained_last += entries * (param.requires_grad and "down_proj" in name)
    for index, moe in routed.items():
        layers[index].all += top_k * sum(moe.tensor(name).shape[1:].numel() for name in moe.weight_names)
    return dict(sorted(layers.items()))
