"""Expert parallelism equals one process: a step's logits, gradients and norm in every family, whole runs, resumed ones,
adapters; and it no longer does as soon as any part of it is broken."""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import esft
import train
from deepseek import expert_parallel
from deepseek.expert_parallel import connect_experts, expert_parallel_forward, gather_to_first
from deepseek.experts import moe_layers
from deepseek.files import write_json, write_jsonl
from deepseek.gradient_sync import GradientReducer
from deepseek.grouped_gemm import esft_experts_forward
from deepseek.loading import empty_model, load_base_model
from deepseek.placement import Placement, place_layers
from deepseek.process_groups import Ranks, SharedError, join
from tests.helpers import FAMILIES, Killed, at_step, config_of, kill, losses, make_model, run_ranks, same, weights
from training import checkpoints
from training.data import IGNORE, load_data
from training.trainer import ESFTTrainer

TIMEOUT = timedelta(seconds=60)
DENSE = {"shared_experts": True, "non_expert_modules": True}


@pytest.fixture(scope="session")
def bases(tmp_path_factory, tiny_tokenizer):
    """`bases(family, **changes)`: the folder of a model, in shards, with a tokenizer."""

    @functools.cache
    def folder(family: str = "deepseek_v2", **changes) -> Path:
        path = tmp_path_factory.mktemp(family)
        make_model(family, **changes).save_pretrained(path, max_shard_size="50KB")
        tiny_tokenizer.save_pretrained(path)
        return path

    return folder


def joined() -> Ranks:
    return join(TIMEOUT, "gloo")


# ---- processes ------------------------------------------------------------------------------------------------------


def misbehave(rank: int, how: str) -> int:
    if rank == 1 and how == "raises":
        raise KeyError("only here")
    if rank == 1 and how == "dies":
        os._exit(3)
    if how == "all hang" or (rank == 1 and how == "hangs"):
        time.sleep(1000)
    dist.barrier()
    return rank


def test_ranks_that_fail_are_told_and_never_waited_for():
    assert run_ranks(3, misbehave, "not at all") == [0, 1, 2]
    for how, text, timeout in (
        ("raises", r"rank 1 of 2:(.|\n)*KeyError: 'only here'", 60),
        ("dies", "exit codes {1: 3}", 60),
        ("hangs", r"rank 0 of 2:(.|\n)*barrier(.|\n)*[Tt]imed out", 2),
        ("all hang", r"ranks \[0, 1\] not done after 1 s", 1),
    ):
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=text):
            run_ranks(2, misbehave, how, timeout=timeout)
        assert time.monotonic() - start < 30


def groups(rank: int) -> list:
    world, found = joined(), []
    for ep_size in (1, 2, 4):
        ranks = world.with_experts(ep_size, TIMEOUT)
        members = [dist.get_process_group_ranks(group) for group in (ranks.experts, ranks.replicas)]
        found.append((ranks.ep_size, ranks.expert_rank, ranks.first_replica, *members))
    for ep_size in (3, 8, 0):
        with pytest.raises(SharedError, match=f"ep_size={ep_size} does not divide the 4 processes"):
            world.with_experts(ep_size, TIMEOUT)
    return found


def test_consecutive_ranks_make_a_replica():
    for rank, found in enumerate(run_ranks(4, groups)):
        first, place = rank // 2 * 2, rank % 2
        assert found == [
            (1, 0, rank == 0, [rank], [0, 1, 2, 3]),
            (2, place, rank < 2, [first, first + 1], [place, place + 2]),
            (4, rank, True, [0, 1, 2, 3], [rank]),
        ]
    assert joined() == Ranks() == Ranks().with_experts(1, TIMEOUT)


def errors(rank: int) -> list:
    ranks, told = joined(), []

    def no_disk():
        raise OSError("no disk")

    for attempt in (
        lambda: ranks.raise_on_all("no room" if rank == 1 else None),
        lambda: ranks.raise_on_all(ValueError("odd") if rank else None),
        lambda: ranks.on_rank_zero(no_disk),
    ):
        with pytest.raises(SharedError) as error:
            attempt()
        told.append(str(error.value))
    ranks.raise_on_all(None)
    return [*told, ranks.on_rank_zero(lambda: rank + 7), ranks.gather(rank * 2)]


def test_an_error_of_one_rank_is_raised_alike_on_all():
    told = run_ranks(3, errors)
    assert told == [["rank 1: no room", "rank 1: odd", "no disk", 7, [0, 2, 4]]] * 3
    with pytest.raises(SharedError, match=r"^odd$"):  # of one process: no rank to be named
        Ranks().raise_on_all(ValueError("odd"))
    Ranks().raise_on_all(None)
    assert Ranks().on_rank_zero(lambda: 3) == 3 and Ranks().gather("a") == ["a"]


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
    """Rows of so many random tokens, of which the second half are labels, padded on the right. Without any, a row of
    nothing but padding."""
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
    """(logits, cross entropy summed over labels / label_count)"""
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


def one_process(case: Case) -> Step:
    """The step of one process on the joint batch: all rows of all ranks and micro batches."""
    model, _ = load_base_model(case.base, dtype=case.dtype)
    esft.to_esft(model, case.experts, keep_base=False)
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
    """The steps as this rank takes part in them."""
    world, steps = joined(), []
    for case in cases:
        with BREAKAGES[broken]() if broken else contextlib.nullcontext():
            try:
                steps.append(_take_part(world.with_experts(case.ep_size, TIMEOUT), case))
            except Exception as error:
                raise RuntimeError(f"{case.name}, ep_size {case.ep_size}") from error
    return steps


def _take_part(ranks: Ranks, case: Case) -> Step:
    batches, active, logits = case.batches[ranks.rank], False, []
    local = {layer: placement[ranks.expert_rank] for layer, placement in case.placements.items()}
    model, _ = load_base_model(case.base, dtype=case.dtype, experts=local if case.ep_size > 1 else None)
    esft.to_esft(model, case.experts, keep_base=False)
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


def assert_near(what: str, found: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    assert (found is None) == (wanted is None), f"{what}: {found} instead of {wanted}"
    if wanted is not None:
        error, scale = (found - wanted).abs().max(), wanted.abs().max()
        assert error <= tolerance * scale + 1e-12, f"{what}: off by {error:.1e}, the largest entry is {scale:.1e}"


def placed(base: Path, experts: dict, ep_size: int, how: str = "contiguous") -> dict[int, Placement]:
    """Contiguous, or by scores drawn at random."""
    layers = {index: layer.num_experts for index, layer in moe_layers(empty_model(base)).items()}
    generator = random.Random(0)
    load_LE = {layer: {expert: generator.random() for expert in range(E)} for layer, E in layers.items()}
    trained_L = {int(layer): ids for layer, ids in experts["experts"].items()}
    return place_layers(layers, trained_L, ep_size, load_LE, how == "contiguous")


def sizes(world: int) -> list[int]:
    """Of the ranks that share the experts, in a world of 2 or 4."""
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
    """With every number of ranks above 1 that a replica may have."""
    base = bases(family, **changes or {})
    chosen = {"experts": {"1": [5], "2": [0, 3, 4]} if experts is None else experts, **(dense or {})}
    rows = lengths or [(7, 9)] * world  # by rank, and turned by one for the next micro batch
    batches = [[batch(10 * i + rank, *rows[(rank + i) % world]) for i in range(micro)] for rank in range(world)]
    return [
        Case(name, base, chosen, placed(base, chosen, size, how), batches, size, **keys) for size in sizes(world)[1:]
    ]


@pytest.mark.parametrize("world, every", [(2, 1), (4, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_step_is_that_of_one_process(bases, world, every):
    """Of 4 processes two replicas and one, or (`every` 2) in turns."""
    cases = [case for name, keys in FEATURES.items() for case in cases_of(bases, world, name, **keys)]
    run_and_compare(world, [case for number, case in enumerate(cases) if every == 1 or number % 2 == number // 2 % 2])


@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_that_gets_no_token_takes_part(bases, world):
    """The last rank of each replica holds, in every layer, one expert that no token chooses, trained in one of them."""
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
    """The experts modules alone, on so many tokens of each rank."""
    ranks, whole, local = joined().with_experts(2, TIMEOUT), make_model(), make_model()
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
    "experts not summed over replicas": functools.partial(without_sum_over, "replicas"),
    "dense parameters not summed over the world": functools.partial(without_sum_over, "world"),
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


# ---- reading a checkpoint --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes",
    [*((family, {}) for family in FAMILIES), ("mixtral", {"tie_word_embeddings": True, "num_local_experts": 12})],
)
def test_a_rank_reads_and_holds_its_experts_only(bases, family, changes):
    base = bases(family, **changes)
    whole, _ = load_base_model(base)
    layers = moe_layers(whole)
    fused = {f"{layer.name}.{tensor}": index for index, layer in layers.items() for tensor in layer.tensor_names}
    shards = [load_file(path) for path in base.glob("*.safetensors")]
    expert_bytes = sum(whole.get_parameter(name).nbytes for name in fused)
    dense_bytes = sum(tensor.nbytes for shard in shards for tensor in shard.values()) - expert_bytes
    assert len(shards) > 2 and dense_bytes > 0
    for ep_size in (1, 2, 4):
        placements = place_layers({index: layer.num_experts for index, layer in layers.items()}, {}, ep_size)
        for rank in range(ep_size):
            local = {layer: list(placement[rank]) for layer, placement in placements.items()}
            model, _ = load_base_model(base, experts=local)
            assert model.read_bytes == dense_bytes + expert_bytes // ep_size
            assert type(model) is type(whole)
            assert local == {index: layer.local_ids for index, layer in moe_layers(model).items()}
            wanted = {name: p[local[fused[name]]] if name in fused else p for name, p in whole.named_parameters()}
            assert wanted.keys() == dict(model.named_parameters()).keys()
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                assert torch.equal(tensor, wanted[name] if name in wanted else whole.get_buffer(name)), name


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_experts_of_any_number_are_read_in_bf16(bases, family):
    whole, _ = load_base_model(bases(family), dtype="bfloat16")
    local = dict(zip(moe_layers(whole), ([6], range(8), [5, 1, 0])))
    model, _ = load_base_model(bases(family), dtype="bfloat16", experts=local)
    rows = {
        f"{layer.name}.{tensor}": sorted(local[index])
        for index, layer in moe_layers(model).items()
        for tensor in layer.tensor_names
    }
    wanted = dict(itertools.chain(whole.named_parameters(), whole.named_buffers()))
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        other = wanted[name][rows[name]] if name in rows else wanted[name]
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name


def test_a_checkpoint_that_is_not_whole_is_refused_for_some_experts_too(bases, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(bases(), folder)
    local = {1: [0, 1], 2: [4, 5]}
    for path in folder.glob("*.safetensors"):
        tensors = {key: t for key, t in load_file(path).items() if "layers.2.mlp.experts.3." not in key}
        save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.experts.\w+ has 7 tensors in the checkpoint for 8"):
        load_base_model(folder, experts=local)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"read \*\.safetensors only"):
        load_base_model(folder, experts=local)


# ---- adapters --------------------------------------------------------------------------------------------------------


def bring_together(rank: int) -> list:
    own = {
        f"{rank} matrix": torch.full((2, 3), rank + 0.5).T,
        f"{rank} bf16": torch.arange(5, dtype=torch.bfloat16) + rank,
        f"{rank} number": torch.tensor(rank),
        f"{rank} nothing": torch.empty(0, 4),
        "of all": torch.tensor([rank]),
    }
    return [own, *(gather_to_first(own, joined().with_experts(ep_size, TIMEOUT)) for ep_size in (1, 2, 4))]


def test_tensors_of_a_replica_come_to_the_first_rank():
    owns, *gathered = zip(*run_ranks(4, bring_together))
    for ep_size, found in zip((1, 2, 4), gathered):
        assert found[1:] == ({}, {}, {})
        wanted = {}
        for own in reversed(owns[:ep_size]):  # of all: the lowest rank's
            wanted |= own
        assert found[0].keys() == wanted.keys()
        for name, tensor in found[0].items():
            assert tensor.dtype == wanted[name].dtype and torch.equal(tensor, wanted[name]), name


ADAPTED = {"experts": {"1": [5], "2": [6, 0, 3]}, **DENSE}
ADAPTED_IDS = torch.arange(3, 23).view(2, 10)


def train_a_little(model) -> None:
    """Move what is trained, each expert in its own way."""
    for layer in moe_layers(model).values():
        for param in layer.trained.parameters() if layer.trained else ():
            param.data += torch.tensor(layer.trained.expert_ids).view(-1, *[1] * (param.ndim - 1)) / 100 + 0.01
    routed = {id(param) for layer in moe_layers(model).values() for param in layer.module.parameters()}
    for param in model.parameters():
        if param.requires_grad and id(param) not in routed:
            param.data += 0.01


def save_and_add(rank: int, base: Path, folder: Path, dtype: str) -> dict:
    """An adapter written by ranks, and those of one process in `folder` added on ranks."""
    ranks = joined().with_experts(2, TIMEOUT)
    placements = {1: ((0, 1, 2, 7), (3, 4, 5, 6)), 2: ((0, 2, 4, 6), (1, 3, 5, 7))}
    local = {layer: placement[ranks.expert_rank] for layer, placement in placements.items()}

    def fresh(experts: dict):
        model, _ = load_base_model(base, dtype=dtype, experts=local)
        if experts:
            esft.to_esft(model, experts, keep_base=False)
        connect_experts(model, placements, {int(key): ids for key, ids in experts.get("experts", {}).items()}, ranks)
        return model

    def logits(model):
        with torch.no_grad():
            return model(ADAPTED_IDS, use_cache=False).logits.float()

    model = fresh(ADAPTED)
    train_a_little(model)
    tensors = gather_to_first(esft.adapter_tensors(model), ranks)
    if ranks.rank == 0:
        esft.save_adapter(model, folder / "ranks", tensors)
    found = {"gathered": len(tensors), "trained": logits(model)}
    found["added"] = logits(esft.add_adapter(fresh({}), folder / "one"))
    found["added in training"] = logits(esft.add_adapter(fresh(ADAPTED), folder / "one"))
    model = fresh({})
    before = {name: param.clone() for name, param in model.state_dict().items()}
    for name in ("cut", "strange"):
        try:
            esft.add_adapter(model, folder / name)
            esft.unload(model)
        except ValueError as error:
            found[name] = str(error)
    esft.unload(esft.add_adapter(model, folder / "one"))
    found["unloaded"] = all(torch.equal(param, before[name]) for name, param in model.state_dict().items())
    return found


@pytest.mark.parametrize("world, dtype", [(2, "float32"), (4, "bfloat16")])
def test_an_adapter_of_ranks_is_that_of_one_process(bases, tmp_path, world, dtype):
    model, _ = load_base_model(bases(), dtype=dtype)
    with torch.no_grad():
        base_logits = model(ADAPTED_IDS, use_cache=False).logits.float()
        esft.to_esft(model, ADAPTED, keep_base=False)
        train_a_little(model)
        wanted = model(ADAPTED_IDS, use_cache=False).logits.float()
    esft.save_adapter(model, tmp_path / "one")
    tensors, lost = esft.adapter_tensors(model), "model.layers.2.mlp.experts.3.up_proj.weight"  # of rank 1
    for name, changed in (
        ("cut", {key: tensor for key, tensor in tensors.items() if key != lost}),
        ("strange", tensors | {lost.replace(".3.", ".4."): tensors[lost].clone()}),
    ):
        shutil.copytree(tmp_path / "one", tmp_path / name)
        save_file(changed, tmp_path / name / "adapter.safetensors")

    found = run_ranks(world, save_and_add, bases(), tmp_path, dtype)
    one, ranks = (tmp_path / name for name in ("one", "ranks"))
    assert (one / "expert_cfg.json").read_text() == (ranks / "expert_cfg.json").read_text()
    written, by_one = (load_file(folder / "adapter.safetensors") for folder in (ranks, one))
    assert written.keys() == by_one.keys()
    assert all(
        torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype for name, tensor in by_one.items()
    )
    assert [rank["gathered"] for rank in found] == [len(by_one)] + [0] * (world - 1)
    tolerance = 5e-6 if dtype == "float32" else 0.02
    assert (wanted - base_logits).abs().max() > 10 * tolerance * wanted.abs().max()
    for rank, mine in enumerate(found):
        for how in ("trained", "added", "added in training"):
            assert_near(f"{how}, rank {rank}", mine[how], wanted, tolerance)
        assert mine["unloaded"]
        if rank % 2:  # the rank that needs it
            assert f"{lost} is missing" in mine["cut"]
        else:
            assert "cut" not in mine
        assert "experts.4.up_proj.weight is not in its expert_cfg.json" in mine["strange"]


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = {"batch_size": 1, "max_steps": 8, "eval_steps": 5, "save_steps": 4, "save_opt_states": True, "max_grad_norm": 0.3}


@pytest.fixture(scope="module")
def files(bases, tmp_path_factory):
    """A folder as `test_train.config_of` wants it, and scores."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "m32").symlink_to(bases())
    rows = []
    for i in range(32):
        turns = ("user", f"is it {i}?"), ("assistant", " ".join([f"yes {i}"] * (1 + i % 4)))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    write_jsonl(folder / "data.jsonl", rows)
    chosen = {"experts": {"1": [3, 5], "2": [0, 6, 2]}}
    write_json(folder / "experts.json", chosen)
    write_json(folder / "nemotron.json", {"experts": {"0": [3, 5], "2": [0]}})
    write_json(folder / "all.json", {**chosen, **DENSE})
    score_E = {expert: (1 + expert) / 36 for expert in range(8)}
    (folder / "scores").mkdir()
    esft.ExpertScores({"token": {1: score_E, 2: score_E}}).save(folder / "scores" / "summary.json")
    return folder


def train_runs(rank: int, files: Path, runs: list[tuple[Path, dict, Callable | None]]) -> list:
    """Runs one after another: output folder, keys, what disturbs it. Returns their results, or how they ended."""
    ended = []
    for out, keys, disturb in runs:
        with pytest.MonkeyPatch.context() as patch:
            if disturb:
                disturb(patch, rank)
            try:
                ended.append(train.run(config_of(files, out, **keys)))
            except (Killed, SystemExit, SharedError) as error:
                ended.append(repr(error))
    return ended


def assert_same_run(found: Path, wanted: Path, tolerance: float = 1e-6) -> None:
    """The losses of all steps and of validation, gradient norms, and the adapter, within what rounding makes of them
    (which is more for single weights: AdamW divides a gradient near 0 by its own size)."""
    left, right = losses(found), losses(wanted)
    assert left.keys() == right.keys()
    for key, value in right.items():
        allowed = tolerance * (5 if key[0] == "grad_norm" else 1)
        assert abs(left[key] - value) <= allowed * value, f"{key}: {left[key]}, not {value}"
    left, right = weights(found), weights(wanted)
    assert left.keys() == right.keys()
    for name, tensor in right.items():
        error, size = (left[name] - tensor).float().norm(), tensor.float().norm()
        assert error <= 10 * tolerance * size, f"{name}: off by {error:.1e}, its norm is {size:.1e}"


@pytest.mark.parametrize(
    "world, keys",
    [
        (2, {"max_steps": 20}),
        pytest.param(2, {"max_steps": 50}, marks=pytest.mark.slow),
        pytest.param(4, {"max_steps": 50, "accumulation_steps": 2}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {
                "max_steps": 50,
                "learning_rate": 1e-3,
                "expert_config": "all.json",
                "load_best_model_at_end": True,
                "save_steps": 5,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_has_the_losses_of_one_process(files, tmp_path, world, keys):
    keys = {**RUN, "verify_frozen": True, **keys}
    keys["expert_config"] = files / keys.get("expert_config", "experts.json")
    accumulated = keys.get("accumulation_steps", 1)
    alone = config_of(files, tmp_path / "one", **{**keys, "accumulation_steps": accumulated * world})
    packs, eval_packs = load_data(esft.load_tokenizer(files / "m32"), **alone.data)
    assert len(packs) % (world * accumulated) and len(eval_packs) % world  # where data end, a rank has no batch
    one = train.run(alone)
    scores = files / "scores"
    runs = [
        (tmp_path / f"ep {size}", {**keys, "ep_size": size, "expert_scores_dir": scores}, None)
        for size in sizes(world)[1:]
    ]
    for size, *results in zip(sizes(world)[1:], *run_ranks(world, train_runs, files, runs, timeout=500)):
        assert_same_run(tmp_path / f"ep {size}", tmp_path / "one")
        for key in (
            "steps",
            "best_step",
            "parameters",
            "trained_parameters",
            "gradient_bytes",
            "optimizer_bytes",
            "saved_bytes",
        ):
            assert results[0][key] == one[key], key
        assert results[0]["frozen_verified"] and results[0]["ep_size"] == size


WAYS = {
    "full": {"method": "full", "ep_size": "auto", "learning_rate": 1e-3},
    "lora": {"method": "lora", "ep_size": "auto", "learning_rate": 1e-3},
    "random": {"method": "random"},
    "dense weights shared out": {"shard_dense": True},
    "dense weights shared out, replicas": {"shard_dense": True, "ep_size": 1},
    "dense weights shared out, bf16": {"shard_dense": True, "dtype": "bfloat16", "expert_config": "all.json"},
    "activation checkpointing": {"activation_checkpointing": True},
    "one sample a pack": {"base_model_path": "gpt_oss"},
    "groups of experts": {"base_model_path": "deepseek_v3"},
    "no gate": {"base_model_path": "nemotron_h", "expert_config": "nemotron.json"},
    "frozen in fp8": {"frozen_dtype": "fp8"},
    "frozen in int8, elsewhere": {"frozen_dtype": "int8", "offload_frozen": True, "base_model_path": "gpt_oss"},
    "frozen in nf4, bf16": {"frozen_dtype": "nf4", "dtype": "bfloat16", "shard_dense": True},
}
QUICK = ("full", "dense weights shared out", "dense weights shared out, bf16", "one sample a pack", "frozen in fp8")


@pytest.mark.filterwarnings("ignore:in a .* the documents of a pack would see each other")
@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in WAYS if name not in QUICK], marks=pytest.mark.slow)]
)
def test_every_way_of_training_has_the_losses_of_one_process(files, bases, tmp_path, names):
    pytest.importorskip("peft")
    if any("nf4" in name for name in names):
        pytest.importorskip("bitsandbytes")
    alone, runs = {}, []
    for name in names:
        keys = {**RUN, "max_steps": 4, "ep_size": 2, **WAYS[name]}
        keys["verify_frozen"] = name != "full"
        keys["expert_config"] = files / keys.get("expert_config", "experts.json")
        if "base_model_path" in keys:
            keys["base_model_path"] = bases(keys["base_model_path"])
        runs.append((tmp_path / name / "ranks", keys, None))
        alone = {**keys, "accumulation_steps": 2, "ep_size": 1, "shard_dense": False}
        train.run(config_of(files, tmp_path / name / "one", **alone))
    for ended in run_ranks(2, train_runs, files, runs):
        assert [result["steps"] for result in ended] == [4] * len(names)
    for name in names:
        assert_same_run(tmp_path / name / "ranks", tmp_path / name / "one", 5e-3 if "bf16" in name else 1e-6)


def small_buckets(patch, _rank):
    patch.setattr("deepseek.gradient_sync.BUCKET_BYTES", 1)


def test_gathers_of_dense_weights_and_sums_of_gradients_may_cross(files, bases, tmp_path):
    """Ranks whose trained experts lie in different layers do them in different orders."""
    base, config = bases(num_hidden_layers=6), files / "apart.json"
    write_json(config, {"experts": {"2": [7], "4": [0, 1]}, "shared_experts": True})
    keys = {**RUN, "base_model_path": base, "expert_config": config, "max_steps": 2, "placement": "contiguous"}
    keys |= {"validation_fraction": 0, "eval_steps": None, "ddp_timeout": 30}
    train.run(config_of(files, tmp_path / "one", **keys, accumulation_steps=4))
    runs = [(tmp_path / "ranks", {**keys, "ep_size": 2, "shard_dense": True}, small_buckets)]
    run_ranks(4, train_runs, files, runs)
    assert_same_run(tmp_path / "ranks", tmp_path / "one")


def no_room(patch, _rank):
    patch.setattr("training.plan.memory_of_a_process", lambda device: 1)


def test_auto_keeps_whole_replicas_where_they_fit(files, tmp_path):
    keys = {**RUN, "max_steps": 1, "ep_size": "auto", "verify_frozen": True}
    fits, not_fits = run_ranks(2, train_runs, files, [(tmp_path / "a", keys, None), (tmp_path / "b", keys, no_room)])[0]
    assert (fits["ep_size"], not_fits["ep_size"]) == (1, 2)


def killed(patch, _rank):
    at_step(patch, 6, kill)


LAYOUTS = {
    "as before": {"ep_size": 2},
    "replicas": {"ep_size": 1},
    "placed otherwise": {"ep_size": 2, "placement": "contiguous"},
}


@pytest.mark.parametrize("how", ["fp32", "bf16, all else trained", "8 bits"])
def test_a_run_broken_off_goes_on_in_any_layout(files, bases, tmp_path, how):
    keys, layouts = {**RUN, "ep_size": 2, "expert_scores_dir": files / "scores"}, list(LAYOUTS)
    if how == "8 bits":
        pytest.importorskip("bitsandbytes")
        keys |= {"optim": "adamw_bnb_8bit", "base_model_path": bases(moe_intermediate_size=128), "learning_rate": 1e-3}
    elif how != "fp32":
        keys |= {"dtype": "bfloat16", "expert_config": files / "all.json"}
        layouts.remove("placed otherwise")
    alone = {**keys, "ep_size": 1, "accumulation_steps": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        killed(patch, 0)
        train.run(config_of(files, tmp_path / "from one", **alone))
    runs = [(tmp_path / "whole", keys, None)]
    runs += [(tmp_path / name, keys, killed) for name in (*layouts, "to one")]
    runs += [(tmp_path / name, {**keys, **LAYOUTS[name]}, None) for name in layouts]
    runs += [(tmp_path / "from one", keys, None)]
    for ended in run_ranks(2, train_runs, files, runs):
        for (out, _, disturbed), end in zip(runs, ended, strict=True):
            assert end == "Killed()" if disturbed else end["steps"] == 8, out
    assert not list((tmp_path / "to one").glob("*.safetensors"))
    train.run(config_of(files, tmp_path / "to one", **alone))
    assert same(tmp_path / "as before", tmp_path / "whole")
    for name in (*layouts, "from one", "to one"):
        assert_same_run(tmp_path / name, tmp_path / "whole", 1e-6 if how == "fp32" else 5e-3)


def nan_on_one_rank(patch, rank):
    original = ESFTTrainer._loss_sum

    def loss_sum(self, model, *args):
        loss, outputs = original(self, model, *args)
        return loss * (float("nan") if rank == 1 and model.training and self.state.global_step == 2 else 1), outputs

    patch.setattr(ESFTTrainer, "_loss_sum", loss_sum)


def another_expert_moved(patch, rank):
    def move(trainer):
        if rank == 1:
            moe_layers(trainer.model)[2].module.down_proj.data[-1] += 1

    at_step(patch, 2, move)


def disk_full_on_one_rank(patch, rank):
    def full(*_):
        raise OSError("no space left")

    if rank == 1:
        patch.setattr(checkpoints, "save_states", full)


@pytest.mark.parametrize(
    "way, text",
    [
        (nan_on_one_rank, r"step 3: the loss is nan and the gradient norm nan on rows \d+(, \d+)* of"),
        (another_expert_moved, r"rank 1: verify_frozen: 1 of 39 .*layers\.2\.mlp\.experts\.down_proj"),
        (disk_full_on_one_rank, r"rank 1: .*checkpoint-2 could not be written \(no space left\)"),
    ],
)
def test_what_goes_wrong_on_one_rank_stops_all_with_one_sentence(files, tmp_path, way, text):
    keys = {**RUN, "max_steps": 4, "ep_size": 2, "save_steps": 2, "verify_frozen": True}
    (one,), (other,) = run_ranks(2, train_runs, files, [(tmp_path / "out", keys, way)])
    assert one == other and re.search(text, one)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert (tmp_path / "out" / "checkpoint-2").is_dir() == (way is not disk_full_on_one_rank)
