"""Pull what is trained towards the base, after every optimizer step: key `l2_to_base`, l below.

    p <- p - lr l (p - p_base)

This is L2-SP (Li et al. 2018, arXiv 1802.01483), decoupled from the gradient as AdamW's weight decay is (Loshchilov and
Hutter 2019, arXiv 1711.05101). `lr` is the rate of the parameter's group in that step. The base's values are those that
`to_esft(keep_base=True)` keeps, in the dtype of the base. On a GPU they lie in host memory and pass by once per step.
"""

import torch
from transformers import TrainerCallback

from deepseek.adapters import adapter_views, find_state
from deepseek.experts import inner_model


class PullToBase(TrainerCallback):
    """Makes the pull of a run. `strength` is l."""

    def __init__(self, strength: float):
        self.strength = strength

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, model, optimizer, **_) -> None:
        model = inner_model(model)
        prepared = find_state(model)
        rates = {
            p.untyped_storage().data_ptr(): group["lr"] for group in optimizer.param_groups for p in group["params"]
        }
        for name, view in adapter_views(model, prepared.config).items():
            if (rate := rates.get(view.untyped_storage().data_ptr())) is not None:  # experts may have been frozen again
                base = prepared.displaced[name].to(view.device, non_blocking=True).to(view.dtype)
                view.lerp_(base, self.strength * rate)
