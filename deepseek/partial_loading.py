"""Read only some experts of a checkpoint, or store experts while they are read.

transformers' `from_pretrained` builds the model on the meta device. Then it calls the model's `_load_pretrained_model`
with the files of the checkpoint. `class_that_reads` makes a subclass with another version of this one method:

    files -> slices of tensors, not yet read -> the slices of this rank's experts, by layer -> transformers' conversion

Without `frozen`, transformers converts all layers in one pass. With `frozen`, each MoE layer is read, converted and
stored before the next one is read. So the experts of one layer at most are in memory in full.
"""

import contextlib
import copy
import dataclasses
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from safetensors import safe_open
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationMethod

from deepseek.experts import MoELayer, moe_layers
from deepseek.frozen import BLOCKS, Storage, freeze_experts


def quantization(config: PreTrainedConfig) -> str | None:
    """Return the format in which a checkpoint is quantized, as its config names it."""
    found = config.to_dict().get("quantization_config")
    method = found and found["quant_method"]
    return method.value if isinstance(method, QuantizationMethod) else method


def class_that_reads(
    cls: type[nn.Module], experts: Mapping[int, Iterable[int]] | None, frozen: Storage | None
) -> type[nn.Module]:
    """Return a subclass of a transformers model. Its `from_pretrained` reads and holds some experts only.

    Args:
        experts: ids of the experts to read, by layer; None reads all.
        frozen: how the experts are stored as they are read; None keeps the model's dtype.
    """

    def load(model, state_dict, checkpoint_files, load_config, *args):
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise ValueError("expert parallelism and frozen_dtype read *.safetensors only: convert the checkpoint")
        layers = moe_layers(model)
        if experts is not None:
            for layer in layers.values():
                layer.keep_local(experts[layer.index])
        files = [safe_open(file, "pt") for file in checkpoint_files]
        slices = {key: Slice(file.get_slice(key)) for file in files for key in file.keys()}  # noqa: SIM118
        if quantization(model.config) == "fp8":
            block = tuple(load_config.hf_quantizer.quantization_config.weight_block_size or ())
            as_stored = frozen is not None and frozen.dtype == "fp8" and block == BLOCKS["fp8"]
            kept = _prepare_fp8(slices, layers if as_stored else {}, block)
            if (anew := sorted(layers.keys() - kept)) and frozen is not None and frozen.dtype == "fp8":
                warnings.warn(
                    f"the experts of layers {', '.join(map(str, anew))} are not stored in fp8 in blocks of 128 x 128: "
                    "they are rounded to it. frozen_dtype=int8 rounds less.",
                    stacklevel=2,
                )
        mapping = get_model_conversion_mapping(model, None, load_config.hf_quantizer)
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        kept_L = _local_slices(model, slices, layers, mapping)
        if frozen is None:
            local = {key: one for part in kept_L.values() for key, one in part.items()}
            loaded = cls._load_pretrained_model(model, local, None, load_config, *args)
        else:
            loaded = load_and_freeze(model, kept_L, load_config, frozen)
        model.read_bytes = sum(one.read_bytes for part in kept_L.values() for one in part.values())
        model.__class__ = cls
        return loaded

    return type(cls.__name__, (cls,), {"_load_pretrained_model": staticmethod(load)})


def load_and_freeze(model: nn.Module, kept_L: Mapping[int | None, dict], load_config, frozen: Storage) -> tuple:
    """Do what transformers' `_load_pretrained_model` does, one MoE layer after the other, and store each one."""
    layers = moe_layers(model)
    info, offloaded = convert_and_load_state_dict_in_model(model, kept_L[None], load_config, None)
    with no_bars():
        for index in tqdm(layers, desc=f"experts as {frozen.dtype or 'they are'}", unit="layer"):
            one, _ = convert_and_load_state_dict_in_model(model, kept_L[index], load_config, None)
            info.missing_keys &= one.missing_keys
            info.mismatched_keys |= one.mismatched_keys
            info.unexpected_keys |= one.unexpected_keys
            info.conversion_errors |= one.conversion_errors
            info.error_msgs += one.error_msgs
            if not one.mismatched_keys and not one.conversion_errors:
                keep = frozen.keep.get(index, ())
                freeze_experts(layers[index], keep, frozen.dtype, frozen.offload, model.dtype)
    return info, offloaded


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Hide transformers' progress bars of reading and writing weights, which would break ours apart."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class Slice:
    """A tensor on disk, or some of its rows, in the form that transformers' loading takes: `[...]` reads it."""

    def __init__(self, source, rows: list[int] | None = None):
        self.source, self.rows, self.read_bytes = source, rows, 0

    def __getitem__(self, index) -> torch.Tensor:
        if self.rows is None:
            tensor = self.source[index]
        else:
            tensor = torch.cat([self.source[row : row + 1] for row in self.rows])[index]
        self.read_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def get_shape(self) -> list[int]:
        shape = self.source.get_shape()
        return shape if self.rows is None else [len(self.rows), *shape[1:]]

    def get_dtype(self) -> str:
        return self.source.get_dtype()


class ExpandedScales(Slice):
    """Scales of blocks, repeated in some dimensions: one scale for each of `sizes` rows or columns."""

    def __init__(self, source, sizes: list[int | None], block: tuple[int, ...]):
        super().__init__(source)
        self.sizes, self.block = sizes, block

    def __getitem__(self, index) -> torch.Tensor:
        scale = self.source[:]
        dtype, self.read_bytes = scale.dtype, self.read_bytes + scale.nbytes
        if scale.element_size() == 1:  # a scale that is only an exponent: torch cannot repeat that dtype
            scale = scale.view(torch.uint8)
        for dim, (size, block) in enumerate(zip(self.sizes, self.block)):
            if size is not None:
                scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
        return scale.contiguous().view(dtype)[index]

    def get_shape(self) -> list[int]:
        return [size or n for size, n in zip(self.sizes, self.source.get_shape())]


def _prepare_fp8(slices: dict[str, Slice], layers: Mapping[int, MoELayer], block: tuple[int, ...]) -> set[int]:
    """Keep the experts of `layers` in fp8 where possible, and make all other scales fit for dequantization.

    Return the layers whose experts are kept.
    """
    scales = {key: _layer_of(key) if ".experts." in key else None for key in slices if key.endswith("_scale_inv")}
    in_fp8 = set(scales.values()) & layers.keys()
    kept = {index for index in in_fp8 if _keep_fp8(layers[index])}
    for key, index in scales.items():
        if index not in kept:
            _expand_scales(slices, key, block)
    return kept


def _layer_of(key: str) -> int | None:
    return next((int(part) for part in key.split(".") if part.isdecimal()), None)


def _keep_fp8(layer: MoELayer) -> bool:
    """Make the fused matrices fp8, with scales beside them. transformers then fills them with the stored bytes.

    Return False, and change nothing, where blocks of single matrices would not be blocks of the fused ones.
    """
    if layer.module.is_transposed or layer.module.down_proj.shape[2] % BLOCKS["fp8"][0]:
        return False
    for name in layer.weight_names:
        weight = layer.tensor(name)
        sizes = [math.ceil(size / block) for size, block in zip(weight.shape[1:], BLOCKS["fp8"])]
        scale = weight.new_empty(len(weight), *sizes, dtype=torch.float32)
        setattr(layer.module, name, nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False))
        layer.module.register_parameter(f"{name}_scale_inv", nn.Parameter(scale, requires_grad=False))
    return True


def _expand_scales(slices: dict[str, Slice], key: str, block: tuple[int, ...]) -> None:
    """Give a matrix that does not consist of whole blocks one scale for every row or column.

    transformers divides the size of the matrix by the number of scales and takes the result for the size of a block.
    That is wrong for kv_a_proj_with_mqa of DeepSeek-V3, which has 576 rows and 5 scales for them.
    """
    weight = slices.get(key.removesuffix("_scale_inv"))
    if weight is None or len(block) != 2 or len(slices[key].get_shape()) != 2:
        return
    partial = [size if size % edge else None for size, edge in zip(weight.get_shape(), block)]
    if any(partial):
        slices[key] = ExpandedScales(slices[key].source, partial, block)


def _local_slices(
    model: nn.Module, slices: Mapping[str, Slice], layers: Mapping[int, MoELayer], mapping: list
) -> dict[int | None, dict[str, Slice]]:
    """Return the tensors of a checkpoint that this rank needs, by the layer of their experts, or None for all others.

    transformers knows (`mapping`) which tensors of a checkpoint become a fused one. It is one tensor per expert, in the
    order of their ids, or a single tensor with the expert dimension first.
    """
    fused = {
        f"{layer.name}.{name}": layer
        for layer in layers.values()
        for name, _ in layer.module.named_parameters(recurse=False)
    }
    mapping = copy.deepcopy(mapping)  # it notes which of its patterns matched
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    known, kept_L = model.state_dict(), {None: {}, **{index: {} for index in layers}}
    sources: dict[tuple, list[str]] = defaultdict(list)
    for key in sorted(slices, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name in fused:
            sources[name, pattern].append(key)
        else:
            kept_L[None][key] = slices[key]
    for (name, _), keys in sources.items():
        layer, here = fused[name], kept_L[fused[name].index]
        if len(keys) == layer.num_experts:
            here |= {keys[expert]: slices[keys[expert]] for expert in layer.local_ids}
        elif len(keys) == 1 and slices[keys[0]].get_shape()[0] == layer.num_experts:
            all_here = len(layer.local_ids) == layer.num_experts
            here[keys[0]] = Slice(slices[keys[0]].source, None if all_here else layer.local_ids)
        else:
            raise ValueError(f"{name} has {len(keys)} tensors in the checkpoint for {layer.num_experts} experts")
    return kept_L
