"""The experts' products in fp8, on GPUs that have them: forward and input gradients. Weight gradients stay in bf16.

    y = x W^T      x_n ~ s_n q_n      W_o ~ t_o p_o      y_no = s_n t_o (q_n . p_o)      s, t: max |.| / 448, in fp32

q and p are e4m3, rounded by at most 1/16. Each token has a scale of its own, and so has each output channel of each
expert: an outlier spoils only its row. In the backward, dx = dy W, the tokens are the rows of dy, and the output
channels are the columns of W. So a matrix is quantized twice:

    W (O, I)   forward: p (O, I), a scale for each of O        backward: p (I, O), a scale for each of I

Frozen experts are quantized when they are first used, and when one of their layer was written to. Trained experts are
quantized in every forward, as their values change. The copies take 2 bytes per entry beside the fused tensors.

torch._scaled_grouped_mm multiplies on GPUs of compute capability 9. Elsewhere `_multiply` can emulate its rounding by
fp32 products, for tests and for measurements of the loss. The kernel has not been run.

Legend: N routed rows, E experts, O and I outputs and inputs of a product.
"""

import os
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import grouped_mm

from deepseek.experts import FusedExperts, moe_layers
from deepseek.frozen import scaled

EMULATE = "ESFT_EMULATE_FP8"  # set it to 1 in the environment to multiply as the kernel rounds, in fp32
Quantized = tuple[Tensor, Tensor]  # e4m3 (..., O, I), scales (..., O)


def quantize_rows(x: Tensor) -> Quantized:
    """Return rows (..., I) as e4m3, and the scale of each row in fp32."""
    values, scale = scaled(x.float(), -1, "fp8")
    return values.to(torch.float8_e4m3fn), scale.squeeze(-1)


def reason_against(device: torch.device) -> str | None:
    """Return why a device cannot multiply in fp8; None where it can, or where that is emulated."""
    if os.environ.get(EMULATE) == "1":
        return None
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a GPU of compute capability 9 (H100, H200)"
    return None


def check_fp8(layers: Iterable[FusedExperts], dtype: torch.dtype) -> None:
    """Check that experts of these shapes and this dtype can be multiplied in fp8.

    Raises:
        ValueError: they cannot.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f"cannot compute experts in fp8: the weights are {dtype}. Set dtype=bfloat16.")
    for layer in layers:
        if layer.frozen:
            stored = "the frozen experts are stored in another form"
            raise ValueError(f"cannot compute experts in fp8: {stored}. Leave out frozen_dtype and offload_frozen.")
        odd = [size for name in layer.weight_names for size in layer.tensor(name).shape[1:] if size % 16]
        if odd:
            what = f"an expert has a matrix with {odd[0]} rows or columns, which is not a multiple of 16"
            raise ValueError(f"cannot compute experts in fp8: {what}. Leave out expert_compute.")


class Fp8Experts:
    """The matrices of one layer's experts in fp8: copies, which follow the fused tensors."""

    def __init__(self):
        self._copies: dict[tuple[str, bool], Quantized] = {}  # by name of the fused matrix, and whether for a backward
        self._order: object = None  # of the rows that the copies have
        self.stale = True  # also by what was written to frozen rows since the last forward

    def refresh(self, layer: FusedExperts) -> None:
        """Bring the copies up to date before a forward: trained rows always, all if stale or in a new order."""
        S, stale = layer.num_trained, self.stale or self._order is not layer.row_order
        for name in layer.weight_names:
            weight = layer.tensor(name).data
            for backward in (False, True):
                source = weight.mT if layer.module.is_transposed != backward else weight
                if stale or self._copies[name, backward][0].device != weight.device:
                    parts = [quantize_rows(one) for one in source]  # one after the other, because it takes fp32
                    self._copies[name, backward] = tuple(map(torch.stack, zip(*parts)))
                elif S:
                    for copy, part in zip(self._copies[name, backward], quantize_rows(source[:S])):
                        copy[:S] = part
        self._order, self.stale = layer.row_order, False

    def linear(self, name: str, x_NI: Tensor, offs: Tensor, backward: bool) -> Tensor:
        """Multiply the rows of the first len(offs) experts by their matrices, which are transposed in the backward."""
        weight_EOI, scale_EO = (copy[: len(offs)] for copy in self._copies[name, backward])
        if not len(x_NI):
            return x_NI.new_empty(0, weight_EOI.shape[1])
        return _multiply(*quantize_rows(x_NI), weight_EOI, scale_EO, offs)


def _multiply(x_NI: Tensor, scale_N: Tensor, weight_EOI: Tensor, scale_EO: Tensor, offs: Tensor) -> Tensor:
    if os.environ.get(EMULATE) != "1":
        return torch._scaled_grouped_mm(x_NI, weight_EOI.mT, scale_N, scale_EO, offs=offs, out_dtype=torch.bfloat16)
    expert_N = torch.searchsorted(offs, torch.arange(len(x_NI), device=offs.device), right=True)
    y_NO = grouped_mm(x_NI.float(), weight_EOI.float().mT, offs=offs)
    return (y_NO * scale_N[:, None] * scale_EO[expert_N.clamp(max=len(offs) - 1)]).to(torch.bfloat16)


def compute_in_fp8(model: nn.Module) -> nn.Module:
    """Let the experts of a model multiply in fp8, in training and in evaluation. Return the model.

    Who writes to experts that are not trained calls `note_changes`.

    Raises:
        ValueError: `check_fp8`, or the device cannot.
    """
    layers = list(moe_layers(model).values())
    check_fp8(layers, model.dtype)
    if why := reason_against(layers[0].tensor("down_proj").device):
        raise ValueError(f"cannot compute experts in fp8: {why}.")
    for layer in layers:
        layer.module.fp8 = Fp8Experts()
    return model


def note_changes(model: nn.Module, experts_L: Mapping[int, Collection[int]]) -> None:
    """Note that these experts may have been written to, by layer, so that the next forward copies their layers anew."""
    for layer in moe_layers(model).values():
        if layer.fp8:  # trained rows are copied in every forward
            frozen = layer.ids_by_row[layer.num_trained :]
            layer.fp8.stale |= not set(frozen).isdisjoint(experts_L.get(layer.index, ()))
