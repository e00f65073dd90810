"""Train ordinary parameters in fp32 while the model computes in bf16: shared experts, attention, norms, embeddings, ...

In bf16 small updates round away. So a bf16 parameter becomes the cast of an fp32 master, by torch's parametrization:

    weight (bf16)   ->   parametrizations.weight.original (fp32, trained)   weight = original.to(bf16) in every forward

fp32 parameters stay as they are. Tied parameters share one master. Two hooks on the model hide the masters from its
state dict. Its names, order, shapes and dtypes are those of the base.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.quantizers.quantizers_utils import get_module_from_name

DTYPE_OF_BASE = "dtype_of_base"  # an empty parameter that comes first, because `model.dtype` is that of the first one


class _Cast(nn.Module):
    """The cast of a master to the dtype in which the model computes. `like` follows that dtype through `.to(dtype)`."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, master: Tensor) -> Tensor:
        if master.dtype != torch.float32:  # the model was cast since
            master.data = master.data.float()
        return master.to(self.like.dtype)


@dataclass
class _Masters:
    """What a model remembers about its masters until `release_parameters`."""

    keys: list[str]  # of the base's state dict, in order
    first: dict[str, str]  # parameter with a master -> the first of those it is tied to, often itself
    hooks: list


def name_in_base(name: str) -> str:
    """Return the name without masters of a parameter that may be one."""
    return re.sub(r"parametrizations\.(.+)\.original$", r"\1", name)


def train_parameters(model: nn.Module, names: Iterable[str]) -> None:
    """Make ordinary parameters trainable, in fp32. The model goes on computing in the dtype it had."""
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
            parametrize.register_parametrization(*get_module_from_name(model, other), _Cast(cast_to), unsafe=True)
            masters.first[other] = name
    if masters.first:
        model.register_parameter(DTYPE_OF_BASE, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
        masters.hooks = [
            model.register_state_dict_post_hook(_state_dict_without_masters),
            model.register_load_state_dict_pre_hook(_load_into_masters),
        ]
        model._masters = masters


def trained_parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that an optimizer sees: the one of that name, or its fp32 master."""
    module, attribute = get_module_from_name(model, name)
    if parametrize.is_parametrized(module, attribute):
        return module.parametrizations[attribute].original
    return getattr(module, attribute)


def computed_value(model: nn.Module, name: str) -> Tensor:
    """Return the value of a parameter in the dtype in which the model computes: the cast, if there is a master."""
    return getattr(*get_module_from_name(model, name)).detach()


def release_parameters(model: nn.Module) -> None:
    """Undo `train_parameters`. The values stay as trained, in the dtype of the base."""
    masters = model.__dict__.pop("_masters", None)
    if masters is None:
        return
    delattr(model, DTYPE_OF_BASE)
    for hook in masters.hooks:
        hook.remove()
    values = {name: computed_value(model, name) for name in set(masters.first.values())}
    for name, first in masters.first.items():
        module, attribute = get_module_from_name(model, name)
        param, cls = trained_parameter(model, name), type(module)
        # torch takes the parametrized property out of the class, which a deep copy of this module shares
        module.__class__ = type(cls.__name__, cls.__bases__, dict(vars(cls)))
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
        param.data, param.grad = values[first], None
        setattr(module, attribute, param)


def _state_dict_without_masters(model: nn.Module, state_dict: dict, prefix: str, _metadata) -> None:
    state_dict.pop(f"{prefix}{DTYPE_OF_BASE}", None)
    values = {name: computed_value(model, name) for name in set(model._masters.first.values())}
    for name, first in model._masters.first.items():
        state_dict.pop(prefix + _master_key(name), None)
        state_dict[prefix + name] = values[first]
    for key in model._masters.keys:
        if prefix + key in state_dict:
            state_dict[prefix + key] = state_dict.pop(prefix + key)


def _load_into_masters(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    state_dict[f"{prefix}{DTYPE_OF_BASE}"] = model.get_parameter(DTYPE_OF_BASE).data
    for name in model._masters.first:
        if prefix + name in state_dict:
            state_dict[prefix + _master_key(name)] = state_dict.pop(prefix + name)


def _master_key(name: str) -> str:
    module_name, _, attribute = name.rpartition(".")
    return f"{module_name}.parametrizations.{attribute}.original"
