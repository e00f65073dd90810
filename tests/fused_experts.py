"""Small random fused experts modules of every layout, and what a call of one gives."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from deepseek.experts import MoELayer, TrainedExperts, train_experts

T, D, F, E, K = 24, 16, 8, 6, 2
LAYOUTS = {
    "plain": {},
    "no_gate": {"has_gate": False},
    "bias": {"has_bias": True},
    "no_gate_bias": {"has_gate": False, "has_bias": True},
    "transposed": {"is_transposed": True},
    "transposed_interleaved_bias": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "post_norm": {"has_post_expert_norm": True},
    "post_norm_bias": {"has_post_expert_norm": True, "has_bias": True},
}


def make_experts(layout="plain", dtype=torch.float32, trained=(), seed=0, kind: Callable = TrainedExperts):
    """Return a random fused experts module of one layout, with `trained` experts in front."""
    flags = LAYOUTS[layout]

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn = E, nn.SiLU()
            up = "up_proj" if flags.get("has_gate") is False else "gate_up_proj"
            width = F if up == "up_proj" else 2 * F
            shapes = {up: (E, width, D), "down_proj": (E, D, F)}
            if flags.get("is_transposed"):
                shapes = {name: (e, i, o) for name, (e, o, i) in shapes.items()}
            if flags.get("has_bias"):
                shapes |= {f"{up}_bias": (E, width), "down_proj_bias": (E, D)}
            for name, shape in shapes.items():
                self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.4))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.RMSNorm(D, eps=1e-6)

        def forward(self, *args):
            raise NotImplementedError

        if flags.get("is_concatenated") is False:

            def _apply_gate(self, gate_up):
                return self.act_fn(gate_up[..., ::2]) * gate_up[..., 1::2]

    torch.manual_seed(seed)
    module = use_experts_implementation(**flags)(Experts)(SimpleNamespace(_experts_implementation="grouped_mm"))
    module.to(dtype)
    if trained:
        train_experts(MoELayer(module, 0, "experts"), trained, kind)
    return module


def inputs(dtype=torch.float32, tokens=T, experts=range(E), seed=1):
    """Return tokens, ids and weights. Only `experts` are routed to."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    pool = torch.tensor(list(experts))
    ids_TK = torch.stack(
        [pool[torch.randperm(len(pool), generator=generator)[:K]] for _ in range(tokens)] or [pool[:K]]
    )
    weights_TK = torch.rand(tokens, K, generator=generator).requires_grad_()
    return x_TD, ids_TK[:tokens], weights_TK


def run(module, implementation, x_TD, ids_TK, weights_TK, wrap=lambda module: module):
    """Return the output, and the gradients of sum(out * fixed noise) by name: "x", "weights" and the parameters."""
    module.config._experts_implementation = implementation
    module.zero_grad()
    x_TD, weights_TK = (t.detach().requires_grad_(t.requires_grad) for t in (x_TD, weights_TK))
    out_TD = wrap(module)(x_TD, ids_TK, weights_TK)
    noise_TD = torch.randn(out_TD.shape, generator=torch.Generator().manual_seed(2)).to(out_TD)
    if out_TD.requires_grad:
        (out_TD * noise_TD).sum().backward()
    params = module.trained if hasattr(module, "trained") else module
    grads = {name: param.grad for name, param in params.named_parameters() if "norm" not in name}
    return out_TD.detach(), {"x": x_TD.grad, "weights": weights_TK.grad, **grads}


def assert_near(found, wanted, tolerance):
    """Compare within `tolerance` of the largest entry. What is None must be None in both."""
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert (grad is None) == (wanted[name] is None), name
        if grad is not None:
            error = (grad.float() - wanted[name].float()).abs().max() / wanted[name].float().abs().max()
            assert error <= tolerance, f"{name}: {error:.2e}"
