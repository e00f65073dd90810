"""Find a model's experts, read and write single experts, and put the trained ones first.

transformers v5 fuses the routed experts of a layer into one module. The decorator `use_experts_implementation` marks
that module with layout flags. Only files that compute with fused tensors, or read and write them, look at the flags:

    has_gate         gate_up_proj (E, 2F, D) and down_proj (E, D, F); without it up_proj (E, F, D)
    is_transposed    each matrix is stored (in, out) instead of (out, in)
    is_concatenated  gate_up is [gate; up]; otherwise its rows are gate0, up0, gate1, up1, ...
    has_bias         *_bias (E, 2F) and (E, D)
    has_post_expert_norm  a norm of each expert's output, before its gate weight

`moe_layers` gives one `MoELayer` per fused module. `train_experts` reorders the rows (expert dimension) of every fused
tensor. The S trained experts come first:

    expert id   0 1 2 3 4 5 6 7          row   0 1 2 | 3 4 5 6 7
    trained         ^     ^ ^       ->         2 5 6 | 0 1 3 4 7
                                               ^^^^^ prefix: one slice W[:S], and of the routed rows one slice [:n]

The trained rows become fp32 masters, parameters of their own in the child module `trained`. They hold the true values,
and W[:S] follows: every forward begins with a copy (`TrainedExperts.write_back`). This is so in fp32, too. Parameters
that shared the storage of W[:S] would part from it under FSDP, in averages of weights, and in deep copies. The state
dict shows none of this: its names, shapes and expert order are those of the base.

Legend: D hidden, F expert hidden, E experts, e of them on this rank, S trained experts of the layer.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from deepseek.base_order import load_in_base_order, state_dict_in_base_order

if TYPE_CHECKING:
    from deepseek.expert_parallel import ExpertShard
    from deepseek.fp8 import Fp8Experts
    from deepseek.frozen import FrozenExperts

IMPLEMENTATION = "esft"  # in transformers' registry (grouped_gemm.py). The names of our other forwards begin with it
LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class FusedExperts:
    """One view over the layouts of a fused experts module, and over what this project adds to that module.

    The view itself holds nothing but the module, so it stays true whatever happens to the module, and costs nothing
    to make. The additions are attributes of the module, and move and are copied with it.
    """

    module: nn.Module

    @property
    def num_experts(self) -> int:
        """Experts of the layer, on all ranks."""
        return self.module.num_experts

    @property
    def local_ids(self) -> list[int]:
        """Ascending ids of the experts that are on this rank: all of them, except under expert parallelism."""
        return getattr(self.module, "local_ids", None) or list(range(self.num_experts))

    @property
    def trained(self) -> "SelectedExperts | None":
        return getattr(self.module, "trained", None)

    @property
    def frozen(self) -> "FrozenExperts | None":
        """The frozen experts that are quantized or in host memory (frozen.py)."""
        return getattr(self.module, "frozen", None)

    @property
    def shard(self) -> "ExpertShard | None":
        """The placement of the layer under expert parallelism (expert_parallel.py)."""
        return getattr(self.module, "shard", None)

    @property
    def fp8(self) -> "Fp8Experts | None":
        """The copies of the matrices in fp8, if the layer multiplies with these (fp8.py)."""
        return getattr(self.module, "fp8", None)

    @property
    def num_trained(self) -> int:
        return self.trained.num_trained if self.trained else 0

    @property
    def lora(self) -> "SelectedExperts | None":
        """The low-rank changes of the trained experts, if these are what is trained (lora.py)."""
        return self.trained if self.trained and self.trained.rank else None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the fused tensors: the matrices, then the biases. Their first dimension is the expert."""
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        return (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if self.module.has_bias else ()))

    @property
    def weight_names(self) -> tuple[str, ...]:
        """Names of the fused matrices."""
        return self.tensor_names[:2]

    def tensor(self, name: str) -> Tensor:
        """Return the fused tensor of this name, with the expert dimension first."""
        return getattr(self.module, name)

    @property
    def row_order(self) -> "SelectedExperts | FrozenExperts | None":
        """The holder of `order_e` and `row_of_e`; None where the rows are in the order of the local ids."""
        return self.trained or self.frozen

    @property
    def ids_by_row(self) -> list[int]:
        """Ids of the experts on this rank in the order of their rows."""
        order = self.row_order
        return self.local_ids if order is None else [self.local_ids[index] for index in order.order_e.tolist()]

    def rows_of(self, index: Tensor) -> Tensor:
        """Return the rows of experts that are given by their place in `local_ids`."""
        return index if self.row_order is None else self.row_order.row_of_e[index]

    def expert_shapes(self) -> dict[str, Tensor]:
        """Return tensors without storage, of the shapes that `expert_views` gives for any expert."""
        slices = {name: torch.empty(self.tensor(name).shape[1:], device="meta") for name in self.tensor_names}
        return {key: view for name, one in slices.items() for key, view in self.split(name, one).items()}

    def expert_views(self, expert: int) -> dict[str, Tensor]:
        """Return the projections of one local expert as views of where its true values are. Write them with `copy_`.

        That is the master of a trained expert, in fp32, and the fused tensors for any other, or with LoRA. Shapes are
        {"gate_proj.weight": (F, D), "up_proj.weight": (F, D), "down_proj.weight": (D, F)} in every layout, with a
        ".bias" each where the layer has biases. Experts in other storage (frozen.py) have no views.
        """
        row = self.local_ids.index(expert)
        if self.row_order is not None:
            row = self.row_order.row_of_e[row].item()
        source = self.trained if row < self.num_trained and not self.lora else self.module
        views: dict[str, Tensor] = {}
        for name in self.tensor_names:
            views |= self.split(name, getattr(source, name).data[row])
        return views

    def projections(self, name: str) -> tuple[str, ...]:
        """Return the projections that the fused matrix `name` holds."""
        return ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)

    def join(self, parts: list[Tensor]) -> Tensor:
        """Join matrices (..., O, I) of the projections of one fused matrix: all rows, in its order."""
        if len(parts) == 1 or self.module.is_concatenated:
            return torch.cat(parts, -2)
        return torch.stack(parts, -2).flatten(-3, -2)

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Split rows of the fused tensor `name`, (S, ...) or the slice of one expert, into views by projection."""
        kind, rows = ("bias", -1) if name.endswith("_bias") else ("weight", -2)
        if kind == "weight" and self.module.is_transposed:
            tensor = tensor.mT
        if not name.startswith("gate_up_proj"):
            return {f"{name.removesuffix('_bias')}.{kind}": tensor}
        if self.module.is_concatenated:
            gate, up = tensor.chunk(2, rows)
        else:
            gate, up = tensor.unflatten(rows, (-1, 2)).unbind(rows)
        return {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up}

    def keep_local(self, experts: Iterable[int]) -> None:
        """Cut the fused tensors down to the rows of `experts`, as one rank holds them under expert parallelism."""
        ids = sorted(experts)
        for name in self.tensor_names:
            setattr(self.module, name, nn.Parameter(self.tensor(name).data[ids]))
        self.module.local_ids = ids


@dataclass(frozen=True)
class MoELayer(FusedExperts):
    """The fused experts of one decoder layer: `index` is the layer's number, `name` the module's name in the model."""

    index: int
    name: str


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside the wrappers of DDP, FSDP, torch.compile or peft, or the model itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def base_name(name: str) -> str:
    """Return the name that a module or a parameter has in the base. peft puts its layers around what they adapt."""
    return name.replace(".base_layer", "")


def moe_layers(model: nn.Module, dense_ok: bool = False) -> dict[int, MoELayer]:
    """Return the MoE layers of a model by decoder layer, in order.

    The modules are looked up at every call, which takes about a millisecond. So the answer is right for a copy, for a
    wrapped or compiled model, and after a module was replaced. Call it once per function and pass the result on.

    Raises:
        ValueError: the model is dense (unless `dense_ok`, which gives {}), transformers does not fuse its experts, or
            two modules share a layer index.
    """
    found: dict[int, MoELayer] = {}
    for name, module in model.named_modules():
        if not all(hasattr(module, flag) for flag in LAYOUT_FLAGS):
            continue
        match = re.search(r"\.(\d+)\.", f".{name}.")
        if match is None:
            raise ValueError(f"cannot name the experts of {name}: it is in no numbered layer")
        index = int(match[1])
        if index in found:
            raise ValueError(
                f"layer {index} has two experts modules, {found[index].name} and {name}, and a config names "
                f"experts by their layer only: {type(model).__name__} is not supported"
            )
        found[index] = MoELayer(module, index, base_name(name))
    if found or dense_ok:
        return dict(sorted(found.items()))
    kind = f"{type(model).__name__} (model type {model.config.model_type})"
    if any(re.search(r"experts?$", type(module).__name__, re.IGNORECASE) for module in model.modules()):
        raise ValueError(f"cannot find the experts of {kind}: transformers does not fuse them")
    raise ValueError(f"cannot find experts: {kind} is a dense model. Give a mixture of experts.")


class SelectedExperts(nn.Module):
    """What is trained of the selected experts of one layer, as fp32 parameters whose first dimension S is the expert.

    Creating one moves these experts to the first rows. The buffer `order_e` maps a row to its expert's place in
    `local_ids`, and `row_of_e` maps back. `experts` may map an id to the step since which the expert is trained. Older
    ones come first.
    """

    rank: int | None = None  # of the change, if that is trained instead of the experts themselves

    def __init__(self, layer: FusedExperts, experts: Iterable[int] | Mapping[int, int]):
        super().__init__()
        step_of = experts if isinstance(experts, Mapping) else dict.fromkeys(experts, 0)
        ids, before = layer.local_ids, layer.row_order
        self.expert_ids = sorted(set(ids) & set(step_of), key=lambda expert: (step_of[expert], expert))  # in row order
        self.since = {expert: step_of[expert] for expert in self.expert_ids}
        known = range(len(ids)) if before is None else before.order_e.tolist()
        first = [ids.index(expert) for expert in self.expert_ids]
        rest = [index for index in known if ids[index] not in self.since]
        self.num_trained, self.ran = len(first), False
        self.parts: list = []  # what an optimizer sees in place of the parameters (reselection.py)
        order_e = torch.tensor(first + rest, device=layer.module.down_proj.device)
        self.register_buffer("order_e", order_e, persistent=False)
        self.register_buffer("row_of_e", torch.argsort(order_e), persistent=False)
        self.tensor_names = layer.tensor_names
        self._layer = layer  # a view, so its module does not become a submodule; a deep copy gets the copied module
        _reorder(layer, order_e if before is None else before.row_of_e[order_e])

    def _apply(self, fn, recurse=True):
        """Keep the parameters in fp32 when the model is cast."""
        super()._apply(fn, recurse)
        for param in self.parameters():
            if param.dtype != torch.float32:
                param.data = param.data.float()
        return self


class TrainedExperts(SelectedExperts):
    """The trained experts of one layer themselves, (S, ...) with the names of the fused tensors."""

    def __init__(self, layer: FusedExperts, experts: Iterable[int]):
        super().__init__(layer, experts)
        for name in layer.tensor_names:
            rows = layer.tensor(name).data[: self.num_trained]
            self.register_parameter(name, nn.Parameter(rows.to(torch.float32, copy=True)))

    def operands(self) -> tuple[Tensor, ...]:
        """Return the tensors that the grouped products take, and give gradients of."""
        return tuple(self.parameters())

    @torch.no_grad()
    def write_back(self, params: Iterable[Tensor] | None = None) -> None:
        """Make W[:S] hold what the parameters hold: `params`, by default those of this module.

        The copy is made at every call. A fused optimizer, or a write to `param.data`, does not raise the version
        counter of a parameter. So no cheap test can tell whether it changed.
        """
        for name, param in zip(self.tensor_names, params or self.parameters()):
            self._layer.tensor(name).data[: self.num_trained].copy_(param)


def _reorder(layer: FusedExperts, rows_e: Tensor) -> None:
    """Put the rows of every fused tensor into the order `rows_e`. Frozen experts elsewhere (frozen.py) stay last."""
    for name in layer.tensor_names:
        fused = layer.tensor(name)
        fused.data.copy_(fused.data[rows_e[: len(fused)]])


def require_own_forward(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Refuse every forward but ours from now on, as others would read the wrong rows. Return what ends this.

    The name of the implementation is checked before a forward. That ours ran is checked after it, because patches
    (Liger, kernels of a hub) replace the module's forward and leave the name. torch.compile checks while it traces.
    """
    return module.register_forward_pre_hook(_refuse_implementation), module.register_forward_hook(_refuse_replaced)


@torch.compiler.assume_constant_result  # so torch.compile calls it while it traces, perhaps several times
def note_run(module: nn.Module, ran: bool = True) -> bool:
    """Note whether our forward ran, and return that. It matters where rows are out of order."""
    if order := FusedExperts(module).row_order:
        order.ran = ran
    return ran


@torch.compiler.assume_constant_result
def _has_run(module: nn.Module) -> bool:
    order = FusedExperts(module).row_order
    return order is None or order.ran


def _refuse_implementation(module: nn.Module, _args) -> None:
    name = str(module.config._experts_implementation)
    if not name.startswith(IMPLEMENTATION):
        raise ValueError(
            f"cannot compute the experts with experts_implementation={name!r}: their rows are in another order, which "
            f"only ESFT's own forward knows. Call model.set_experts_implementation({IMPLEMENTATION!r}), or unload or "
            "merge first."
        )
    note_run(module, False)


def _refuse_replaced(module: nn.Module, _args, _out) -> None:
    if not _has_run(module):
        raise ValueError(
            f"cannot compute the experts: something replaced the forward of {type(module).__name__}, and their rows "
            "are in another order, which only ESFT's own forward knows. Leave out what replaced it, such as Liger."
        )


def check_own_forward(layers: Iterable[MoELayer]) -> None:
    """Raise ValueError if a forward of the model left out trained experts, because their block was replaced."""
    if missed := [layer.name for layer in layers if layer.trained and not layer.trained.ran]:
        raise ValueError(
            f"cannot train the experts: a forward of the model did not reach {missed[0]}. Something replaced the "
            "forward of the block around it. Leave that out."
        )


def train_experts(
    layer: FusedExperts, experts: Iterable[int], kind: Callable[..., SelectedExperts] = TrainedExperts
) -> None:
    """Freeze a layer's experts except for `experts`. Those that are local become the first rows.

    `kind` makes what is trained of them, of the layer and the ids.
    """
    module = layer.module
    module.requires_grad_(False)
    if not set(experts) & set(layer.local_ids):
        return
    module.trained = kind(layer, experts)
    module._trained_hooks = (
        module.register_state_dict_post_hook(state_dict_in_base_order),
        module.register_load_state_dict_pre_hook(load_in_base_order),
        *(() if layer.frozen else require_own_forward(module)),
    )


def release_experts(layer: FusedExperts) -> None:
    """Undo `train_experts`: the rows go back to their order and the parameters go. The values stay as trained."""
    module = layer.module
    module.trained.write_back()
    rows_e = module.trained.row_of_e
    _reorder(layer, rows_e if layer.frozen is None else rows_e[layer.frozen.order_e])
    for hook in module._trained_hooks:
        hook.remove()
    del module.trained, module._trained_hooks
