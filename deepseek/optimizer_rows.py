"""Split the states that an optimizer keeps of a parameter by the parameter's rows, which are experts, and join them.

    AdamW      exp_avg, exp_avg_sq (S, ...): a row each; step: the same for all rows
    8 bits     state1, state2 (S, ...) and their scales absmax1, absmax2, a row of scales for each row; tables for all
    Adafactor  exp_avg_sq_row (S, O), exp_avg_sq_col (S, I)

Legend: S rows, one per expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

BLOCK = 256  # entries that share a scale in the 8-bit optimizers of bitsandbytes
BLOCKWISE, TABLES = ("absmax1", "absmax2"), ("qmap1", "qmap2")  # their states with another shape than the parameter


def by_row(key: str, state: Tensor, param: nn.Parameter) -> Tensor | list[Tensor]:
    """Return the part of an optimizer's state that belongs to each row (expert) of a parameter."""
    if not state.ndim or key in TABLES:  # the same for all
        return [state] * len(param)
    if key not in BLOCKWISE and state.shape[0] == len(param) and state.ndim <= param.ndim:
        return state
    if key in BLOCKWISE and param[0].numel() % BLOCK == 0:
        return state.view(len(param), -1)
    raise ValueError(
        f"the optimizer's {key} cannot be split by expert. Set optim=adamw_torch_fused, or leave out --save_opt_states"
    )


def join_rows(key: str, parts: Sequence[Tensor]) -> Tensor:
    """Return the state of a parameter whose rows have these parts, as `by_row` gives them."""
    if not parts[0].ndim or key in TABLES:
        return parts[0]
    return torch.cat(list(parts)) if key in BLOCKWISE else torch.stack(list(parts))
