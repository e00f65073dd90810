"""Find a model's expert modules, read and write single experts, and put the trained ones first.

transformers v5 fuses the routed experts of a layer into one module that the decorator `use_experts_implementation`
marks with layout flags. This file is the only one that knows those layouts:

    has_gate       gate_up_proj (E, 2F, D) and down_proj (E, D, F); without it up_proj (E, F, D)
    is_transposed  each matrix is stored (in, out) instead of (out, in)
    is_concatenated  gate_up is [gate; up], otherwise interleaved gate0, up0, gate1, ...
    has_bias       *_bias (E, 2F) and (E, D)

`train_experts` reorders the rows (expert dimension) of every fused tensor so that the S trained experts come first:

    expert id   0 1 2 3 4 5 6 7          row   0 1 2 | 3 4 5 6 7
    trained         ^     ^ ^       ->         2 5 6 | 0 1 3 4 7
                                               ^^^^^ prefix: one slice W[:S], and of the routed rows one slice [:n]

The trained rows become parameters of their own, in fp32, in the child module `trained`. Where the model is fp32 they
share the storage of W[:S] (no weight is copied); where it is bf16 they are its masters and W[:S] follows them. The
truth is always the parameter; `TrainedExperts.push` restores the tie after anything that broke it (`.to()`, a cast,
a deep copy, an optimizer step on a master), and the forward calls it every time. The state dict of a model does not
show any of this: names, shapes and expert order stay those of the base.

Legend: D hidden, F expert hidden, E experts, e of them local, S trained experts of the layer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


def is_fused_experts(module: nn.Module) -> bool:
    """Whether transformers' experts protocol is behind this module (its layout flags are present)."""
    return all(hasattr(module, flag) for flag in LAYOUT_FLAGS)


def find_experts(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The fused experts modules of a model: decoder layer index -> (module name, module), in layer order.

    Raises:
        ValueError: the model is dense, its experts are not fused by transformers, or two modules share a layer index.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if not is_fused_experts(module):
            continue
        index = re.search(r"\.(\d+)\.", f".{name}.")
        if index is None:
            raise ValueError(f"the experts module {name} stands in no numbered layer, so no config can name it")
        if int(index[1]) in found:
            raise ValueError(
                f"layer {index[1]} has two experts modules, {found[int(index[1])][0]} and {name}, and a config names "
                f"experts by their layer only: {type(model).__name__} is not supported"
            )
        found[int(index[1])] = (name, module)
    if not found:
        kind = f"{type(model).__name__} (model type {getattr(getattr(model, 'config', None), 'model_type', '?')})"
        if any(re.search(r"experts?$", type(module).__name__, re.IGNORECASE) for module in model.modules()):
            raise ValueError(f"{kind} keeps its experts in a module that transformers does not fuse: not supported")
        raise ValueError(f"{kind} is a dense model: it has no experts to score or to train; give a mixture of experts")
    return dict(sorted(found.items()))


def local_expert_ids(module: nn.Module) -> list[int]:
    """Ids, ascending, of the experts whose rows this process holds: all of them but under expert parallelism."""
    return getattr(module, "local_ids", None) or list(range(module.num_experts))


def fused_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the fused tensors (expert dimension first) of an experts module."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return (up, "down_proj", *((f"{up}_bias", "down_proj_bias") if module.has_bias else ()))


def row_order(module: nn.Module) -> nn.Module | None:
    """What knows the order of the rows (`order_e`, `row_of_e`) where it is not that of the local experts' ids."""
    return getattr(module, "trained", None) or getattr(module, "frozen", None)


def split_projections(module: nn.Module, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Views of one expert's slice of the fused tensor `name`, by canonical projection.

    Args:
        tensor: one expert's slice, e.g. (2F, D) of gate_up_proj in whatever layout the module has.

    Returns:
        {"gate_proj.weight": (F, D), "up_proj.weight": (F, D)} or {"down_proj.weight": (D, F)}, or the ".bias"es.
    """
    kind = "bias" if name.endswith("_bias") else "weight"
    if kind == "weight" and module.is_transposed:
        tensor = tensor.T
    if not name.startswith("gate_up_proj"):
        return {f"{name.removesuffix('_bias')}.{kind}": tensor}
    gate, up = tensor.chunk(2) if module.is_concatenated else (tensor[::2], tensor[1::2])
    return {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up}


def expert_shapes(module: nn.Module) -> dict[str, Tensor]:
    """Tensors without storage of the shapes that `expert_views` gives for any expert."""
    slices = {name: torch.empty(getattr(module, name).shape[1:], device="meta") for name in fused_names(module)}
    return {key: view for name, one in slices.items() for key, view in split_projections(module, name, one).items()}


def expert_views(module: nn.Module, expert: int) -> dict[str, Tensor]:
    """One (local) expert's projections as views of the fused tensors: read them, or write them with `copy_`.

    On a module with trained experts, call `module.trained.push()` before reading and `pull()` after writing. Of frozen
    experts (frozen.py), only those kept can be seen.
    """
    row = local_expert_ids(module).index(expert)
    if (order := row_order(module)) is not None:
        row = order.row_of_e[row].item()
    views: dict[str, Tensor] = {}
    for name in fused_names(module):
        views |= split_projections(module, name, getattr(module, name).data[row])
    return views


class TrainedExperts(nn.Module):
    """The trained experts of one experts module, as fp32 parameters named like the fused tensors, (S, ...) each.

    Buffers: `order_e` row -> index among the local experts (in a single process, the expert id), `row_of_e` back.
    """

    def __init__(self, module: nn.Module, experts: Iterable[int]):
        super().__init__()
        chosen, self._local_ids = set(experts), local_expert_ids(module)
        before = row_order(module)
        known = range(len(self._local_ids)) if before is None else before.order_e.tolist()
        first = [index for index, expert in enumerate(self._local_ids) if expert in chosen]
        rest = [index for index in known if self._local_ids[index] not in chosen]
        self.num_trained = len(first)
        order_e = torch.tensor(first + rest, device=module.down_proj.device)
        self.register_buffer("order_e", order_e, persistent=False)
        self.register_buffer("row_of_e", torch.argsort(order_e), persistent=False)
        self._owner = [module]  # in a list: not a submodule, and a deep copy follows it to the copied owner
        rows_e = order_e if before is None else before.row_of_e[order_e]
        for name in fused_names(module):
            fused = getattr(module, name)
            fused.data.copy_(fused.data[rows_e[: len(fused)]])
            self.register_parameter(name, nn.Parameter(fused.data[: self.num_trained].float()))

    @property
    def expert_ids(self) -> list[int]:
        """Ids of the trained experts, in row order."""
        return [self._local_ids[index] for index in self.order_e[: self.num_trained].tolist()]

    def _pairs(self):
        for name, param in self.named_parameters(recurse=False):
            yield name, param, getattr(self._owner[0], name).data[: self.num_trained]

    @torch.no_grad()
    def push(self) -> None:
        """Make W[:S] hold what the parameters hold: free in fp32, a copy in bf16.

        The copy is made every time: fused optimizers, and whoever writes to `param.data`, change a parameter without
        raising its version counter, so that no cheap test tells whether it changed.
        """
        for _, param, rows in self._pairs():
            if param.dtype != torch.float32:
                param.data = param.data.float()
            if rows.dtype != torch.float32:
                rows.copy_(param.data)
            elif rows.data_ptr() != param.data_ptr():
                param.data = rows.copy_(param.data)

    @torch.no_grad()
    def pull(self) -> None:
        """Make the parameters hold what W[:S] holds, after the fused tensor was written to."""
        for _, param, rows in self._pairs():
            if rows.data_ptr() != param.data_ptr():
                param.copy_(rows)
        self.push()


def train_experts(module: nn.Module, experts: Iterable[int]) -> None:
    """Freeze an experts module except for `experts` (checked by the caller); the local ones of them go to the front."""
    module.requires_grad_(False)
    if not set(experts) & set(local_expert_ids(module)):
        return
    module.trained = TrainedExperts(module, experts)
    module.trained.push()
    module._trained_hooks = (
        module.register_state_dict_post_hook(_state_dict_in_base_order),
        module.register_load_state_dict_pre_hook(_load_in_base_order),
    )


def release_experts(module: nn.Module) -> None:
    """Undo `train_experts`: expert order as before, no parameters of our own; the values stay as trained."""
    module.trained.push()
    rows_e = module.trained.row_of_e
    if hasattr(module, "frozen"):
        rows_e = rows_e[module.frozen.order_e]
    for name in fused_names(module):
        fused = getattr(module, name)
        fused.data.copy_(fused.data[rows_e[: len(fused)]])
    for hook in module._trained_hooks:
        hook.remove()
    del module.trained, module._trained_hooks


def _state_dict_in_base_order(module: nn.Module, state_dict: dict, prefix: str, _metadata) -> None:
    module.trained.push()
    for name in fused_names(module):
        state_dict.pop(f"{prefix}trained.{name}", None)
        if f"{prefix}{name}" in state_dict:
            state_dict[f"{prefix}{name}"] = state_dict[f"{prefix}{name}"][module.trained.row_of_e]


def _load_in_base_order(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    for name in fused_names(module):
        if f"{prefix}{name}" in state_dict:
            ordered = state_dict[f"{prefix}{name}"][module.trained.order_e.to(state_dict[f"{prefix}{name}"].device)]
            state_dict[f"{prefix}{name}"] = ordered
            state_dict[f"{prefix}trained.{name}"] = ordered[: module.trained.num_trained]


# Parameters outside the experts (shared experts, non-expert modules) keep their own storage where they are fp32; a bf16
# one becomes the cast of an fp32 master, by torch's parametrization, so that small updates do not round away. Tied
# parameters share one master. Two hooks on the model keep this out of its state dict.


class _Cast(nn.Module):
    """fp32 master -> the dtype the model computes in, which `like` follows through `.to(dtype)`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, master: Tensor) -> Tensor:
        if master.dtype != torch.float32:  # the model was cast since
            master.data = master.data.float()
        return master.to(self.like.dtype)


DTYPE_OF_BASE = "dtype_of_base"  # an empty parameter that comes first: transformers' `model.dtype` is the first one's


@dataclass
class _Masters:
    """What a model remembers about its masters until `release_parameters`."""

    keys: list[str]  # of the base's state dict, in order
    first: dict[str, str]  # parameter with a master -> the first of those it is tied to, often itself
    hooks: list


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module_name, _, attribute = name.rpartition(".")
    return model.get_submodule(module_name), attribute


def train_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Make ordinary parameters trainable, in fp32; the model goes on computing in the dtype it had."""
    keys = [
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    ]
    dtype = next(model.parameters()).dtype
    tied: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(param), []).append(name)
    masters = _Masters(keys, {}, [])
    for name in names:
        param = model.get_parameter(name)
        param.requires_grad_(True)
        if param.dtype == torch.float32:
            continue
        cast_to, param.data = param.dtype, param.data.float()
        for other in tied[id(param)]:
            parametrize.register_parametrization(*_holder(model, other), _Cast(cast_to), unsafe=True)
            masters.first[other] = name
    if masters.first:
        model.register_parameter(DTYPE_OF_BASE, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
        masters.hooks = [
            model.register_state_dict_post_hook(_state_dict_without_masters),
            model.register_load_state_dict_pre_hook(_load_into_masters),
        ]
        model._masters = masters


def trained_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter that an optimizer sees: the one of that name, or its fp32 master."""
    module, attribute = _holder(model, name)
    if parametrize.is_parametrized(module, attribute):
        return module.parametrizations[attribute].original
    return getattr(module, attribute)


def release_parameters(model: nn.Module) -> None:
    """Undo `train_parameters`; the values stay as trained, in the dtype of the base."""
    masters = model.__dict__.pop("_masters", None)
    if masters is None:
        return
    delattr(model, DTYPE_OF_BASE)
    for hook in masters.hooks:
        hook.remove()
    values = {name: getattr(*_holder(model, name)).detach() for name in set(masters.first.values())}
    for name, first in masters.first.items():
        module, attribute = _holder(model, name)
        param, cls = trained_parameter(model, name), type(module)
        # torch takes the parametrized property out of the class, which a deep copy of this module shares
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        param.data, param.grad = values[first], None
        setattr(module, attribute, param)


def _state_dict_without_masters(model: nn.Module, state_dict: dict, prefix: str, _metadata) -> None:
    state_dict.pop(f"{prefix}{DTYPE_OF_BASE}", None)
    values = {name: getattr(*_holder(model, name)).detach() for name in set(model._masters.first.values())}
    for name, first in model._masters.first.items():
        state_dict.pop(prefix + _master_key(name), None)
        state_dict[prefix + name] = values[first]
    for key in model._masters.keys:
        if prefix + key in state_dict:
            state_dict[prefix + key] = state_dict.pop(prefix + key)


def _load_into_masters(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    state_dict[f"{prefix}{DTYPE_OF_BASE}"] = getattr(model, DTYPE_OF_BASE).data
    for name in model._masters.first:
        if prefix + name in state_dict:
            state_dict[prefix + _master_key(name)] = state_dict.pop(prefix + name)


def _master_key(name: str) -> str:
    module_name, _, attribute = name.rpartition(".")
    return f"{module_name}.parametrizations.{attribute}.original"
