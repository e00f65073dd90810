"""Where in the files of a checkpoint the projections of an expert are.

Families spell an expert differently: DeepSeek `mlp.experts.7.gate_proj`, Mixtral `block_sparse_moe.experts.7.w1`,
gpt_oss the fused `mlp.experts.gate_up_proj`. transformers knows this, because it splits its fused tensors again when it
saves. So fused tensors in miniature, in which every entry is another number, go through its reverse conversion. Where
the numbers of a projection come out is where the checkpoint stores it:

    gate_up_proj (E, 2F, D), entries 0, 1, 2, ...  ->  {"...experts.7.w1.weight": [[1260, 1261, ..], ..], ..}
"""

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.quantizers_utils import get_module_from_name

from deepseek.experts import LAYOUT_FLAGS, FusedExperts, MoELayer, moe_layers
from deepseek.fingerprint import router_parameters
from deepseek.loading import empty_model
from deepseek.shards import Stored, read_tensor, stored_tensors

Select = Callable[[Tensor], Tensor]  # the part of a tensor that a projection is, as a view

# --------------------------------------------------------------------------------------------------------------------
# the model that is stored


def open_base(base: Path) -> tuple[nn.Module, dict[str, Stored]]:
    """Return (model, `stored_tensors`) of a checkpoint folder. Of the model, only the routers have weights.

    transformers notes which of its conversions a checkpoint needs while it loads it, and reverts those when it saves.
    (Examples: a prefix before the language model, or experts stored one by one.) The same is noted here by key.

    Raises:
        ValueError, FileNotFoundError: there is no such model, it is quantized, or transformers cannot build it.
    """
    model = empty_model(base)
    if getattr(model.config, "quantization_config", None):
        raise ValueError(f"cannot use {base}: the model is quantized. Give its unquantized form.")
    stored = stored_tensors(base)
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    known = model.state_dict()
    for key in stored:
        rename_source_key(key, renamings, converters, model.base_model_prefix, known)
    model._weight_conversions = [one for one in conversions if one.was_used()]
    untie(model, base, stored)
    load_routers(model, base, stored)
    return model, stored


def untie(model: nn.Module, base: Path, stored: Mapping[str, Stored]) -> None:
    """Untie parameters that the checkpoint stores twice with different values, as transformers does when it loads."""
    for target, source in list(model.all_tied_weights_keys.items()):
        first, *copies = (read_tensor(base, stored, key) for key in ordinary_keys(model, source, stored))
        if any(not torch.equal(first.view(torch.uint8), copy.view(torch.uint8)) for copy in copies):
            setattr(*get_module_from_name(model, target), nn.Parameter(model.get_parameter(source).clone()))
            del model.all_tied_weights_keys[target]


def load_routers(model: nn.Module, base: Path, stored: Mapping[str, Stored]) -> None:
    """Give the model without weights those of its routers, for the fingerprint."""
    for name in router_parameters(model):
        value = read_tensor(base, stored, ordinary_keys(model, name, stored)[0])
        setattr(*get_module_from_name(model, name), nn.Parameter(value, requires_grad=False))


# --------------------------------------------------------------------------------------------------------------------
# where in it parameters are


@dataclass(frozen=True)
class Place:
    """Where a projection is in a checkpoint: a part of the tensor `key`, or of its row `row` (the expert)."""

    key: str
    row: int | None
    select: Select

    def shape(self, stored: list[int]) -> torch.Size:
        """Return the shape of this part of a tensor of shape `stored`; (0,) if it has no such row."""
        if self.row is not None and self.row >= stored[0]:
            return torch.Size([0])
        return self.select(torch.empty(stored if self.row is None else stored[1:], device="meta")).shape


def find_places(
    model: nn.Module, experts: Mapping[int, Collection[int]], names: Iterable[str], stored: Mapping[str, Stored]
) -> dict[str, list[Place]]:
    """Return where the tensors `names` of an adapter go: one place, or more where a tied parameter is stored twice.

    Raises:
        ValueError: the checkpoint has no place for a tensor.
    """
    places: dict[str, list[Place]] = {}
    for layer in moe_layers(model).values():
        if chosen := experts.get(layer.index):
            of_layer = expert_places(model, layer, stored)
            for (expert, projection), place in of_layer.items():
                if expert in chosen:
                    places[f"{layer.name}.{expert}.{projection}"] = [place]
    for name in names:
        if name not in places:
            places[name] = [Place(key, None, _whole) for key in ordinary_keys(model, name, stored)]
    return places


def ordinary_keys(model: nn.Module, name: str, stored: Container[str]) -> list[str]:
    """Return the keys of a parameter outside the experts: one, or more where a tied one is stored twice."""
    keys = []
    for alias in (name, *(a for a, b in model.all_tied_weights_keys.items() if b == name)):
        param = model.get_parameter(alias)
        reverted = revert_weight_conversion(model, {alias: param})
        names = [key for key, value in reverted.items() if value is param] + [alias]
        keys += [key for key in (_stored_name(model, name, stored) for name in names) if key in stored][:1]
    if not keys:
        raise ValueError(f"cannot find {name}: the checkpoint holds no tensor for it")
    return keys


def _stored_name(model: nn.Module, key: str, stored: Container[str]) -> str:
    """Return `key`, or `key` without the leading "model." that some checkpoints lack, if only that is stored."""
    short = key.removeprefix(f"{model.base_model_prefix}.")
    return short if short in stored and key not in stored else key


def expert_places(model: nn.Module, layer: MoELayer, stored: Mapping[str, Stored]) -> dict[tuple[int, str], Place]:
    """Return where (expert, projection) is, for all experts of a layer."""
    mini, module, name = _miniature(layer), layer.module, layer.name
    wanted = {(e, p): view for e in range(layer.num_experts) for p, view in mini.expert_views(e).items()}
    real = {fused: layer.tensor(fused) for fused in layer.tensor_names}
    real_shapes = {projection: view.shape for projection, view in layer.expert_shapes().items()}

    def as_stored() -> dict[str, Tensor]:
        return revert_weight_conversion(model, {f"{name}.{fused}": mini.tensor(fused) for fused in real})

    # A conversion may transpose a tensor if its shape is not that of the model's parameter. (Qwen3-VL-MoE is stored
    # either way.) With parameters as small as the miniature it does not, with the model's own it does. The stored
    # shapes tell which is right.
    for fused in real:
        setattr(module, fused, nn.Parameter(mini.tensor(fused).to("meta", torch.float32)))
    try:
        variants = [as_stored()]
    finally:
        for fused, param in real.items():
            setattr(module, fused, param)
    variants.append(as_stored())
    for variant in variants:
        reverted = {_stored_name(model, key, stored): numbers for key, numbers in variant.items()}
        if missing := sorted(key for key in reverted if key not in stored):
            raise ValueError(f"cannot find the experts of {name}: the checkpoint does not hold {missing[0]}")
        places = _match(reverted, wanted)
        if lost := sorted(wanted.keys() - places.keys()):
            raise ValueError(
                f"cannot find {lost[0][1]} of {name}: its layout in the checkpoint is not known. Merge in memory."
            )
        if all(place.shape(stored[place.key].shape) == real_shapes[p] for (_, p), place in places.items()):
            break
    return places  # where none fits: merge_adapter.check_places says what does not


def _miniature(layer: MoELayer) -> FusedExperts:
    """Return the fused tensors of a layer with F = 2 and D = 3. All their entries are different numbers."""
    module, E, F, D = layer.module, layer.num_experts, 2, 3
    mini = SimpleNamespace(num_experts=E, **{flag: getattr(module, flag) for flag in LAYOUT_FLAGS})
    start = 0
    for fused in layer.tensor_names:
        out, into = (D, F) if fused.startswith("down") else (F * (1 + module.has_gate), D)
        shape = (out,) if fused.endswith("_bias") else (into, out) if module.is_transposed else (out, into)
        size = E * math.prod(shape)
        setattr(mini, fused, torch.arange(start, start + size).view(E, *shape))
        start += size
    return FusedExperts(mini)


def _match(reverted: dict[str, Tensor], wanted: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Place]:
    """Return where in checkpoint tensors the projections `wanted` are. Each of their numbers is there once."""
    owner = {number: place for place, view in wanted.items() for number in view.flatten().tolist()}
    places = {}
    for key, numbers in reverted.items():
        fused = numbers.ndim == 1 + wanted[owner[numbers.flatten()[0].item()]].ndim
        for row in range(len(numbers)) if fused else [None]:
            for part, select in _parts(numbers if row is None else numbers[row]):
                place = owner[part.flatten()[0].item()]
                if torch.equal(part, wanted[place]):
                    places[place] = Place(key, row, select)
    return places


def _whole(tensor: Tensor) -> Tensor:
    return tensor


SELECTS: tuple[Select, ...] = (
    _whole,
    lambda tensor: tensor[: len(tensor) // 2],
    lambda tensor: tensor[len(tensor) // 2 :],
    lambda tensor: tensor[::2],
    lambda tensor: tensor[1::2],
)


def _parts(tensor: Tensor) -> Iterator[tuple[Tensor, Select]]:
    """Yield whatever a projection may be of an expert's tensor, and how to take it."""
    for select in SELECTS:
        yield select(tensor), select
        if tensor.ndim == 2:
            yield select(tensor.T), lambda tensor, select=select: select(tensor.T)
