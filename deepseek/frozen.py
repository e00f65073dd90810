"""Frozen experts in less memory: as fp8, int8 or nf4, in host memory, or both. The trained ones are not touched.

    fused tensor (E, O, I)   [ kept: trained experts, in the model's dtype | frozen: bytes and scales, here ]

    fp8    e4m3(w / s), s = max |w| / 448 for every block of 128 x 128 entries, as DeepSeek-V3's checkpoints have it,
           whose bytes and scales are taken over as they are (loading.py)
    int8   round(w / s), s = max |w| / 127 for every 128 entries of a row
    nf4    bitsandbytes' 4 bits, with a scale for every 64 entries (Dettmers et al. 2023)
    none   as they are, for `offload` alone

A forward (and a backward) makes the matrices of a few experts at a time, in the dtype it computes in, only where tokens
go to them; so all that is computed is a grouped product as ever, and the weight gradient of the trained experts is that
of unquantized ones. The bytes are no parameters and no buffers: no cast, optimizer, sharding or loading finds them.

Legend: E experts (under expert parallelism, those of this rank), O and I rows and columns of a matrix.
"""

import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deepseek.experts import FusedExperts

DTYPES = ("fp8", "int8", "nf4")
CHUNK = 8  # experts whose matrices exist at a time
BLOCKS = {"fp8": (128, 128), "int8": (1, 128)}  # entries that share a scale
LARGEST = {"fp8": 448.0, "int8": 127.0}
STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
NF4_BLOCK = 64


@dataclass(frozen=True)
class Storage:
    """How the frozen experts of a model are stored: a dtype of `DTYPES` or the model's (None), in host memory or on the
    device; and the experts (ids, by layer) that are not stored so."""

    dtype: str | None = None
    offload: bool = False
    keep: Mapping[int, Collection[int]] = field(default_factory=dict)


def quantize(weight: Tensor, dtype: str | None) -> tuple[Tensor, ...]:
    """(E, O, I) -> what is stored: (values,) or (values, scales), expert dimension first.

    Raises:
        ValueError: nf4 without bitsandbytes, or of matrices that do not consist of whole blocks.
    """
    if dtype is None:
        return (weight.clone(),)
    if dtype == "nf4":
        return _quantize_nf4(weight)
    w, largest = _blocks(weight.float(), BLOCKS[dtype]), LARGEST[dtype]
    scale = w.abs().amax((2, 4)) / largest
    # a block of zeros stays one, and a scale is a normal number, whose inverse is finite
    q = (w / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, :, None, :, None]).clamp(-largest, largest)
    q = q.round() if dtype == "int8" else q
    return _entries(q, weight.shape).to(STORED[dtype]), scale


def dequantize(stored: tuple[Tensor, ...], dtype: str | None, shape: torch.Size, to: torch.dtype) -> Tensor:
    """What `quantize` stored of (e, O, I) = `shape`, in the dtype `to`."""
    if dtype is None:
        return stored[0].to(to)
    if dtype == "nf4":
        return _dequantize_nf4(*stored, shape, to)
    values, scale = stored
    w = _blocks(values.to(torch.float32), BLOCKS[dtype])
    return _entries(w.mul_(scale[:, :, None, :, None]), shape).to(to)


def _blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """(E, O, I) -> (E, blocks down, rows of a block, blocks across, columns of a block), filled up with zeros."""
    (E, *sizes), (rows, columns) = weight.shape, block
    down, across = math.ceil(sizes[0] / rows), math.ceil(sizes[1] / columns)
    weight = nn.functional.pad(weight, (0, across * columns - sizes[1], 0, down * rows - sizes[0]))
    return weight.view(E, down, rows, across, columns)


def _entries(blocks: Tensor, shape: torch.Size) -> Tensor:
    E, down, rows, across, columns = blocks.shape
    return blocks.reshape(E, down * rows, across * columns)[:, : shape[1], : shape[2]]


def _bitsandbytes():
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here calls
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ValueError(
            "frozen_dtype=nf4 needs bitsandbytes: python -m pip install -c constraints.txt bitsandbytes"
        ) from error
    return functional


def _quantize_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    if weight[0].numel() % NF4_BLOCK:
        raise ValueError(f"frozen_dtype=nf4 needs matrices of a multiple of {NF4_BLOCK} entries, these have "
                         f"{weight.shape[1]} x {weight.shape[2]}: give int8 or fp8")  # fmt: skip
    values, state = _bitsandbytes().quantize_4bit(weight.reshape(-1), blocksize=NF4_BLOCK, quant_type="nf4")
    return values.view(len(weight), -1), state.absmax.view(len(weight), -1)


def _dequantize_nf4(values: Tensor, scale: Tensor, shape: torch.Size, to: torch.dtype) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(
        absmax=scale.reshape(-1),
        shape=torch.Size((scale.numel(), NF4_BLOCK)),  # on the CPU, blocks of bitsandbytes do not go over rows
        dtype=to,
        blocksize=NF4_BLOCK,
        code=functional.get_4bit_type("nf4", device=scale.device),
        quant_type="nf4",
    )
    return functional.dequantize_4bit(values.reshape(-1, 1), state).view(shape)


class FrozenExperts(nn.Module):
    """The frozen experts of one experts module, whose fused weights then have rows of kept experts only.

    `order_e` and `row_of_e` are as in `experts.TrainedExperts`: kept experts first, then those here, by id.
    """

    def __init__(self, layer: FusedExperts, dtype: str | None, offload: bool):
        super().__init__()
        self.dtype, self.offload, self.kept = dtype, offload, 0
        self.stored: dict[str, tuple[Tensor, ...]] = {}  # by name of the fused weight
        self.shapes: dict[str, torch.Size] = {}  # (O, I) by the same
        self.order_e = torch.arange(len(layer.local_ids), device=layer.module.down_proj.device)
        self.row_of_e = self.order_e

    def _apply(self, fn, recurse=True):
        self.order_e, self.row_of_e = fn(self.order_e), fn(self.row_of_e)
        if not self.offload:
            self.stored = {name: tuple(fn(_as_bytes(t)).view(t.dtype) for t in ts) for name, ts in self.stored.items()}
        return super()._apply(fn, recurse)

    def put(self, name: str, stored: tuple[Tensor, ...], shape: torch.Size) -> None:
        """Hold `stored` (of `quantize`) as the frozen experts of the fused weight `name`, of matrices (O, I)."""
        if self.offload:
            stored = tuple(t.cpu().pin_memory() if torch.cuda.is_available() else t.cpu() for t in stored)
        self.stored[name], self.shapes[name] = stored, shape

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) of the fused weight `name`, counted with the kept ones: (stop - start, O, I)."""
        part = slice(start - self.kept, stop - self.kept)
        stored = tuple(_as_bytes(t[part]).to(self.order_e.device, non_blocking=True).view(t.dtype)
                       for t in self.stored[name])  # fmt: skip
        return dequantize(stored, self.dtype, torch.Size((stop - start, *self.shapes[name])), dtype)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of rows whose matrices are made together."""
        for start in range(self.kept, len(self.order_e), CHUNK):
            yield start, min(start + CHUNK, len(self.order_e))

    def num_parameters(self) -> int:
        return (len(self.order_e) - self.kept) * sum(shape.numel() for shape in self.shapes.values())

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.stored.values() for t in tensors)


def forbid_state_dict(model: nn.Module) -> None:
    """Make `model.state_dict()`, and so `save_pretrained`, raise a ValueError where experts are stored here."""
    for module in model.modules():
        if isinstance(module, FrozenExperts) and not module._state_dict_pre_hooks:
            module.register_state_dict_pre_hook(_no_state_dict)


def _no_state_dict(*_) -> None:
    raise ValueError(
        "of this model no plain checkpoint can be made: its frozen experts are stored otherwise than in the base; save "
        "the adapter (save_adapter) and merge that on disk, with scripts/merge_adapter.py"
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    """So that a cast of the model, which is meant for floating-point tensors, passes over it."""
    return tensor.contiguous().view(torch.uint8)


@torch.no_grad()
def freeze_experts(
    layer: FusedExperts, keep: Iterable[int], dtype: str | None, offload: bool = False, to: torch.dtype | None = None
) -> None:
    """Store all experts of a module but those of `keep` (ids) as `dtype`; their fused rows are given back.

    Fused weights in fp8 with parameters `<name>_scale_inv` beside them are stored as they are. `to` is the dtype of the
    kept rows (default: that of the fused weights).
    """
    ids, keep = layer.local_ids, set(keep)
    first = [index for index, expert in enumerate(ids) if expert in keep]
    rest = [index for index, expert in enumerate(ids) if expert not in keep]
    frozen = FrozenExperts(layer, dtype, offload)
    frozen.kept = len(first)
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
            # expert by expert: one's matrix in fp32 is small beside all of them
            parts = [quantize(fused.data[index : index + 1], dtype) for index in rest]
            stored = tuple(_cat(part) for part in zip(*parts)) if parts else (fused.data[:0],)
            kept = fused.data[first].to(to)
        frozen.put(name, stored, shape)
        fused.data = kept
    _set_order(frozen, first + rest)
    layer.module.frozen = frozen


def _take(tensors: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    return tuple(_as_bytes(t)[rows].view(t.dtype) for t in tensors)


def _cat(tensors: Iterable[Tensor]) -> Tensor:
    tensors = list(tensors)
    return torch.cat([_as_bytes(t) for t in tensors]).view(tensors[0].dtype)


@torch.no_grad()
def thaw_experts(layer: FusedExperts, ids: Iterable[int]) -> None:
    """Give experts of a frozen module their rows of the fused tensors again, with the values they compute with."""
    frozen, local = layer.frozen, layer.local_ids
    if frozen is None:
        return
    assert layer.trained is None, "the order of rows is the trained experts' now"
    order = frozen.order_e.tolist()
    wanted = {local.index(expert) for expert in ids if expert in local}
    new = [row for row in range(frozen.kept, len(order)) if order[row] in wanted]
    rest = [row for row in range(frozen.kept, len(order)) if order[row] not in wanted]
    if not new:
        return
    rows = [*range(frozen.kept), *new, *rest]
    for name in layer.tensor_names:
        fused = layer.tensor(name)
        if name in layer.weight_names:
            thawed = [frozen.rows(name, row, row + 1, fused.dtype) for row in new]
            fused.data = torch.cat([fused.data, *thawed])
            frozen.put(name, _take(frozen.stored[name], [row - frozen.kept for row in rest]), frozen.shapes[name])
        else:
            fused.data.copy_(fused.data[rows])
    frozen.kept += len(new)
    _set_order(frozen, [order[row] for row in rows])


def _set_order(frozen: FrozenExperts, order: list[int]) -> None:
    frozen.order_e = torch.tensor(order, device=frozen.order_e.device)
    frozen.row_of_e = torch.argsort(frozen.order_e)
