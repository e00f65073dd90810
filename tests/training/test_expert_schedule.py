"""Runs that change which experts they train: when, which, what stays, what is proven, and that they resume exactly."""

import functools
import json
import random
import re
import signal
from types import SimpleNamespace

import pytest
import torch

import esft
import train
from deepseek.experts import moe_layers
from deepseek.files import write_json
from tests.helpers import EXPERTS, Killed, arguments, at_step, config_of, fails, kill, run_ranks, same, tensors_of
from tests.rank_helpers import STEP, finishes, gets, log_worse, rank_arguments, steps, train_on
from training import expert_schedule
from training.checkpoints import write_manifest
from training.expert_schedule import ExpertSchedule
from training.trainer import ESFTTrainer

pytestmark = pytest.mark.long

TO_HALF = "{to: 0.5, by: 0.125, when: 2}"  # 5 of 16 experts, after step 2 two more, after step 4 one more
EXPANDED = [
    {"step": 2, "layer": 1, "added": [7], "removed": []},
    {"step": 2, "layer": 2, "added": [7], "removed": []},
    {"step": 4, "layer": 1, "added": [6], "removed": []},
]


@pytest.fixture(scope="module")
def scores(files):
    """Scores by which the higher id is better. The best that EXPERTS leaves are 7 in both layers, then 6 in layer 1."""
    score_E = {expert: (1 + expert) / 36 for expert in range(8)}
    folder = files / "scores"
    esft.ExpertScores({"token": {1: score_E, 2: score_E}}).save(folder / "summary.json")
    return folder


def note_of(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def trained_in(folder) -> dict:
    return {layer: sorted(ids) for layer, ids in esft.ExpertConfig.load(folder).experts.items()}


@pytest.mark.parametrize("dtype", ["m32", "m16"])
def test_a_run_expands_to_the_next_best_and_proves_the_rest(files, scores, start, capsys, dtype):
    keys = {"expert_scores_dir": scores, "expand_experts": TO_HALF, "verify_frozen": True}
    result = start(**keys, base_model_path=files / dtype)
    assert result["expert_changes"] == EXPANDED and result["trained_parameters"] == 8 * 3 * 16 * 32
    assert trained_in(start.folder / "out") == {1: [3, 5, 6, 7], 2: [0, 2, 6, 7]}
    base, found = tensors_of(files / dtype), tensors_of(start.folder / "out")
    assert not any(torch.equal(found[name], base[name]) for name in found)
    out = capsys.readouterr().out
    assert "after step 2: 7 of 16 experts are trained, 7 in the adapter; layer 1: +7; layer 2: +7" in out
    assert re.search(r"frozen: all \d+ tensors and experts kept their bits", out)
    assert "3 times an expert kept its bits while it was frozen (2 to 4 of 6 steps)" in out


def test_before_the_first_change_a_run_is_the_run_without(files, scores, start, whole, monkeypatch):
    keys = {"expert_scores_dir": scores, "expand_experts": "{to: 0.5, by: 0.125, when: 6}"}
    start(**keys)  # what falls due after the last step is left to a longer run
    assert same(start.folder / "out", whole)


@pytest.mark.parametrize("worse", [True, False])
def test_a_plateau_is_an_evaluation_that_is_not_better(scores, start, monkeypatch, worse):
    if worse:
        monkeypatch.setattr(ESFTTrainer, "log", log_worse)
    expand = "{to: 0.5, by: 0.125, when: plateau}"
    changes = start(expert_scores_dir=scores, expand_experts=expand, max_steps=5)["expert_changes"]
    assert changes == ([{**change, "step": 4} for change in EXPANDED[:2]] if worse else [])


WAYS = {
    "expansion": {"expand_experts": TO_HALF},
    "reselection": {"reselect_steps": 2, "reselect_max": 0.75},
    "both, bf16, stored experts": {
        **{"expand_experts": TO_HALF, "reselect_steps": 3, "base_model_path": "m16", "frozen_dtype": "int8"},
    },
    "all else trained": {"expand_experts": TO_HALF, "expert_config": "all.json", "warmup_steps": 3},
    "routers trained, near the base": {"reselect_steps": 2, "train_router": "full", "l2_to_base": 20},
    "adafactor": {"reselect_steps": 2, "optim": "adafactor"},
    "muon": {"reselect_steps": 2, "expand_experts": TO_HALF, "optim": "muon"},
    "8 bits": {"reselect_steps": 2, "expand_experts": TO_HALF, "optim": "adamw_bnb_8bit"},
    "4 bits": {"reselect_steps": 2, "optim": "adamw_torch_4bit"},
}


def keys_of(files, way: dict) -> dict:
    paths = {key: files / way[key] for key in ("base_model_path", "expert_config") if key in way}
    return {"expert_scores_dir": files / "scores", "save_opt_states": True, "verify_frozen": True, **way, **paths}


SLOW = {"all else trained", "adafactor", "muon", "8 bits", "4 bits", "routers trained, near the base"}


@pytest.mark.parametrize("name", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in WAYS])
def test_killed_at_a_change_a_run_goes_on_bit_for_bit(files, bases, scores, start, monkeypatch, capsys, name):
    """The first kill falls into a change, the second on the step after another one."""
    keys = {**keys_of(files, WAYS[name]), "save_steps": 3 if "adafactor" in name else 2}
    if "bits" in name:  # experts of whole blocks
        pytest.importorskip("bitsandbytes" if "8" in name else "torchao")
        keys |= {"base_model_path": bases(moe_intermediate_size=128), "learning_rate": 1e-3}
    whole = start("whole", **keys)
    assert len(whole["expert_changes"]) > 1
    proven = capsys.readouterr().out.split("frozen:")[1]
    change, calls = expert_schedule.change_experts, []

    def killed(*args):
        calls.append(args)
        change(*args)
        if len(calls) == 1:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(expert_schedule, "change_experts", killed)
        start(**keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**keys)
    result = start(**keys)
    assert same(start.folder / "whole", start.folder / "out")
    assert result["expert_changes"] == whole["expert_changes"]
    assert capsys.readouterr().out.split("frozen:")[1].replace("/out", "/whole") == proven


def test_a_longer_run_makes_the_change_that_fell_due_at_the_end(files, scores, start):
    keys = {**keys_of(files, WAYS["reselection"]), "lr_scheduler_type": "constant"}
    start("whole", **keys)
    start(**keys, max_steps=4)
    start(**keys)
    assert same(start.folder / "whole", start.folder / "out")


@pytest.mark.parametrize("save", [True, False])
def test_the_best_checkpoint_comes_back_with_its_own_experts(files, scores, start, monkeypatch, save):
    monkeypatch.setattr(ESFTTrainer, "log", log_worse)
    keys = {
        **keys_of(files, WAYS["both, bf16, stored experts"]),
        "load_best_model_at_end": True,
        "save_opt_states": save,
    }
    result = start(**keys)
    assert result["best_step"] == 2 and result["frozen_verified"] and len(result["expert_changes"]) > 3
    out = start.folder / "out"
    assert trained_in(out) == {int(layer): sorted(ids) for layer, ids in EXPERTS["experts"].items()}
    left, right = tensors_of(out), tensors_of(out / "checkpoint-2")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize(
    "expert, step, save_steps, where",
    [
        (7, 2, None, "cannot go on: 1 of"),  # found at the change after step 2, which trains it
        (0, 2, None, "cannot go on: 1 of"),
        (0, None, None, "cannot go on: 1 of"),  # the change itself has done it
        (0, 3, 3, "cannot go on: 1 of"),  # found before the checkpoint after step 3
        (0, 6, None, "cannot save the model: 1 of"),
    ],
)
def test_a_frozen_expert_that_changed_is_found(
    files, scores, start, monkeypatch, capsys, expert, step, save_steps, where
):
    def tamper(model) -> None:
        moe_layers(model)[1].expert_views(expert)["up_proj.weight"].add_(1)

    def damaging(model, *args) -> None:
        change(model, *args)
        tamper(model)

    change = expert_schedule.change_experts
    if step:
        at_step(monkeypatch, step, lambda trainer: tamper(trainer.model))
    else:
        monkeypatch.setattr(expert_schedule, "change_experts", damaging)
    keys = {"expert_scores_dir": scores, "expand_experts": TO_HALF, "verify_frozen": True, "save_steps": save_steps}
    message = fails(arguments(files, start.folder / "out", **keys), capsys)
    assert where in message and f"layers.1.mlp.experts.{expert}" in message
    assert not list((start.folder / "out").glob("checkpoint-*"))


def test_a_checkpoint_that_holds_hashes_of_its_own_is_gone_on_from(files, scores, start, monkeypatch):
    """An earlier version kept them in selection.json."""
    keys = keys_of(files, WAYS["reselection"])
    start("whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**keys)
    checkpoint = start.folder / "out" / "checkpoint-4"
    selection = json.loads((checkpoint / "selection.json").read_text())
    write_json(checkpoint / "selection.json", {**selection, "frozen": {"frozen_at": {}, "hashes": {}, "proven": []}})
    write_manifest(checkpoint)
    start(**keys)
    assert same(start.folder / "whole", start.folder / "out")


# ---- which experts


def schedule_of(counts_LE: list[list[int]], experts: dict, monkeypatch, **keys) -> ExpertSchedule:
    keys = {"expand_experts": None, "reselect_steps": 2, "reselect_max": None, "score_function": "token", **keys}
    config = SimpleNamespace(**keys, contrast_scores_dir=None)
    schedule = ExpertSchedule(config, esft.ExpertConfig(experts), {1: 6, 2: 6})
    monkeypatch.setattr(ExpertSchedule, "_all_counts", lambda self: torch.tensor(counts_LE))
    monkeypatch.setattr(ExpertSchedule, "_config", esft.ExpertConfig(experts))
    monkeypatch.setattr(esft, "RouterCapture", lambda model: None)
    schedule.model = None
    return schedule


@pytest.mark.parametrize(
    "counts, most, chosen",
    [
        ([[9, 8, 7, 1, 0, 0], [9, 8, 7, 1, 0, 0]], None, {1: {0, 1}, 2: {0}}),  # those with most tokens are trained
        ([[0, 8, 7, 9, 0, 0], [9, 1, 1, 1, 1, 1]], None, {1: {3, 1}, 2: {0}}),
        ([[1, 2, 70, 90, 0, 0], [3, 0, 0, 0, 0, 80]], None, {1: {2, 3}, 2: {5}}),
        ([[100, 8, 7, 110, 0, 0], [0, 0, 0, 0, 0, 0]], None, {1: {0, 3}, 2: {0}}),  # 110 is not a tenth more than 100
        ([[1, 2, 70, 90, 0, 0], [3, 0, 0, 0, 0, 80]], 4 / 12, {1: {3, 1}, 2: {0}}),  # one more, the one that gains most
    ],
)
def test_experts_are_exchanged_within_a_layer_up_to_the_cap(counts, most, chosen, monkeypatch):
    schedule = schedule_of(counts, {1: (0, 1), 2: (0,)}, monkeypatch, reselect_max=most)
    assert schedule._reselected({1: {0, 1}, 2: {0}}) == chosen


def test_an_exchange_leaves_the_room_that_expansion_needs(monkeypatch):
    schedule = schedule_of([[1, 2, 70, 90, 0, 0], [3, 0, 0, 0, 0, 80]], {1: (0, 1), 2: (0,)}, monkeypatch)
    schedule.most, schedule.ends = 6, 5
    assert schedule._reselected({1: {0, 1}, 2: {0}}) == {1: {3, 1}, 2: {0}}  # of 6, expansion needs 2


def test_tokens_are_counted_once_whatever_the_batches_and_processes(files, scores, monkeypatch, tmp_path):
    """Padding, validation and the recomputed forward are not counted. The last label of a pack ends what is counted."""
    keys = {"reselect_steps": 2, "max_steps": 3, "eval_steps": 1, "learning_rate": 0}
    ways = [{"batch_size": 4}, {"batch_size": 1, "accumulation_steps": 4, "activation_checkpointing": "true"}]
    counted = []
    original = ExpertSchedule._all_counts
    monkeypatch.setattr(ExpertSchedule, "_all_counts", lambda self: counted.append(original(self)) or counted[-1])
    for number, way in enumerate(ways):
        train.run(config_of(files, tmp_path / f"{number}", **keys, **way, save_steps=500))
    assert len(counted) == 2 and torch.equal(*counted)
    trainer = {}
    at_step(monkeypatch, 1, lambda found: trainer.update(packs=found.train_dataset, order=list(found._batches)))
    train.run(config_of(files, tmp_path / "again", **{**keys, **ways[0], "max_steps": 1}))
    packs = [trainer["packs"][row] for batch in trainer["order"][:2] for row in batch]
    tokens = sum(1 + max(i for i, label in enumerate(pack.labels) if label >= 0) for pack in packs)
    assert counted[0].sum(1).tolist() == [3 * tokens] * 2  # of three experts each


# ---- two processes


def run_all(rank: int, files, runs: list[tuple]) -> list:
    ended = []
    for out, keys, step in runs:
        with pytest.MonkeyPatch.context() as patch:
            if step:
                at_step(patch, step, kill)
            try:
                ended.append(train.run(config_of(files, out, **keys)))
            except Killed:
                ended.append(None)
    return ended


@pytest.mark.parametrize(
    "name", ["expansion", "reselection", pytest.param("both, bf16, stored experts", marks=pytest.mark.slow)]
)
def test_two_processes_are_one_and_resume_bit_for_bit(files, scores, tmp_path, name):
    keys = {
        **keys_of(files, WAYS[name]),
        "batch_size": 1,
        "learning_rate": 1e-3,
        "expert_config": files / "experts.json",
    }
    one = train.run(config_of(files, tmp_path / "one", **keys, accumulation_steps=2))
    both = {**keys, "ep_size": 2, "shard_dense": name == "reselection"}
    runs = [(tmp_path / "whole", both, None), (tmp_path / "out", both, 3), (tmp_path / "out", both, None)]
    runs += [(tmp_path / "replicas", {**keys, "ep_size": 1}, None)] if name == "expansion" else []
    (whole, killed, resumed, *replicas), _ = run_ranks(2, run_all, files, runs)
    assert killed is None and same(tmp_path / "whole", tmp_path / "out")
    assert whole["expert_changes"] == resumed["expert_changes"] == one["expert_changes"]
    for folder in [tmp_path / "whole", *(tmp_path / "replicas" for _ in replicas)]:
        found, wanted = tensors_of(folder), tensors_of(tmp_path / "one")
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert (found[key] - value).float().norm() <= (5e-2 if "bf16" in name else 1e-5) * value.float().norm(), key


CHANGE = "training.expert_schedule.ExpertSchedule._change"


@pytest.mark.slow
def test_killed_twenty_times_on_two_processes_a_run_goes_on_bit_for_bit(files, scores, tmp_path):
    """Four of the kills fall on a change of the selection, half of these before it and half after it."""
    keys = {"expert_scores_dir": scores, "verify_frozen": True, "reselect_steps": 6, "reselect_max": 0.9}
    keys |= {"expand_experts": "{to: 0.75, by: 0.06, when: 4}", "max_steps": 90, "save_steps": 2, "save_total_limit": 2}
    finishes(2, rank_arguments(files, tmp_path / "whole", **keys), tmp_path)
    argv, moments = rank_arguments(files, tmp_path / "out", **keys), random.Random(0)
    for number in range(20):
        place, nth = (CHANGE, 1) if number in (1, 2, 4, 5) else (STEP, moments.randint(2, 6))
        when = {"victim": number % 2, "place": place, "nth": nth, "after": number in (2, 5)}
        ended = train_on(2, argv, tmp_path, functools.partial(gets, sent=signal.SIGKILL, **when))
        assert ended[number % 2].code == -signal.SIGKILL, ended[0].err
    assert 4 < steps(tmp_path / "out")[-1] < 90
    finishes(2, argv, tmp_path)
    assert same(tmp_path / "whole", tmp_path / "out")
    changes = [note_of(tmp_path / name)["results"]["expert_changes"] for name in ("whole", "out")]
    assert changes[0] == changes[1] and len({change["step"] for change in changes[0]}) > 6


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"expand_experts": TO_HALF}, []),
        ({"expand_experts": "{to: 0.5, by: 0.125, when: 3}"}, ["to=0.5 is reached after step 6, and the run has 6"]),
        ({"reselect_steps": 5}, []),
        ({"reselect_steps": 6}, ["reselect_steps=6 exchanges nothing in 6 steps"]),
        ({"reselect_steps": 5, "score_function": "gate"}, []),
        (
            {"reselect_steps": 5, "score_function": "reap"},
            ["experts are exchanged by their tokens: score_function=reap is not counted in training"],
        ),
    ],
)
def test_what_a_run_cannot_do_with_its_changes_is_told(scores, start, capsys, keys, told):
    start(expert_scores_dir=scores, **keys)
    lines = capsys.readouterr().out.splitlines()
    limits = ("is reached after", "exchanges nothing", "are exchanged by")
    assert [line.strip().partition(". ")[0] for line in lines if any(text in line for text in limits)] == told


# ---- what is refused


@pytest.mark.parametrize(
    "keys, text",
    [
        ({"expand_experts": "{to: 0.5, by: 0.1}"}, "must have to, by and when"),
        ({"expand_experts": "0.5"}, "must have to, by and when"),
        ({"expand_experts": "{to: 50, by: 0.1, when: 2}"}, "to of expand_experts is 50, not a share"),
        ({"expand_experts": "{to: 0.5, by: 0.1, when: 0.5}"}, "when of expand_experts is 0.5, neither plateau nor"),
        ({"expand_experts": "{to: 0.5, by: 0.1, when: plateau}", "eval_steps": None}, "needs evaluations"),
        ({"expand_experts": "{start: 0.1, to: 0.5, by: 0.1, when: 2}"}, "start of expand_experts says"),
        (
            {"expand_experts": "{to: 0.5, by: 0.1, when: 2, foo: 1}"},
            "must have to, by and when, and may have start. Give",
        ),
        ({"expand_experts": "{start: 0.5, to: 0.5, by: 0.1, when: 2}"}, "begins with 0.5 and goes up to 0.5, which is"),
        ({"expand_experts": "{to: 0.3, by: 0.1, when: 2}"}, "begins with 5 of 16, and to=0.3 is not more"),
        ({"expand_experts": TO_HALF, "expert_scores_dir": None}, "no scores beside expert_config"),
        ({"expand_experts": TO_HALF, "method": "random"}, "expand_experts is for methods esft and dpo"),
        (
            {"reselect_steps": 2, "method": "lora", "lora_experts": "selected"},
            "reselect_steps is for methods esft and dpo",
        ),
        ({"reselect_steps": 0}, "reselect_steps=0 is not above 0"),
        ({"reselect_max": 0.5}, "needs reselect_steps"),
        (
            {"reselect_steps": 2, "reselect_max": 0.3},
            "begins with 5 of 16, and reselect_max=0.3 leaves room for no other",
        ),
        ({"expand_experts": TO_HALF, "reselect_steps": 2, "reselect_max": 0.4}, "reselect_max=0.4 is less than what"),
        (
            {"expand_experts": "{to: 0.9, by: 0.1, when: 2}", "strategy": "layers", "upper_layers": 1},
            "strategy=layers reaches 10 of 16, and to=0.9 is more",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused_before_data_are_read(files, scores, tmp_path, capsys, keys, text):
    keys = {"expert_scores_dir": scores, "train_dataset": files / "nothing.jsonl", **keys}
    if keys["expert_scores_dir"] is None:
        (tmp_path / "experts.json").write_text(json.dumps(EXPERTS))
        keys["expert_config"] = tmp_path / "experts.json"
    assert text in fails(arguments(files, tmp_path / "out", **keys), capsys)
