"""Store frozen experts in less memory: as fp8, int8 or nf4, in host memory, or both. Trained experts are not touched.

    fused tensor (E, O, I)   [ kept: trained experts, in the model's dtype | frozen: bytes and scales, stored here ]

    fp8    e4m3(w / s), s = max |w| / 448 of each block of 128 x 128 entries. DeepSeek-V3's checkpoints have the same
           format, and their bytes and scales are stored unchanged (partial_loading.py).
    int8   round(w / s), s = max |w| / 127 of every 128 entries of a row
    nf4    the 4 bits of bitsandbytes, with a scale for every 64 entries (Dettmers et al. 2023)
    None   the model's dtype, for `offload` alone

A forward and a backward dequantize the matrices of a few experts at a time, and only of experts that receive tokens.
The matrices get the dtype of the computation. So products, and gradients of trained experts, are the usual ones.
The stored bytes are neither parameters nor buffers: a cast, an optimizer or a loader does not find them.

Legend: E experts on this rank, O and I rows and columns of a matrix.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepseek.experts import FusedExperts, require_own_forward
from deepseek.files import import_extra, named

DTYPES = ("fp8", "int8", "nf4")
CHUNK = 8  # experts that are dequantized at a time
BLOCKS = {"fp8": (128, 128), "int8": (1, 128)}  # entries that share a scale
LARGEST = {"fp8": 448.0, "int8": 127.0}
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
NF4_BLOCK = 64


@dataclass(frozen=True)
class Storage:
    """How the frozen experts of a model are stored: the dtype (of `DTYPES`, or None), in host memory or on the device.

    `keep` are the ids of the experts that are not stored so, by layer.
    """

    dtype: str | None = None
    offload: bool = False
    keep: Mapping[int, Collection[int]] = field(default_factory=dict)


# --------------------------------------------------------------------------------------------------------------------
# formats


def quantize(weight: Tensor, dtype: str | None) -> tuple[Tensor, ...]:
    """Return what is stored of matrices (E, O, I): (values,) or (values, scales), with the expert dimension first.

    Raises:
        ValueError: for nf4, bitsandbytes is missing or the matrices do not consist of whole blocks.
    """
    if dtype is None:
        return (weight.clone(),)
    if dtype == "nf4":
        return _quantize_nf4(weight)
    values, scale = scaled(_blocks(weight.float(), BLOCKS[dtype]), (2, 4), dtype)
    return _entries(values, weight.shape).to(STORED[dtype]), scale[:, :, 0, :, 0]


def scaled(entries: Tensor, dims: int | tuple[int, ...], dtype: str) -> tuple[Tensor, Tensor]:
    """Return the entries (fp32) over their scale, in the range of `dtype`, and the scales, one for all of `dims`."""
    largest = LARGEST[dtype]
    scale = entries.abs().amax(dims, keepdim=True) / largest
    # the clamp keeps the inverse of the scale finite, also for a block of zeros
    values = (entries / scale.clamp(min=torch.finfo(torch.float32).tiny)).clamp(-largest, largest)
    return values.round() if dtype == "int8" else values, scale


def dequantize(stored: tuple[Tensor, ...], dtype: str | None, shape: torch.Size, to: torch.dtype) -> Tensor:
    """Return the matrices of `shape` (e, O, I) that `quantize` stored, in the dtype `to`."""
    if dtype is None:
        return stored[0].to(to)
    if dtype == "nf4":
        return _dequantize_nf4(*stored, shape, to)
    values, scale = stored
    blocks = _blocks(values.to(torch.float32), BLOCKS[dtype])
    return _entries(blocks.mul_(scale[:, :, None, :, None]), shape).to(to)


def _blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Return (E, blocks down, rows of a block, blocks across, columns of a block), filled up with zeros."""
    (E, *sizes), (rows, columns) = weight.shape, block
    down, across = math.ceil(sizes[0] / rows), math.ceil(sizes[1] / columns)
    weight = nn.functional.pad(weight, (0, across * columns - sizes[1], 0, down * rows - sizes[0]))
    return weight.view(E, down, rows, across, columns)


def _entries(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_blocks`."""
    E, down, rows, across, columns = blocks.shape
    return blocks.reshape(E, down * rows, across * columns)[:, : shape[1], : shape[2]]


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight[0].numel() % NF4_BLOCK:
        raise ValueError(f"cannot use frozen_dtype=nf4: it needs matrices of a multiple of {NF4_BLOCK} entries, these "
                         f"have {weight.shape[1]} x {weight.shape[2]}. Give int8 or fp8.")  # fmt: skip
    with named("frozen_dtype=nf4"):
        functional = import_extra("bitsandbytes", "quant").functional
    values, state = functional.quantize_4bit(weight.reshape(-1), blocksize=NF4_BLOCK, quant_type="nf4")
    return values.view(len(weight), -1), state.absmax.view(len(weight), -1)


def _dequantize_nf4(values: Tensor, scale: Tensor, shape: torch.Size, to: torch.dtype) -> Tensor:
    from bitsandbytes import functional  # it is there, as it has quantized these values

    state = functional.QuantState(
        absmax=scale.reshape(-1),
        shape=torch.Size((scale.numel(), NF4_BLOCK)),  # on the CPU, a block of bitsandbytes does not span two rows
        dtype=to,
        blocksize=NF4_BLOCK,
        code=functional.get_4bit_type("nf4", device=scale.device),
        quant_type="nf4",
    )
    return functional.dequantize_4bit(values.reshape(-1, 1), state).view(shape)


# --------------------------------------------------------------------------------------------------------------------
# storage


class FrozenExperts(nn.Module):
    """The stored experts of one layer. Its fused matrices then have rows of kept experts only.

    `order_e` and `row_of_e` are as in `experts.TrainedExperts`: kept experts come first, then the stored ones, by id.
    """

    def __init__(self, layer: FusedExperts, dtype: str | None, offload: bool):
        super().__init__()
        self.dtype, self.offload, self.kept, self.ran = dtype, offload, 0, False
        self.stored: dict[str, tuple[Tensor, ...]] = {}  # by name of the fused matrix
        self.shapes: dict[str, torch.Size] = {}  # (O, I), by the same name
        self.order_e = torch.arange(len(layer.local_ids), device=layer.module.down_proj.device)
        self.row_of_e = self.order_e

    def _apply(self, fn, recurse=True):
        self.order_e, self.row_of_e = fn(self.order_e), fn(self.row_of_e)
        if not self.offload:
            self.stored = {name: tuple(fn(_as_bytes(t)).view(t.dtype) for t in ts) for name, ts in self.stored.items()}
        return super()._apply(fn, recurse)

    def set_order(self, order: list[int], kept: int) -> None:
        """Note the order of the rows. The first `kept` of them are in the fused tensors."""
        self.order_e, self.kept = torch.tensor(order, device=self.order_e.device), kept
        self.row_of_e = torch.argsort(self.order_e)

    def put(self, name: str, stored: tuple[Tensor, ...], shape: torch.Size) -> None:
        """Hold `stored`, as `quantize` returns it, for the matrices (O, I) = `shape` of the fused matrix `name`."""
        if self.offload:
            stored = tuple(t.cpu().pin_memory() if torch.cuda.is_available() else t.cpu() for t in stored)
        self.stored[name], self.shapes[name] = stored, shape

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows [start, stop) of the fused matrix `name`, dequantized. Row numbers include the kept rows."""
        part = slice(start - self.kept, stop - self.kept)
        device = self.order_e.device
        stored = (_as_bytes(t[part]).to(device, non_blocking=True).view(t.dtype) for t in self.stored[name])
        return dequantize(tuple(stored), self.dtype, torch.Size((stop - start, *self.shapes[name])), dtype)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the stored rows that are dequantized together."""
        for start in range(self.kept, len(self.order_e), CHUNK):
            yield start, min(start + CHUNK, len(self.order_e))

    def num_parameters(self) -> int:
        return (len(self.order_e) - self.kept) * sum(shape.numel() for shape in self.shapes.values())

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.stored.values() for t in tensors)


def _as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor as integers, which a cast of the model leaves alone."""
    return tensor.contiguous().view(torch.uint8)


def _take(tensors: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    return tuple(_as_bytes(t)[rows].view(t.dtype) for t in tensors)


def _cat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([_as_bytes(t) for t in tensors]).view(tensors[0].dtype)


@torch.no_grad()
def freeze_experts(
    layer: FusedExperts, keep: Iterable[int], dtype: str | None, offload: bool = False, to: torch.dtype | None = None
) -> None:
    """Store all experts of a layer except `keep` (ids) as `dtype`, and free their rows of the fused matrices.

    Fused matrices in fp8 with parameters `<name>_scale_inv` beside them are stored as they are. Kept rows get the dtype
    `to`, by default that of the fused matrices.
    """
    ids, keep = layer.local_ids, set(keep)
    first = [index for index, expert in enumerate(ids) if expert in keep]
    rest = [index for index, expert in enumerate(ids) if expert not in keep]
    frozen = FrozenExperts(layer, dtype, offload)
    for name in layer.tensor_names:
        fused = layer.tensor(name)
        if name not in layer.weight_names:
            fused.data.copy_(fused.data[first + rest])
            continue
        shape, to = fused.shape[1:], to or fused.dtype
        if (scale := layer.module._parameters.pop(f"{name}_scale_inv", None)) is not None:
            as_read = (fused.data, scale.data)
            kept = dequantize(_take(as_read, first), "fp8", torch.Size((len(first), *shape)), to)
            stored = _take(as_read, rest)
        else:
            # one expert after the other, because quantize works in fp32
            parts = [quantize(fused.data[index : index + 1], dtype) for index in rest]
            stored = tuple(_cat(part) for part in zip(*parts)) if parts else (fused.data[:0],)
            kept = fused.data[first].to(to)
        frozen.put(name, stored, shape)
        fused.data = kept
    frozen.set_order(first + rest, len(first))
    layer.module.frozen = frozen
    require_own_forward(layer.module)


@torch.no_grad()
def thaw_experts(layer: FusedExperts, ids: Iterable[int]) -> None:
    """Give stored experts their rows of the fused matrices again, with the values with which they compute."""
    frozen, local = layer.frozen, layer.local_ids
    if frozen is None:
        return
    assert layer.trained is None, "the trained experts determine the order of rows now"
    order, kept = frozen.order_e.tolist(), frozen.kept
    wanted = {local.index(expert) for expert in ids if expert in local}
    new = [row for row in range(kept, len(order)) if order[row] in wanted]
    rest = [row for row in range(kept, len(order)) if order[row] not in wanted]
    if not new:
        return
    rows = [*range(kept), *new, *rest]
    for name in layer.tensor_names:
        fused = layer.tensor(name)
        if name not in layer.weight_names:
            fused.data.copy_(fused.data[rows])
            continue
        thawed = [frozen.rows(name, row, row + 1, fused.dtype) for row in new]
        fused.data = torch.cat([fused.data, *thawed])
        frozen.put(name, _take(frozen.stored[name], [row - kept for row in rest]), frozen.shapes[name])
    frozen.set_order([order[row] for row in rows], kept + len(new))


def store_frozen(layer: FusedExperts, trained: Iterable[int], dtype: str | None, offload: bool) -> None:
    """Store the experts of a layer except `trained`. If they are stored already, check how, and thaw the trained ones.

    Raises:
        ValueError: they are stored already, in another way.
    """
    if layer.frozen is None:
        if dtype or offload:
            freeze_experts(layer, trained, dtype, offload)
        return
    stored = layer.frozen
    if (dtype or stored.dtype, offload or stored.offload) != (stored.dtype, stored.offload):
        raise ValueError(
            f"cannot store the frozen experts anew: they are stored as {stored.dtype or 'they were'} already. Give "
            "frozen_dtype and offload_frozen to load_base_model (frozen=...)."
        )
    thaw_experts(layer, trained)


def forbid_state_dict(model: nn.Module) -> None:
    """Make `model.state_dict()`, and so `save_pretrained`, raise a ValueError if experts are stored here."""
    for module in model.modules():
        if isinstance(module, FrozenExperts) and not module._state_dict_pre_hooks:
            module.register_state_dict_pre_hook(_refuse_state_dict)


def _refuse_state_dict(*_) -> None:
    raise ValueError(
        "cannot save this model as a plain checkpoint: its frozen experts are not stored as in the base. Save the "
        "adapter (save_adapter) and merge it on disk with scripts/merge_adapter.py."
    )
