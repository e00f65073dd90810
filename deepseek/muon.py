"""Muon for the matrices of trained experts, and AdamW for everything else.

    B <- m B + (1 - m) G        U = m B + (1 - m) G        W <- W - lr wd W - lr 0.2 sqrt(max(O, I)) orthogonal(U)

`orthogonal` replaces the singular values of a matrix (O, I) by numbers near 1, in five Newton-Schulz steps in bf16
(Jordan et al. 2024, the coefficients are theirs). The factor 0.2 sqrt(max(O, I)) gives an entry the size 0.2 lr, which
is AdamW's in long pretraining (Liu et al. 2025, arXiv 2502.16982, equation 4). Short runs take a higher one.

torch.optim.Muon does this for parameters of two dimensions. The trained experts of a layer are one parameter of three,
and gate and up lie in it together. So `FusedExperts.split` gives the matrices (S, O, I) of each projection, in every
layout, and the steps are batched over S. Each matrix gets the update of torch's, up to rounding.

One thing differs. An orthogonal update has the same size however small the gradient is. An expert without a token in a
step would still move, and at full size, along what its momentum remembers. Here it stays, but for weight decay.

Legend: S trained experts of the layer, O and I rows and columns of one projection.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from deepseek.experts import FusedExperts

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices_SOI: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest orthogonal matrices, roughly: singular values between about 0.7 and 1.2. (S, O, I), bf16."""
    a, b, c = COEFFICIENTS
    tall = matrices_SOI.shape[1] > matrices_SOI.shape[2]
    x = (matrices_SOI.mT if tall else matrices_SOI).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the trained experts in `layers`, AdamW for all other parameters.

    Args:
        params: parameters or parameter groups. They become a group for each fused matrix and one for the others. A
            parameter that is added to a group of experts later has rows of that matrix.
        layers: the MoE layers of the model (`experts.moe_layers`), after it is known what is trained.
        momentum, ns_steps: of Muon.
        adamw: the settings of torch.optim.AdamW. `lr` and `weight_decay` serve both.
    """

    def __init__(self, params, layers: Iterable[FusedExperts], momentum: float = 0.95, ns_steps: int = 5, **adamw):
        self._layout: dict[str, FusedExperts] = {}  # by name of the fused matrix: all layers have one layout
        matrix_of: dict[Tensor, str] = {}
        for layer in layers:
            source = layer.trained or layer.module
            for name in () if layer.lora else layer.weight_names:
                matrix_of[source.get_parameter(name)] = name
                self._layout[name] = layer
        params = list(params)
        groups = []
        for group in params if isinstance(params[0], dict) else [{"params": params}]:
            parts: dict[str | None, list] = {name: [] for name in (*self._layout, None)}  # the same on every rank
            for param in group["params"]:
                parts[matrix_of.get(param)].append(param)
            groups += [{**group, "params": part, "matrix": name} for name, part in parts.items()]
        self._adamw = torch.optim.AdamW([{"params": []}], **adamw)
        super().__init__(groups, {**self._adamw.defaults, "momentum": momentum, "ns_steps": ns_steps})

    def step(self, closure=None):
        loss = closure and torch.enable_grad()(closure)()
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if group["matrix"] is None]
        self._adamw.step()
        for group in self.param_groups:
            for param in group["params"] if group["matrix"] else ():
                if param.grad is not None:
                    self._update(param, group)
        return loss

    @torch.no_grad()
    def _update(self, param: Tensor, group: dict) -> None:
        layer, name = self._layout[group["matrix"]], group["matrix"]
        if param not in self.state:
            self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        buffer = self.state[param]["momentum_buffer"].lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(buffer, group["momentum"])
        used_S11 = param.grad.flatten(1).any(1)[:, None, None]  # by tokens of this step
        param.mul_(1 - group["lr"] * group["weight_decay"])
        for projection, matrices_SOI in layer.split(name, update).items():
            size = 0.2 * max(matrices_SOI.shape[1:]) ** 0.5
            change_SOI = orthogonal(matrices_SOI, group["ns_steps"]) * used_S11
            layer.split(name, param)[projection].add_(change_SOI, alpha=-group["lr"] * size)
