"""Test that expert parallelism equals one process: a step's logits, gradients and norm, in every family.

The last tests break a part on purpose, and the comparison sees it.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import esft
from deepseek import expert_parallel
from deepseek.expert_parallel import connect_experts, expert_parallel_forward
from deepseek.experts import moe_layers
from deepseek.gradient_sync import GradientReducer
from deepseek.grouped_gemm import esft_experts_forward
from deepseek.loading import empty_model, load_base_model
from deepseek.placement import Placement, place_layers
from deepseek.process_groups import Ranks
from tests.helpers import FAMILIES, RANK_TIMEOUT, assert_near, join_world, make_model, run_ranks
from training.data import IGNORE

pytestmark = pytest.mark.long

DENSE = {"shared_experts": True, "non_expert_modules": True}


# ---- a step: several ranks against one process ----------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    base: Path
    experts: dict  # as in an expert config
    placements: dict[int, Placement]
    batches: list[list[dict]]  # by rank, by micro batch
    ep_size: int
    checkpointing: bool = False
    dtype: str = "float32"
    lora_rank: int | None = None
    tolerance: float = 5e-6  # of the largest entry

    @property
    def label_count(self) -> int:
        return sum(int((inputs["labels"][:, 1:] != IGNORE).sum()) for inputs in itertools.chain(*self.batches))


@dataclass
class Step:
    logits: list[Tensor]  # by micro batch
    experts: dict[str, Tensor | None]  # gradients of the trained experts here, <experts module>.<id>.<tensor>
    others: dict[str, Tensor | None]  # and of all else that is trained
    norm: float
    received: dict[int, int]  # routed rows that came here, by layer


FILLERS = {"input_ids": 2, "attention_mask": 0, "labels": IGNORE}


def batch(seed: int, *lengths: int, tokens: int = 125) -> dict[str, Tensor]:
    """Return rows of `lengths` random tokens, padded on the right. The second half of each row are labels.

    Without `lengths` it is one row of padding.
    """
    generator = torch.Generator().manual_seed(seed)
    B, T = max(len(lengths), 1), max(lengths, default=2)
    inputs = {key: torch.full((B, T), filler) for key, filler in FILLERS.items()}
    for row, length in enumerate(lengths):
        ids = torch.randint(128 - tokens, 128, (length,), generator=generator)
        inputs["input_ids"][row, :length] = ids
        inputs["attention_mask"][row, :length] = 1
        inputs["labels"][row, length // 2 : length] = ids[length // 2 :]
    if not lengths:
        inputs["attention_mask"][:] = 1  # attention to nothing is not defined
    return inputs


def forward(model, inputs: dict[str, Tensor], label_count: int) -> tuple[Tensor, Tensor]:
    """Return (logits, cross entropy summed over labels / label_count)."""
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits.float()
    labels = inputs["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
    return logits, loss / label_count


def gradients(model) -> tuple[dict, dict]:
    experts, known = {}, set()
    for layer in moe_layers(model).values():
        for tensor, param in layer.trained.named_parameters() if layer.trained else ():
            known.add(id(param))
            for row, expert in enumerate(layer.trained.expert_ids):
                experts[f"{layer.name}.{expert}.{tensor}"] = None if param.grad is None else param.grad[row].clone()
    params = {name: param for name, param in model.named_parameters() if param.requires_grad and id(param) not in known}
    return experts, {name: param.grad for name, param in params.items()}


def prepare(model, case: Case) -> None:
    """Make a model trainable. With LoRA, B is not left at zero."""
    torch.manual_seed(0)
    esft.to_esft(model, case.experts, keep_base=False, lora_rank=case.lora_rank)
    for layer in moe_layers(model).values():
        for row, expert in enumerate(layer.lora.expert_ids) if layer.lora else ():
            generator = torch.Generator().manual_seed(expert)
            for projection in ("gate_proj", "up_proj", "down_proj"):
                layer.lora.factor(projection, "B").data[row].normal_(std=0.1, generator=generator)


def one_process(case: Case) -> Step:
    """Return the step of one process on all rows of all ranks and micro batches."""
    model, _ = load_base_model(case.base, dtype=case.dtype)
    prepare(model, case)
    parts = [inputs for inputs in itertools.chain(*case.batches) if (inputs["labels"] != IGNORE).any()]
    T = max(inputs["labels"].shape[1] for inputs in parts)
    joint = {
        key: torch.cat([torch.nn.functional.pad(p[key], (0, T - p[key].shape[1]), value=filler) for p in parts])
        for key, filler in FILLERS.items()
    }
    logits, loss = forward(model, joint, case.label_count)
    loss.backward()
    experts, others = gradients(model)
    norm = torch.nn.utils.get_total_norm([grad for grad in (experts | others).values() if grad is not None])
    return Step(list(logits.detach()), experts, others, norm.item(), {})


def several_ranks(rank: int, cases: list[Case], broken: str | None = None) -> list[Step]:
    """Return the steps as this rank takes part in them."""
    world, steps = join_world(), []
    for case in cases:
        with BREAKAGES[broken]() if broken else contextlib.nullcontext():
            try:
                steps.append(_take_part(world.with_experts(case.ep_size, RANK_TIMEOUT), case))
            except Exception as error:
                raise RuntimeError(f"{case.name}, ep_size {case.ep_size}") from error
    return steps


def _take_part(ranks: Ranks, case: Case) -> Step:
    batches, active, logits = case.batches[ranks.rank], False, []
    local = {layer: placement[ranks.expert_rank] for layer, placement in case.placements.items()}
    model, _ = load_base_model(case.base, dtype=case.dtype, experts=local if case.ep_size > 1 else None)
    prepare(model, case)
    if case.ep_size > 1:
        connect_experts(model, case.placements, {int(key): ids for key, ids in case.experts["experts"].items()}, ranks)
    if case.checkpointing:
        model.train().activation_checkpointing_enable()
    reducer = GradientReducer(model, ranks, lambda: active)
    with counted_rows() as received:
        for inputs in batches:
            active = inputs is batches[-1]
            out, loss = forward(model, inputs, case.label_count)
            (loss * ranks.world_size).backward()
            logits.append(out.detach())
    reducer.finish()
    norm = reducer.clip(math.inf)
    rows = {i: received[id(layer.module)] for i, layer in moe_layers(model).items() if id(layer.module) in received}
    return Step(logits, *gradients(model), norm.item(), rows)


@contextlib.contextmanager
def counted_rows() -> Iterator[dict[int, int]]:
    """Yield {id of an experts module: routed rows that came to it}."""
    received: dict[int, int] = {}
    original = expert_parallel.grouped_experts

    def grouped_experts(layer, x_RD, *args):
        received[id(layer.module)] = received.get(id(layer.module), 0) + len(x_RD)
        return original(layer, x_RD, *args)

    with mock.patch.object(expert_parallel, "grouped_experts", grouped_experts):
        yield received


def run_and_compare(world: int, cases: list[Case]) -> None:
    failed = []
    for case, *steps in zip(cases, *run_ranks(world, several_ranks, cases)):
        try:
            compare(case, steps)
        except AssertionError as error:
            failed.append(f"{case.name}, ep_size {case.ep_size}: {error}")
    assert not failed, "\n".join(failed)


def compare(case: Case, steps: list[Step]) -> None:
    """Raise AssertionError where the ranks' step is not that of one process."""
    wanted, size = one_process(case), case.ep_size
    wanted_grads, wanted_rows = wanted.experts | wanted.others, iter(wanted.logits)
    for rank, step in enumerate(steps):
        for inputs, logits_BT in zip(case.batches[rank], step.logits, strict=True):
            if (inputs["labels"] != IGNORE).any():
                for mask_T, logits_T, wanted_T in zip(inputs["attention_mask"].bool(), logits_BT, wanted_rows):
                    wanted_T = wanted_T[: len(mask_T)]
                    assert_near(f"logits on rank {rank}", logits_T[mask_T], wanted_T[mask_T], case.tolerance)
        assert step.others.keys() == wanted.others.keys()
        for name, grad in (step.experts | step.others).items():
            assert_near(f"gradient of {name} on rank {rank}", grad, wanted_grads[name], case.tolerance)
        assert abs(step.norm - wanted.norm) <= case.tolerance * wanted.norm, f"norm {step.norm}, not {wanted.norm}"
    for first in range(0, len(steps), size):  # a replica has every trained expert once
        replica = steps[first : first + size]
        assert sorted(itertools.chain(*(step.experts for step in replica))) == sorted(wanted.experts)


def placed(base: Path, experts: dict, ep_size: int, how: str = "contiguous") -> dict[int, Placement]:
    """Return contiguous placements, or placements by scores drawn at random."""
    layers = {index: layer.num_experts for index, layer in moe_layers(empty_model(base)).items()}
    generator = random.Random(0)
    load_LE = {layer: {expert: generator.random() for expert in range(E)} for layer, E in layers.items()}
    trained_L = {int(layer): ids for layer, ids in experts["experts"].items()}
    return place_layers(layers, trained_L, ep_size, load_LE, how == "contiguous")


def sizes(world: int) -> list[int]:
    """Return the values of ep_size that a world of 2 or 4 allows."""
    return [size for size in (1, 2, 4) if size <= world]


@pytest.mark.parametrize("world", [2, 4])
def test_every_family_takes_the_step_of_one_process(bases, world):
    cases, batches = [], [[batch(rank, 9)] for rank in range(world)]
    for family, size in itertools.product(FAMILIES, sizes(world)):
        base = bases(family)
        *_, before, last = moe_layers(empty_model(base))
        chosen = {"experts": {str(before): [5], str(last): [0, 3, 6]}}
        if size == world:
            cases.append(Case(family, base, chosen, placed(base, chosen, size), batches, size))
        if size < 4:
            name, chosen = f"{family}, by score, all else trained, checkpointing", chosen | DENSE
            placements = placed(base, chosen, size, "score")
            cases.append(Case(name, base, chosen, placements, batches, size, checkpointing=True))
    run_and_compare(world, cases)


FEATURES = {
    "checkpointing": {"checkpointing": True},
    "by score": {"how": "score"},
    "all else trained": {"dense": DENSE},
    "shared experts trained": {"dense": {"shared_experts": True}},
    "no expert trained, shared ones": {"experts": {}, "dense": {"shared_experts": True}},
    "no expert trained, all else, checkpointing": {"experts": {}, "dense": DENSE, "checkpointing": True},
    "two micro batches": {"micro": 2, "dense": DENSE},
    "a rank without trained experts in a layer": {"experts": {"1": [1], "2": [0, 7]}},
    "ranks without trained experts": {"experts": {"1": [1], "2": [0]}},
    "ranks without trained experts, checkpointing": {"experts": {"1": [1], "2": [0]}, "checkpointing": True},
    "first trained in the middle": {"family": "qwen3_moe", "experts": {"1": [0, 1, 6]}},
    "first trained in the middle, on one rank": {"family": "mixtral", "experts": {"1": [0]}, "checkpointing": True},
    "seven experts": {"family": "mixtral", "changes": {"num_local_experts": 7}},
    "five experts, by score": {
        "family": "olmoe",
        "changes": {"num_experts": 5},
        "experts": {"0": [4, 0]},
        "how": "score",
    },
    "batches of several sizes": {"lengths": [(9, 4), (3,), (12, 12, 2), (5,)], "dense": DENSE},
    "ranks with nothing but padding": {"lengths": [(9, 4), (), (12, 2), ()]},
    "nothing but padding on the first": {"lengths": [(), (9, 4), (12, 2), (3,)], "dense": DENSE},
    "bf16": {"dtype": "bfloat16", "tolerance": 0.05, "dense": DENSE},
    "lora": {"lora_rank": 3, "checkpointing": True},
    "lora on one rank of a layer": {"lora_rank": 3, "experts": {"1": [1], "2": [0, 7]}},
    "all at once": {
        "experts": {"1": [1], "2": [0, 7]},
        "lengths": [(9, 4), (), (12, 2), (3,)],
        "micro": 2,
        "checkpointing": True,
        "dense": {"shared_experts": True},
    },
}


def cases_of(
    bases,
    world,
    name,
    family="deepseek_v2",
    changes=None,
    experts=None,
    dense=None,
    how="contiguous",
    micro=1,
    lengths=None,
    **keys,
) -> list[Case]:
    """Return a case for every ep_size above 1 that the world allows."""
    base = bases(family, **changes or {})
    chosen = {"experts": {"1": [5], "2": [0, 3, 4]} if experts is None else experts, **(dense or {})}
    rows = lengths or [(7, 9)] * world  # by rank, and turned by one for the next micro batch
    batches = [[batch(10 * i + rank, *rows[(rank + i) % world]) for i in range(micro)] for rank in range(world)]
    return [
        Case(name, base, chosen, placed(base, chosen, size, how), batches, size, **keys) for size in sizes(world)[1:]
    ]


@pytest.mark.parametrize("world, every", [(2, 1), (4, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_step_is_that_of_one_process(bases, world, every):
    """4 processes are two replicas, then one. With `every` 2, each case runs one of the two."""
    cases = [case for name, keys in FEATURES.items() for case in cases_of(bases, world, name, **keys)]
    run_and_compare(world, [case for number, case in enumerate(cases) if every == 1 or number % 2 == number // 2 % 2])


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_gets_no_token_takes_part(bases, world):
    """The last rank of each replica holds one expert per layer. No token chooses it. It is trained in layer 1."""
    cases = [case for checkpointing in (False, True) for case in unchosen(bases, world, checkpointing)]
    for case, *steps in zip(cases, *run_ranks(world, several_ranks, cases)):
        for rank, step in enumerate(steps):
            if rank % case.ep_size == case.ep_size - 1:
                assert step.received == {1: 0, 2: 0}
                assert step.experts and not any(grad.any() for grad in step.experts.values())
        compare(case, steps)


def unchosen(bases, world: int, checkpointing: bool) -> list[Case]:
    base = bases()
    model, _ = load_base_model(base)
    for seed in range(100):
        batches = [[batch(1000 * seed + rank, 4, tokens=2)] for rank in range(world)]
        with esft.RouterCapture(model) as capture, torch.no_grad():
            model(torch.cat([inputs["input_ids"] for (inputs,) in batches]))
        counts = capture.counts()
        slots_LE = dict(zip(counts.layers, counts.sums["slots"].tolist()))
        if all(0 in slots_E for slots_E in slots_LE.values()):
            break
    idle = {layer: slots_E.index(0) for layer, slots_E in slots_LE.items()}
    rest = {layer: [expert for expert in range(8) if expert != idle[layer]] for layer in idle}
    chosen = {"experts": {"1": [idle[1], rest[1][2]], "2": [rest[2][0]]}}
    cases = []
    for size in sizes(world)[1:]:
        placements = {
            layer: (*(tuple(ids[rank :: size - 1]) for rank in range(size - 1)), (idle[layer],))
            for layer, ids in rest.items()
        }
        cases.append(Case("no token", base, chosen, placements, batches, size, checkpointing))
    return cases


def lone_modules(rank: int, tokens: list[tuple[int, int]]) -> None:
    """Compare the experts modules alone. `tokens` are the numbers of tokens of each rank."""
    ranks, whole, local = join_world().with_experts(2, RANK_TIMEOUT), make_model(), make_model()
    placements, trained = {layer: ((0, 2, 3, 7), (1, 4, 5, 6)) for layer in (1, 2)}, {1: [3, 4]}
    for layer in moe_layers(local).values():
        layer.keep_local(placements[layer.index][rank])
    for model in (whole, local):
        esft.to_esft(model, esft.ExpertConfig(trained), keep_base=False)
    connect_experts(local, placements, trained, ranks)
    for layer, T in itertools.product((1, 2), (pair[rank] for pair in tokens)):
        x_TD, dy_TD, weights_TK = torch.randn(T, 32), torch.randn(T, 32), torch.rand(T, 3)
        ids_TK = torch.rand(T, 8).argsort(-1)[:, :3]
        found = []
        for model, forward in ((local, expert_parallel_forward), (whole, esft_experts_forward)):
            leaves = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
            out_TD = forward(moe_layers(model)[layer].module, leaves[0], ids_TK, leaves[1])
            out_TD.backward(dy_TD)
            found.append([out_TD, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(*found)


def test_ranks_may_have_any_number_of_tokens():
    run_ranks(2, lone_modules, [(5, 3), (1, 1), (2, 40), (0, 4), (6, 0), (0, 0)])


@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_weights_travel_beside_rows_bit_for_bit(x, weight):
    x_TD, weight_N, index_N = torch.randn(3, 8).to(x), torch.randn(5).to(weight), torch.tensor([2, 0, 0, 1, 2])
    rows, weights = expert_parallel._unpack(expert_parallel._pack(x_TD, index_N, weight_N), weight)
    assert torch.equal(rows, x_TD[index_N]) and torch.equal(weights, weight_N)


# ---- broken on purpose: the comparison above sees it -----------------------------------------------------------------


def too_large():
    finish = GradientReducer.finish

    def broken(self):
        finish(self)
        torch._foreach_mul_([p.grad for p in self.params if p.grad is not None], self.ranks.world_size)

    return mock.patch.object(GradientReducer, "finish", broken)


def without_sum_over(group: str):
    add = GradientReducer._add

    def broken(self, params, over):
        if over is not getattr(self.ranks, group):
            add(self, params, over)

    return mock.patch.object(GradientReducer, "_add", broken)


def norm_of_this_rank():
    clip = GradientReducer.clip

    def broken(self, *args):
        self.ranks = dataclasses.replace(self.ranks, ep_size=1)
        return clip(self, *args)

    return mock.patch.object(GradientReducer, "clip", broken)


def home_in_sent_order():
    home = expert_parallel._home

    def broken(rows_ND, route):
        return home(rows_ND, dataclasses.replace(route, inverse_TK=route.perm_N.view_as(route.inverse_TK)))

    return mock.patch.object(expert_parallel, "_home", broken)


def weights_not_sent():
    pack = expert_parallel._pack
    return mock.patch.object(expert_parallel, "_pack", lambda x, index, weight: pack(x, index, torch.ones_like(weight)))


def slots_by_number():
    return mock.patch.object(expert_parallel, "sorted", lambda ids, key: sorted(ids), create=True)


BREAKAGES = {
    "gradients not divided by the world": too_large,
    "experts not summed over replicas": functools.partial(without_sum_over, "replica_group"),
    "dense parameters not summed over the world": functools.partial(without_sum_over, "world_group"),
    "a norm without the experts of other ranks": norm_of_this_rank,
    "rows brought home in the order sent": home_in_sent_order,
    "gate weights not sent": weights_not_sent,
    "slots without the trained experts first": slots_by_number,
}


@pytest.mark.parametrize("broken", BREAKAGES)
def test_what_is_broken_is_seen(bases, broken):
    case = next(iter(cases_of(bases, 4, broken, dense=DENSE)))
    assert case.ep_size == 2
    with pytest.raises(AssertionError, match=r"off by|^norm"):
        compare(case, [steps for (steps,) in run_ranks(4, several_ranks, [case], broken)])
