"""Split the states that an optimizer keeps of a parameter by the parameter's rows, which are experts, and join them.

    AdamW      exp_avg, exp_avg_sq (S, ...): a row each; step: the same for all rows
    8 bits     state1, state2 (S, ...) and their scales absmax1, absmax2, a row of scales for each row; tables for all
    torchao    the parts codes and scale of a quantized tensor are flat, and as many for each row; a table for all
    Adafactor  exp_avg_sq_row (S, O), exp_avg_sq_col (S, I)

Legend: S rows, one per expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BLOCK = 256  # entries that share a scale in the 8-bit and 4-bit optimizers of bitsandbytes and torchao
BLOCKWISE, TABLES = ("absmax1", "absmax2"), ("qmap1", "qmap2")  # their states with another shape than the parameter
PART = ":"  # exp_avg:codes is the part "codes" of the state exp_avg


def parts_of(states: dict) -> dict[str, Tensor]:
    """Return the states of a parameter as plain tensors. A quantized tensor becomes its parts."""
    found = {}
    for key, value in states.items():
        if is_traceable_wrapper_subclass(value):
            found |= {f"{key}{PART}{name}": getattr(value, name) for name in value.__tensor_flatten__()[0]}
        else:
            found[key] = torch.as_tensor(value)
    return found


def join_parts(states: dict[str, Tensor], param: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Undo `parts_of`, for a parameter of an optimizer of torchao."""
    found = {key: state for key, state in states.items() if PART not in key}
    for key in dict.fromkeys(key.partition(PART)[0] for key in states.keys() - found.keys()):
        found[key] = optimizer._new_buffer(param, signed=key == "exp_avg")
        for name in found[key].__tensor_flatten__()[0]:
            part = getattr(found[key], name)
            part.copy_(states[f"{key}{PART}{name}"].view_as(part))
    return found


def by_row(key: str, state: Tensor, param: nn.Parameter) -> Tensor | list[Tensor]:
    """Return the part of an optimizer's state that belongs to each row (expert) of a parameter."""
    if _for_all(key, state):
        return [state] * len(param)
    if PART in key and param[0].numel() % BLOCK == 0:
        return state.reshape(len(param), -1)
    if PART not in key and key not in BLOCKWISE and state.shape[0] == len(param) and state.ndim <= param.ndim:
        return state
    if key in BLOCKWISE and param[0].numel() % BLOCK == 0:
        return state.view(len(param), -1)
    raise ValueError(
        f"the optimizer's {key} cannot be split by expert. Set optim=adamw_torch_fused, or leave out --save_opt_states"
    )


def join_rows(key: str, parts: Sequence[Tensor]) -> Tensor:
    """Return the state of a parameter whose rows have these parts, as `by_row` gives them."""
    if _for_all(key, parts[0]):
        return parts[0]
    return torch.cat(list(parts)) if key in BLOCKWISE or PART in key else torch.stack(list(parts))


def _for_all(key: str, state: Tensor) -> bool:
    """Return whether a state is the same for all rows."""
    return not state.ndim or key in TABLES or key.endswith(f"{PART}qmap")
