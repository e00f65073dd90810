"""Schedules worth a line in docs/optimizers.md: their rates, step by step, after a kill and in a run made longer."""

import json

import pytest
from transformers import TrainingArguments

from tests.helpers import Killed, at_step, kill, same
from training import plan

PEAK = 1e-2
BELOW = "so the learning rate stays below 0.01"
WSD = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": '{"num_decay_steps": 3, "decay_type": "linear"}',
    "warmup_steps": 2,
}
COSINE = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 2}', "warmup_steps": 2}


def rates(folder) -> list[float]:
    """The learning rate of each step, as a share of the highest. A step is logged with the rate that it took."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["learning_rate"] / PEAK for entry in history if "learning_rate" in entry]


CURVES = [
    # up over 2 steps, held, and down over the last 3
    (WSD, 8, [0, 1 / 2, 1, 1, 1, 1, 2 / 3, 1 / 3]),
    # up over 2 steps, then two half waves of 3 steps each: (1 + cos(pi k / 3)) / 2
    (COSINE, 8, [0, 1 / 2, 1, 3 / 4, 1 / 4, 1, 3 / 4, 1 / 4]),
]


@pytest.mark.parametrize("keys, steps, wanted", CURVES, ids=["warmup_stable_decay", "cosine_with_restarts"])
def test_rates_are_those_of_the_schedule_also_after_a_kill(start, keys, steps, wanted, killed_and_repeated):
    keys = {**keys, "max_steps": steps, "save_opt_states": True, "save_steps": 3, "eval_steps": None}
    killed_and_repeated(**keys)
    assert rates(start.folder / "whole") == pytest.approx(wanted)


@pytest.mark.slow
def test_a_run_goes_on_from_before_its_decay_and_decays_at_its_new_end(start, monkeypatch):
    keys = {**WSD, "save_opt_states": True, "save_steps": 3, "eval_steps": None}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**keys, max_steps=8)
    start(**keys, max_steps=10)
    start("at once", **keys, max_steps=10)
    assert rates(start.folder / "out") == pytest.approx([0, 1 / 2, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    assert same(start.folder / "at once", start.folder / "out")


def test_an_unknown_setting_of_a_schedule_is_named(start):
    with pytest.raises(ValueError, match="unexpected keyword argument 'num_decays'"):
        start(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs='{"num_decays": 3}')


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"num_decay_steps": 3}, None),
        ({"num_decay_steps": 6}, None),
        ({"num_decay_steps": 7}, f"the decay of num_decay_steps=7 begins within the warmup, {BELOW}"),
        ({"num_decay_steps": 9}, f"the decay of num_decay_steps=9 begins within the warmup, {BELOW}"),
        ({"num_decay_steps": 2, "num_stable_steps": 4}, None),
        ({"num_decay_steps": 2, "num_stable_steps": 6}, "num_stable_steps=6 leaves no step to the decay"),
    ],
)
def test_a_decay_that_does_not_fit_into_the_run_is_told(monkeypatch, tmp_path, settings, told):
    lines = []
    monkeypatch.setattr(plan.logger, "info", lines.append)
    monkeypatch.setattr(plan, "FEW_STEPS", 0)
    keys = {**WSD, "lr_scheduler_kwargs": settings, "max_steps": 8, "learning_rate": 1e-2}
    plan.tell_few_steps(TrainingArguments(str(tmp_path), use_cpu=True, **keys), 4, 1)
    assert [line.strip().partition(". ")[0] for line in lines] == ([told] if told else [])
