"""Test GradientReducer: sums over ranks, gradients that some ranks lack, buckets, and clipping."""

import math
from datetime import timedelta

import pytest
import torch
from torch import nn

import esft
from deepseek import gradient_sync as gradients
from deepseek.experts import moe_layers
from deepseek.gradient_sync import GradientReducer, split_parameters
from deepseek.process_groups import Ranks, join
from tests.helpers import make_model, run_ranks

TIMEOUT = timedelta(seconds=60)


class Sums(nn.Module):
    """A forward uses the parameters it is told. The gradient of each is the factor given for it."""

    def __init__(self, dtypes=(torch.float32,) * 4):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(3, 2, dtype=dtype) for dtype in dtypes)

    def forward(self, factors: dict[int, float]) -> torch.Tensor:
        return sum((self.weights[i] * factor).sum().float() for i, factor in factors.items())


def grads(model) -> list:
    return [None if p.grad is None else p.grad.flatten().tolist() for p in model.parameters()]


def reduced(rank: int, bucket_bytes: int) -> dict:
    gradients.BUCKET_BYTES = bucket_bytes
    ranks, found = join(TIMEOUT, "gloo"), {}
    model = Sums()
    reducer = GradientReducer(model, ranks, lambda: True)
    found["buckets"] = len(reducer.buckets)
    # 0 on both ranks, 1 on the first, 2 on the second, 3 on none; then the other way round
    for step, mine in enumerate([({0: 1.0, 1: 2.0}, {0: 3.0, 2: 4.0}), ({3: 1.0}, {0: 1.0, 1: 0.0})]):
        model.zero_grad()
        model(mine[rank]).backward()
        reducer.finish()
        found[f"step {step}"] = grads(model)
    found["norm"] = reducer.clip(math.inf).item()
    found["unclipped"] = grads(model)
    found["norm before"] = reducer.clip(0.1).item()
    found["clipped"] = reducer.clip(math.inf).item()

    model, active = Sums(), False  # two micro batches; the second leaves out what the first had
    reducer = GradientReducer(model, ranks, lambda: active)
    model({0: 1.0, rank + 1: 2.0}).backward()
    found["first micro batch"] = grads(model)
    active = True
    model({0: 3.0 + rank}).backward()
    reducer.finish()
    found["both micro batches"] = grads(model)

    model = Sums((torch.float32, torch.float64, torch.float32, torch.float64))
    reducer = GradientReducer(model, ranks, lambda: True)
    model(dict.fromkeys(range(4), 2.0 * rank)).backward()
    reducer.finish()
    found["dtypes"] = [(str(p.grad.dtype), p.grad.unique().item()) for p in model.parameters()]
    return found


@pytest.mark.parametrize("bucket_bytes, buckets", [(1, 4), (60, 2), (2**20, 1)])
def test_gradients_are_means_over_the_world_where_any_rank_has_one(bucket_bytes, buckets):
    def all_of(*values):
        return [None if value is None else [value] * 6 for value in values]

    for rank, found in enumerate(run_ranks(2, reduced, bucket_bytes)):
        assert found["buckets"] == buckets
        assert found["step 0"] == all_of(2.0, 1.0, 2.0, None)
        assert found["step 1"] == all_of(0.5, 0.0, None, 0.5)
        assert found["norm"] == found["norm before"] == pytest.approx(math.sqrt(12 * 0.25))
        assert found["unclipped"] == found["step 1"]
        assert found["clipped"] == pytest.approx(0.1, rel=1e-4)
        assert found["first micro batch"] == all_of(1.0, *((2.0, None) if rank == 0 else (None, 2.0)), None)
        assert found["both micro batches"] == all_of(4.5, 1.0, 1.0, None)
        assert found["dtypes"] == [("torch.float32", 1.0), ("torch.float64", 1.0)] * 2


def test_one_process_keeps_its_gradients():
    model = Sums()
    reducer = GradientReducer(model, Ranks(), lambda: True)
    model({0: 3.0, 2: 4.0}).backward()
    reducer.finish()
    assert grads(model) == [[3.0] * 6, None, [4.0] * 6, None]
    assert reducer.clip(1.0).item() == pytest.approx(math.sqrt(6 * 25))
    assert torch.nn.utils.get_total_norm([model.weights[i].grad for i in (0, 2)]).item() == pytest.approx(1, rel=1e-4)


def test_parameters_are_split_into_experts_and_others():
    model = esft.to_esft(make_model(), {"experts": {"1": [2], "2": [0, 5]}, "shared_experts": True})
    experts, others = split_parameters(model)
    trained = [param for layer in moe_layers(model).values() for param in layer.trained.parameters()]
    assert [id(p) for p in experts] == [id(p) for p in trained]
    assert {id(p) for p in experts + others} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(others) == 6 and not {id(p) for p in experts} & {id(p) for p in others}
    dense = Sums()
    assert [len(part) for part in split_parameters(dense)] == [0, 4]


def in_order(rank: int) -> list[list[int]]:
    """Return the order in which buckets start. The ranks' backwards reach the parameters in different orders."""
    gradients.BUCKET_BYTES = 1
    model, started = Sums(), []
    reducer = GradientReducer(model, join(TIMEOUT, "gloo"), lambda: True)
    for number, bucket in enumerate(reducer.buckets):
        start = bucket.start
        bucket.start = lambda number=number, start=start: (started.append(number), start())
    for mine in ([0, 1, 2, 3], [3, 2, 1, 0])[:: 1 - 2 * rank]:
        loss = 0.0
        for i in mine:  # a chain: the last used is reached first
            loss = (model.weights[i] * (1.0 + loss)).sum()
        loss.backward()
        reducer.finish()
    return started


def test_buckets_start_in_the_same_order_on_all_ranks():
    assert run_ranks(2, in_order) == [[0, 1, 2, 3] * 2] * 2
