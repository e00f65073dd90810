"""What a run is planned to be: the least costly ep_size and activation_checkpointing that fit, and what is said."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from deepseek.process_groups import Ranks
from tests.helpers import config_of, make_model
from training.config import training_arguments
from training.data import Packs
from training.memory import Estimator, MemoryEstimate
from training.plan import memory_of_a_process, memory_settings, open_empty, plan_run
from training.trainer import ESFTTrainer

DOCUMENTS = SimpleNamespace(lengths=np.array([120, 80, 1]), label_counts=np.array([20, 80, 1]))
PACKS = Packs(DOCUMENTS, np.array([1, 2, 3]), [[0, 1], [2]], 4096)


@pytest.fixture
def plan(files, tmp_path, monkeypatch, caplog):
    """`plan(world, gib, **keys)`: the plan of a run on so many processes of so much memory, and what was said."""

    class Several(Ranks):
        def gather(self, obj):
            return [obj] * self.world_size

        def on_rank_zero(self, function):
            return function()

    def make(world: int, bytes_each: int, **keys):
        monkeypatch.setattr("training.plan.memory_of_a_process", lambda device: bytes_each)
        config = config_of(files, tmp_path / "out", **keys)
        caplog.clear()
        with caplog.at_level("INFO", "esft"):
            found = plan_run(
                config,
                training_arguments(config),
                PACKS,
                ranks := Several(rank=0, world_size=world),
                open_empty(config, ranks),
            )
        return found, caplog.messages

    return make


@pytest.mark.long
def test_the_first_that_fits_is_taken(plan, files, tmp_path, monkeypatch):
    order = [(1, False), (1, True), (2, False), (2, True), (4, False), (4, True)]
    config = config_of(files, tmp_path / "out")
    found, _ = plan(4, 2**40)
    estimate = functools.cache(Estimator(found.empty, "esft", found.experts).estimate)
    monkeypatch.setattr(Estimator, "estimate", lambda _, settings: estimate(settings))  # one for all plans
    settings = memory_settings(config, training_arguments(config), found, PACKS, 4)
    layouts = {pair: {"ep_size": pair[0], "activation_checkpointing": pair[1]} for pair in order}
    peaks = {pair: estimate(dataclasses.replace(settings, **keys)).peak for pair, keys in layouts.items()}
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


def test_ep_size_divides_the_world_and_leaves_no_rank_without_experts(plan, monkeypatch):
    monkeypatch.setattr(Estimator, "estimate", lambda *_: MemoryEstimate(*[2**40] * 9))
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
    assert said == ["  memory of a process could not be estimated: no such kernel"]


def test_a_run_goes_on_with_an_optimizer_of_unknown_states(plan):
    found, said = plan(1, 2**40, optim="adafactor")
    assert found.memory is None and "cannot estimate the memory of optim=adafactor" in said[0]


@pytest.mark.long
def test_a_run_saves_memory_by_itself_and_says_what_to_do_when_it_is_out(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.plan.memory_of_a_process", lambda device: 1)
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

    monkeypatch.setattr(ESFTTrainer, "training_step", out)
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"ran out after step 0 \(CUDA out.*\)\. These settings .*: frozen_dtype=fp8, "),
    ):
        train.run(config_of(files, tmp_path / "b", max_steps=2))


def test_on_a_cpu_nothing_is_estimated(plan, monkeypatch):
    def broken(*_):
        raise AssertionError("estimated")

    monkeypatch.setattr(Estimator, "estimate", broken)
    found, said = plan(4, None, ep_size="auto", activation_checkpointing="auto")
    assert (found.ep_size, found.activation_checkpointing, found.memory) == (1, False, None)
    assert said == ["  ep_size=auto is 1 on a CPU: every process holds all experts. ep_size=4 shares them out"]
    for world, keys in ((1, {"ep_size": "auto"}), (4, {"ep_size": 1}), (4, {"ep_size": "auto", "method": "full"})):
        assert not plan(world, None, **keys)[1]
    assert memory_of_a_process(torch.device("cpu")) is None


@pytest.mark.parametrize("checkpointing", [True, False])
def test_what_is_not_auto_stays_and_is_not_estimated(plan, monkeypatch, checkpointing):
    monkeypatch.setattr(Estimator, "estimate", lambda *_: 1 / 0)
    found, said = plan(4, 1, ep_size=2, activation_checkpointing=checkpointing)
    assert (found.ep_size, found.activation_checkpointing, found.memory, said) == (2, checkpointing, None, [])


def test_the_settings_are_those_of_the_run(files, tmp_path):
    keys = {"dtype": "bfloat16", "offload_frozen": True, "batch_size": 3, "accumulation_steps": 4, "optim": "sgd"}
    config = config_of(files, tmp_path / "out", **keys)
    args = training_arguments(config)
    found = memory_settings(config, args, plan_run(config, args, PACKS, Ranks(), open_empty(config, Ranks())), PACKS, 1)
    wanted = {"seq_length": 200, "batch_size": 3, "label_share": 1.0, "packed": True, "accumulation": True}
    wanted |= {"dtype": "bfloat16", "offload_frozen": True, "optim": "sgd", "device": "cpu", "frozen_dtype": None}
    assert wanted.items() <= dataclasses.asdict(found).items()
