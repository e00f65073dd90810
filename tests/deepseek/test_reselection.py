"""Test changes of the trained experts while an optimizer is at work: values, optimizer states, and what is refused."""

import dataclasses

import pytest
import torch
from torch import nn

import esft
from deepseek.experts import moe_layers
from esft import ExpertConfig, Reselection, add_adapter, base_values, save_adapter, to_esft, trained_config, unload
from tests.helpers import FAMILIES, make_model

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
FIRST = {1: (5, 2, 6), 2: (0,)}
CHANGES = {2: {1: (5, 2, 6, 1), 2: (0, 3)}, 4: {1: (2, 1, 7)}, 6: {1: (2, 5, 1), 2: (3, 4)}}  # before these steps
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1),
    "Adam, foreach": lambda p: torch.optim.Adam(p, lr=3e-3, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-3, lr_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


def trained(model) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def backward(model) -> None:
    model(IDS, labels=IDS, use_cache=False).loss.backward()


def rows(model, grad: bool = False) -> dict[tuple[int, int, str], torch.Tensor]:
    """(layer, expert, fused tensor) -> master of a trained expert, or its gradient."""
    return {
        (layer.index, expert, name): (master.grad if grad else master.data)[row].clone()
        for layer in moe_layers(model).values()
        for name, master in (layer.trained.named_parameters() if layer.trained else ())
        for row, expert in enumerate(layer.trained.expert_ids)
    }


def start(family="deepseek_v2", dtype=torch.float32, optimizer="AdamW", warmup=0, **options):
    model = to_esft(make_model(family, dtype), ExpertConfig(FIRST), **options)
    optimizer = OPTIMIZERS[optimizer](trained(model))
    return model, optimizer, Reselection(model, optimizer, warmup)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_expert_is_trained_as_by_an_optimizer_of_its_own(optimizer):
    """The reference is one optimizer per expert, which begins with the expert and gets the same gradients."""
    model, whole, reselection = start(optimizer=optimizer)
    alone: dict[tuple, tuple[nn.Parameter, torch.optim.Optimizer]] = {}
    for step in range(8):
        if step in CHANGES:
            reselection.train(ExpertConfig(CHANGES[step]))
            here = {la: layer.trained.expert_ids for la, layer in moe_layers(model).items() if layer.trained}
            assert {la: set(ids) for la, ids in here.items()} == {la: set(ids) for la, ids in CHANGES[step].items()}
        now = rows(model)
        alone = {key: pair for key, pair in alone.items() if key in now}
        for key in now.keys() - alone.keys():
            param = nn.Parameter(now[key].clone())
            alone[key] = param, OPTIMIZERS[optimizer]([param])
        backward(model)
        for key, grad in rows(model, grad=True).items():
            alone[key][0].grad = grad
            alone[key][1].step()
        whole.step()
        whole.zero_grad()
        after = rows(model)
        assert after.keys() == alone.keys()
        for key, value in after.items():
            assert torch.equal(value, alone[key][0].data), (step, key)
        assert all(param.grad is None for param in model.parameters())
    assert sum(len(group["params"]) for group in whole.param_groups) == len(whole.state) == 2 * 4  # generations


def test_one_step_count_for_all_rows_would_be_another_training():
    model, whole, reselection = start()
    for _ in range(6):
        backward(model)
        whole.step()
        whole.zero_grad()
    reselection.train(ExpertConfig({1: (5, 2, 6, 1), 2: (0,)}))
    before = rows(model)
    backward(model)
    whole.step()
    moved = {key: (value - before[key]).abs().max().item() for key, value in rows(model).items()}
    young = [size for (layer, expert, _), size in moved.items() if (layer, expert) == (1, 1)]
    assert young == pytest.approx([3e-3] * 2, rel=0.06)  # AdamW's first step; with the count of the old rows it is half


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_leaves_the_forward_and_the_masters_that_stay(family, dtype):
    model = make_model(family, dtype)
    first, *_, last = moe_layers(model)
    to_esft(model, ExpertConfig({first: (5, 2), last: (0, 7)}))
    optimizer = torch.optim.AdamW(trained(model), lr=3e-3)
    reselection = Reselection(model, optimizer)
    for config in ({first: (2, 1), last: (7,)}, {first: (5, 1)}, {first: (5,), last: (3, 4)}):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        before, logits_before = rows(model), logits(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        reselection.train(ExpertConfig(config))
        assert torch.equal(logits(model), logits_before)
        after = rows(model)
        assert all(torch.equal(after[key], before[key]) for key in after.keys() & before.keys())
        now = model.state_dict()
        assert now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
    assert {la: set(ids) for la, ids in trained_config(model).experts.items()} == {first: {5, 2, 1}, last: {0, 7, 3, 4}}


@pytest.mark.parametrize("how", [{}, {"frozen_dtype": "int8"}, {"offload_frozen": True}])
def test_the_adapter_holds_all_that_was_trained_and_the_base_comes_back(how, tmp_path):
    model, optimizer, reselection = start(**how)
    base = logits(model)
    for config in ({1: (5, 1), 2: (0, 3)}, {1: (5, 2)}):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        reselection.train(ExpertConfig(config))
        with base_values(model):
            assert torch.equal(logits(model), base)
    tuned = logits(model)
    assert not torch.equal(tuned, base)
    save_adapter(model, tmp_path)
    assert {la: set(ids) for la, ids in ExpertConfig.load(tmp_path).experts.items()} == {1: {5, 2, 6, 1}, 2: {0, 3}}
    assert torch.equal(logits(unload(model)), base)
    assert torch.equal(logits(add_adapter(model, tmp_path)), tuned)


def test_an_expert_that_left_stays_where_it_stood():
    model, optimizer, reselection = start()
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    reselection.train(ExpertConfig({1: (5,)}))
    left = {name: view.clone() for name, view in moe_layers(model)[1].expert_views(2).items()}
    for _ in range(3):
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(view, left[name]) for name, view in moe_layers(model)[1].expert_views(2).items())


def test_updates_of_young_experts_grow_over_the_warmup():
    sizes = []
    for warmup in (0, 4):
        model, optimizer, reselection = start(optimizer="SGD", warmup=warmup)
        moved = []
        for step in range(7):
            if step == 1:
                reselection.train(ExpertConfig({**FIRST, 2: (0, 3)}))
            before = rows(model)
            for param in trained(model):
                param.grad = torch.ones_like(param)
            optimizer.step()
            moved.append({key[:2]: (value - before[key]).abs().max().item() for key, value in rows(model).items()})
        sizes.append(moved)
    plain, warm = sizes
    assert [warm[i][2, 3] / plain[i][2, 3] for i in range(1, 7)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], rel=1e-4)
    assert all(warm[i][1, 5] == plain[i][1, 5] for i in range(7))


def test_masters_that_were_replaced_are_still_trained():
    model, optimizer, reselection = start()
    reselection.train(ExpertConfig({1: (5, 2), 2: (0, 3)}))
    for param in trained(model):
        param.data = param.data.clone()  # as a move to another device does
    before = rows(model)
    backward(model)
    optimizer.step()
    assert all(not torch.equal(value, before[key]) for key, value in rows(model).items())


def test_what_cannot_be_changed_is_refused_and_nothing_changes():
    model = to_esft(make_model(), ExpertConfig(FIRST), lora_rank=2)
    with pytest.raises(ValueError, match="LoRA on them"):
        Reselection(model, torch.optim.AdamW(trained(model)))
    model = to_esft(make_model(), ExpertConfig(FIRST))
    with pytest.raises(ValueError, match=r"the optimizer lacks model.layers.1.mlp.experts.gate_up_proj"):
        Reselection(model, torch.optim.AdamW([nn.Parameter(torch.zeros(1))]))
    model, _, reselection = start()
    before = dataclasses.replace(esft.trained_config(model))
    with pytest.raises(ValueError, match=r"expert 8 of layer 1"):
        reselection.train(ExpertConfig({1: (8,)}))
    with pytest.raises(ValueError, match=r"beside routed experts"):
        reselection.train(ExpertConfig({1: (1,)}, shared_experts=True))
    assert esft.trained_config(model) == before
