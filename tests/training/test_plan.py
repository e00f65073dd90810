"""What a run is planned to be: the least costly ep_size and activation_checkpointing that fit, and what is said."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import esft
import train
from deepseek.loading import empty_model
from deepseek.process_groups import Ranks
from tests.helpers import config_of, make_model
from training import plan as sharding
from training.data import IGNORE, Pack
from training.memory import Estimator
from training.methods import chosen_experts

PACKS = [Pack([5] * 200, [IGNORE] * 100 + [5] * 100, [*range(120), *range(80)], [1, 2]), Pack([5], [5], [0], [3])]


@pytest.fixture
def plan(files, tmp_path, monkeypatch):
    """`plan(world, gib, **keys)`: the plan of a run on so many processes of so much memory, and what was said."""
    empty = empty_model(files / "m32")

    class Several(Ranks):
        def gather(self, obj):
            return [obj] * self.world_size

        def on_rank_zero(self, function):
            return function()

    def make(world: int, bytes_each: int, **keys):
        monkeypatch.setattr(sharding, "memory_of_a_process", lambda device: bytes_each)
        config, said = config_of(files, tmp_path / "out", **keys), []
        experts = chosen_experts(config, empty)
        args = SimpleNamespace(device=torch.device("cpu"), per_device_train_batch_size=2, gradient_accumulation_steps=1,
                               optim="adamw_torch_fused", **keys.get("args", {}))  # fmt: skip
        ranks = Several(rank=0, world_size=world)
        return sharding.plan_run(config, args, empty, experts, PACKS, ranks, said.append), said

    return make


def needs(plan, ep_size: int, checkpointing: bool, world: int = 4) -> int:
    return plan(world, 2**40, ep_size=ep_size, activation_checkpointing=checkpointing)[0].memory.peak


def test_the_first_that_fits_is_taken(plan):
    order = [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]
    peaks = {pair: needs(plan, *pair) for pair in order}
    assert peaks[1, True] < peaks[1, False] and peaks[4, True] < peaks[2, True] < peaks[1, True]
    for budget in sorted(peaks.values()):
        wanted = next(pair for pair in order if peaks[pair] <= budget)
        found, said = plan(4, budget, ep_size="auto", activation_checkpointing="auto")
        assert (found.ep_size, found.activation_checkpointing) == wanted and found.memory.peak == peaks[wanted]
        assert said[0].count(" with ") == order.index(wanted) + 1  # what was tried before is told


def test_where_nothing_fits_the_most_is_taken_with_a_warning(plan):
    with pytest.warns(
        UserWarning, match="it may run out of memory; what saves some: shard_dense=true, frozen_dtype=fp8"
    ):
        found, _ = plan(4, 1, ep_size="auto")
    assert (found.ep_size, found.activation_checkpointing) == (4, True)


def test_what_is_told_stays(plan):
    with pytest.warns(UserWarning, match="what saves some: activation_checkpointing=true, ep_size=4"):
        found, _ = plan(4, 1, ep_size=2, activation_checkpointing=False)
    assert (found.ep_size, found.activation_checkpointing) == (2, False)
    found, _ = plan(6, 2**40, ep_size=2, activation_checkpointing=True)
    assert (found.ep_size, found.activation_checkpointing) == (2, True)


def test_ep_size_divides_the_world_and_leaves_no_rank_without_experts(plan):
    with pytest.warns(UserWarning, match="may run out"):
        assert plan(6, 1, ep_size="auto")[0].ep_size == 6
        assert plan(16, 1, ep_size="auto")[0].ep_size == 8  # experts of a layer


def test_full_and_lora_are_planned_too(plan):
    pytest.importorskip("peft")
    peaks = {}
    for method in ("esft", "lora", "full"):
        found, _ = plan(2, 2**40, method=method)
        assert (found.ep_size, found.activation_checkpointing) == (1, False)
        peaks[method] = found.memory.peak
    assert peaks["esft"] < peaks["full"]


def test_stored_experts_take_less(plan):
    plain, eighth, four = (plan(1, 2**40, frozen_dtype=dtype)[0].memory for dtype in (None, "int8", "nf4"))
    assert four.experts < eighth.experts < plain.experts


def test_a_run_goes_on_where_nothing_can_be_estimated(plan, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(Estimator, "estimate", broken)
    found, said = plan(4, 2**40, ep_size="auto")
    assert (found.ep_size, found.activation_checkpointing, found.memory) == (4, True, None)
    assert said == ["  memory of a process (GiB, of 1,024.0), estimated: not known, no such kernel"]


def test_a_run_saves_memory_by_itself_and_says_what_to_do_when_it_is_out(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharding, "memory_of_a_process", lambda device: 1)
    enabled = []
    original = type(make_model()).activation_checkpointing_enable
    monkeypatch.setattr(
        "transformers.PreTrainedModel.activation_checkpointing_enable",
        lambda self, *a, **k: (enabled.append(True), original(self, *a, **k))[1],
    )
    with pytest.warns(UserWarning, match="may run out of memory"):
        results = train.run(config_of(files, tmp_path / "a", max_steps=2))
    assert enabled and results["estimated_peak_bytes"] > 1

    def out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train.ESFTTrainer, "training_step", out)
    with (
        pytest.warns(UserWarning),
        pytest.raises(
            ValueError, match=r"ran out after step 0 \(CUDA out.*\); what saves some, .*: frozen_dtype=fp8, "
        ),
    ):
        train.run(config_of(files, tmp_path / "b", max_steps=2))


def test_the_settings_are_those_of_the_run(files, tmp_path):
    config = config_of(files, tmp_path / "out", dtype="bfloat16", offload_frozen=True)
    args = SimpleNamespace(device=torch.device("cpu"), per_device_train_batch_size=3, gradient_accumulation_steps=4,
                           optim=SimpleNamespace(value="sgd"))  # fmt: skip
    found = sharding.settings_of(config, args, empty_model(files / "m32"), PACKS, Ranks(rank=0, world_size=1))
    wanted = {"seq_length": 200, "batch_size": 3, "label_share": 1.0, "packed": True, "accumulation": True}
    wanted |= {"dtype": "bfloat16", "offload_frozen": True, "optim": "sgd", "device": "cpu", "frozen_dtype": None}
    assert wanted.items() <= dataclasses.asdict(found).items()
    assert (
        esft.ExpertConfig.load(files / "experts.json").experts
        == chosen_experts(config, empty_model(files / "m32")).experts
    )
