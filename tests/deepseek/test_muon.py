"""Muon on fused experts: torch's own on each single matrix, in every layout, and AdamW on everything else."""

import pytest
import torch

from deepseek.experts import FusedExperts, moe_layers
from deepseek.muon import Muon, orthogonal
from deepseek.reselection import Reselection
from esft import ExpertConfig, to_esft
from tests.fused_experts import LAYOUTS, make_experts
from tests.helpers import make_model

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}


def matrices(layer: FusedExperts, source: dict) -> dict[tuple[str, int], torch.Tensor]:
    """Single matrices (O, I) by projection and row, copied from tensors of the fused names."""
    return {
        (projection, row): one.clone()
        for name in layer.weight_names
        for projection, every in layer.split(name, source[name]).items()
        for row, one in enumerate(every)
    }


@pytest.mark.parametrize("momentum", [0.95, 0.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_matrix_gets_the_update_of_torch_and_the_rest_that_of_adamw(layout, momentum):
    layer = FusedExperts(make_experts(layout, trained=(4, 1, 2)))
    params = dict(layer.trained.named_parameters())
    before = {name: param.detach().clone() for name, param in params.items()}
    single = {key: torch.nn.Parameter(one) for key, one in matrices(layer, before).items()}
    biases = {name: torch.nn.Parameter(before[name]) for name in layer.tensor_names[2:]}
    ours = Muon(params.values(), [layer], momentum=momentum, **SETTINGS)
    torchs = [torch.optim.Muon(single.values(), momentum=momentum, adjust_lr_fn="match_rms_adamw", **SETTINGS)]
    torchs += [torch.optim.AdamW(biases.values(), **SETTINGS)] if biases else []
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
        for key, grad in matrices(layer, {name: param.grad for name, param in params.items()}).items():
            single[key].grad = grad
        for name, bias in biases.items():
            bias.grad = params[name].grad.clone()
        for optimizer in (ours, *torchs):
            optimizer.step()
    found = matrices(layer, {name: param.detach() for name, param in params.items()})
    start = matrices(layer, before)
    assert len(found) == 3 * (2 if layout.startswith("no_gate") else 3)
    for key, one in found.items():
        moved, wanted = one - start[key], single[key].detach() - start[key]
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(moved, wanted, atol=0.02 * wanted.abs().max().item(), rtol=0)
    for name, bias in biases.items():
        assert torch.equal(params[name], bias)


def test_orthogonal_matrices_have_singular_values_near_one_and_zero_stays_zero():
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 16, 40), (4, 40, 16)):
        raw = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonal(raw).float())
        assert values.min() > 0.3 and values.max() < 1.4
        assert torch.linalg.svdvals(raw).max() > 5
    assert not orthogonal(torch.zeros(2, 8, 8)).any()


def test_an_expert_without_a_token_stays_and_its_neighbours_move():
    layer = FusedExperts(make_experts(trained=(4, 1)))
    param = layer.trained.get_parameter("down_proj")
    optimizer = Muon([param], [layer], lr=0.01, weight_decay=0)
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    before = param.detach().clone()
    param.grad[1] = 0
    optimizer.step()
    assert torch.equal(param[1], before[1]) and (param[0] - before[0]).abs().max() > 1e-3


def test_the_size_of_an_update_is_that_of_adamw():
    """Root mean square about 0.2 x lr, as Adam's on real gradients, whatever the gradient's size."""
    layer = FusedExperts(make_experts(trained=(0, 1, 2)))
    for scale in (1e-6, 1e3):
        param = layer.trained.get_parameter("gate_up_proj")
        before = param.detach().clone()
        param.grad = scale * torch.randn(param.shape, generator=torch.Generator().manual_seed(1))
        Muon([param], [layer], lr=0.01, weight_decay=0).step()
        assert 0.1 < (param - before).square().mean().sqrt().item() / 0.01 < 0.3


def test_groups_keep_their_settings_and_their_states_load():
    model = to_esft(make_model(), ExpertConfig({1: (3, 5)}, shared_experts=True))
    layers = moe_layers(model)
    experts = list(layers[1].trained.parameters())
    others = [p for p in model.parameters() if p.requires_grad and all(p is not e for e in experts)]
    groups = [{"params": [*experts, *others[:1]], "weight_decay": 0.5}, {"params": others[1:], "lr": 1e-4}]
    optimizer = Muon(groups, layers.values(), **SETTINGS)
    found = [(g["matrix"], g["weight_decay"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    first = [("gate_up_proj", 0.5, 0.01, 1), ("down_proj", 0.5, 0.01, 1), (None, 0.5, 0.01, 1)]
    second = [("gate_up_proj", 0.1, 1e-4, 0), ("down_proj", 0.1, 1e-4, 0), (None, 0.1, 1e-4, len(others) - 1)]
    assert found == first + second
    of_none = Muon([{"params": []}, {"params": []}], layers.values(), **SETTINGS)  # a rank may hold no trained expert
    assert [group["matrix"] for group in of_none.param_groups] == [matrix for matrix, *_ in found]
    for param in (*experts, *others):
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert {tuple(sorted(optimizer.state[p])) for p in experts} == {("momentum_buffer",)}
    assert {tuple(sorted(optimizer.state[p])) for p in others} == {("exp_avg", "exp_avg_sq", "step")}
    again = Muon(groups, layers.values(), **SETTINGS)
    again.load_state_dict(optimizer.state_dict())
    values = [p.detach().clone() for p in (*experts, *others)]
    optimizer.step()
    stepped = [p.detach().clone() for p in (*experts, *others)]
    for param, value in zip((*experts, *others), values):
        param.data.copy_(value)
    again.step()
    assert all(torch.equal(p, wanted) for p, wanted in zip((*experts, *others), stepped))


def test_experts_that_begin_later_get_the_update_of_muon_too():
    """The optimizer then sees them as parameters of their own."""
    model = to_esft(make_model(), ExpertConfig({1: (3, 5)}))
    optimizer = Muon([p for p in model.parameters() if p.requires_grad], moe_layers(model).values(), **SETTINGS)
    reselection, steps = Reselection(model, optimizer), 3
    for step in range(steps):
        if step == 1:
            reselection.train(ExpertConfig({1: (3, 5, 6)}))
        before = {id: view["up_proj.weight"].clone() for id in (3, 5, 6) for view in [views(model, id)]}
        for param in moe_layers(model)[1].trained.parameters():
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        for id in (3, 5, 6)[: 2 if step == 0 else 3]:
            size = (views(model, id)["up_proj.weight"] - before[id]).square().mean().sqrt().item() / SETTINGS["lr"]
            assert 0.1 < size < 0.3
    assert reselection.step == steps
    assert sum("momentum_buffer" in state for state in optimizer.state.values()) == 4


def test_a_first_expert_of_a_layout_finds_its_group():
    model = to_esft(make_model(), ExpertConfig({}, shared_experts=True))
    optimizer = Muon([p for p in model.parameters() if p.requires_grad], moe_layers(model).values(), **SETTINGS)
    Reselection(model, optimizer).train(ExpertConfig({1: (3,)}, shared_experts=True))
    found = {group["matrix"]: {p.shape[1:] for p in group["params"]} for group in optimizer.param_groups}
    layer = moe_layers(model)[1]
    assert {name: found[name] for name in layer.weight_names} == {
        name: {layer.tensor(name).shape[1:]} for name in layer.weight_names
    }


def views(model, id: int) -> dict[str, torch.Tensor]:
    return moe_layers(model)[1].expert_views(id)
