"""Runs that train the routers: their drift from the base's, the penalty on it, their rate, and what is refused."""

import copy
import functools
import json
import signal

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM

import esft
from tests.helpers import (
    SMALL,
    arguments,
    fails,
    losses,
    make_model,
    same,
    tensors_of,
)
from tests.rank_helpers import STEP, assert_near, finishes, gets, rank_arguments, train_on
from training.data import IGNORE
from training.routers import TrainedRouters

SHORT = {"max_steps": 2, "eval_steps": None, "save_steps": None, "lr_scheduler_type": "constant"}
SGD = {**SHORT, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0}


def batch() -> dict[str, torch.Tensor]:
    """Two rows of documents; the last 5 tokens of the second are padding."""
    torch.manual_seed(1)
    ids, positions = torch.randint(3, 120, (2, 12)), torch.arange(12).repeat(2, 1)
    positions[0, 7:], positions[1, 7:] = torch.arange(5), torch.arange(5)
    labels = ids.clone()
    labels[:, :3], labels[1, 7:] = IGNORE, IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def tuned(family: str, config: dict, weight: float):
    """A model in training whose routers have moved, what measures them, and the base's weights of the routers."""
    model = esft.to_esft(make_model(family), config).train()
    routers = TrainedRouters(model, config["routers"], weight, 1e-3)
    before = [param.detach().clone() for param in routers.params]
    torch.manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    return model, routers, before


def forward(model, inputs) -> None:
    model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False)


# ---- the measure


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_penalty_is_the_mean_kl_and_moves_the_routers_alone(checkpointing):
    model, routers, before = tuned("qwen3_moe", {"experts": {"1": [3]}, "routers": "full"}, 0.5)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs, seen = batch(), []
    gates = [layer.mlp.gate for layer in model.model.layers]
    hooks = [gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for gate in gates]
    routers.tokens = routers.count([inputs])
    assert routers.tokens == 19
    with routers.watch(inputs):
        forward(model, inputs)
    for hook in hooks:
        hook.remove()
    loss = routers.penalty()
    loss.backward()
    keep = torch.ones(24, dtype=torch.bool)
    keep[19:] = False
    total, changed, leaves = 0.0, 0, []
    for x, gate, base in zip(seen, gates, before):
        leaves.append(gate.weight.detach().clone().requires_grad_(True))
        here, there = (linear(x.flatten(0, -2), weight)[keep] for weight in (leaves[-1], base))
        total = total + kl_divergence(Categorical(logits=here), Categorical(logits=there)).sum()
        changed += sum(set(a.tolist()) != set(b.tolist()) for a, b in zip(here.topk(3)[1], there.topk(3)[1]))
    wanted = 0.5 * total / (19 * 3)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5) and loss > 1e-3
    for gate, leaf in zip(gates, leaves):
        assert (gate.weight.grad - leaf.grad).norm() < 1e-5 * leaf.grad.norm()
    assert all(p.grad is None for p in model.parameters() if not any(p is gate.weight for gate in gates))
    found = routers.means.take("", lambda sums, _: sums)
    assert found == pytest.approx({"router_kl": wanted.item() * 2, "router_changed": changed / 57}, rel=1e-5)
    assert 0 < changed < 57


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "nemotron_h", "mixtral"])
def test_routers_like_the_base_s_have_not_drifted(family):
    model = make_model(family)
    routers = TrainedRouters(esft.to_esft(model, {"experts": {}, "routers": "full"}), "full", 1.0, 1e-3)
    with routers.watch(batch()):
        forward(model, batch())
    assert routers.means.take("", lambda sums, _: sums) == {"router_kl": 0, "router_changed": 0}
    model, routers, _ = tuned(family, {"experts": {}, "routers": "full"}, 1.0)
    with routers.watch(batch()):
        forward(model, batch())
    assert min(routers.means.take("", lambda sums, _: sums).values()) > 1e-3


def test_noise_of_a_router_is_no_drift():
    sizes = {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 2}
    sizes |= {"router_jitter_noise": 0.2, "input_jitter_noise": 0.2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("phimoe", **SMALL, **sizes))
    plain = copy.deepcopy(esft.to_esft(model, {"experts": {}, "routers": "full"}).train())
    routers = TrainedRouters(model, "full", 1.0, 1e-3)
    ends = []
    for one, context in ((plain, None), (model, routers.watch(batch()))):
        torch.manual_seed(5)
        if context:
            with context:
                forward(one, batch())
        else:
            forward(one, batch())
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)  # no number was drawn for the measure
    assert routers.means.take("", lambda sums, _: sums) == {"router_kl": 0, "router_changed": 0}


# ---- runs


def test_a_run_trains_reports_and_saves_its_routers(files, start, capsys):
    result = start(train_router="full", verify_frozen=True, base_model_path=files / "m16")
    assert result["frozen_verified"] and "routers: full" in capsys.readouterr().out
    assert result["router_kl"] > 0 and 0 <= result["router_changed"] <= 1
    history = json.loads((start.folder / "out" / "trainer_state.json").read_text())["log_history"]
    shown = [entry["router_kl"] for entry in history if "router_kl" in entry]
    assert shown[0] == 0 < shown[-1]  # the first step is the base's
    assert [entry["eval_router_kl"] for entry in history if "eval_router_kl" in entry][-1] == result["router_kl"]
    held = tensors_of(start.folder / "out")
    model, base = esft.load_esft_model(files / "m16", start.folder / "out")[0], make_model(dtype=torch.bfloat16)
    for layer in (1, 2):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(model.get_parameter(name), held[name])
        assert not torch.equal(base.get_parameter(name), held[name])


def test_routers_alone_are_trained_by_a_config_without_experts(files, start):
    path = start.folder / "routers.json"
    path.write_text('{"experts": {}, "routers": "full"}')
    start(expert_config=path, **SHORT)
    assert set(tensors_of(start.folder / "out")) == {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}


def test_the_loss_is_that_of_the_task_and_the_penalty_which_holds_the_routers(start):
    keys = {"train_router": "full", "router_lr": 1e-2, "eval_steps": None, "save_steps": None}
    drift = [start(str(weight), router_kl=weight, **keys)["router_kl"] for weight in (0, 30)]
    assert 0 < drift[1] < 0.5 * drift[0]
    none, some = losses(start.folder / "0"), losses(start.folder / "30")
    history = json.loads((start.folder / "30" / "trainer_state.json").read_text())["log_history"]
    (kl,) = [entry["router_kl"] for entry in history if "router_kl" in entry and entry["step"] == 2]
    assert none["loss", 1] == some["loss", 1]
    assert some["loss", 2] - none["loss", 2] == pytest.approx(30 * kl, rel=1e-3) and kl > 1e-4


def test_routers_have_a_rate_of_their_own(files, start):
    base = esft.adapter_tensors(
        esft.to_esft(make_model(), {**json.loads((files / "experts.json").read_text()), "routers": "full"})
    )
    moved = {}
    for rate in (None, 0.5, 1.0):
        start(str(rate), train_router="full", router_lr=rate, learning_rate=1, **SGD)
        moved[rate] = {name: tensor - base[name] for name, tensor in tensors_of(start.folder / str(rate)).items()}
    for name, change in moved[0.5].items():
        factor = 2 if "gate.weight" in name else 1
        assert torch.equal(moved[None][name], moved[1.0][name])  # the learning rate
        assert (moved[1.0][name] - factor * change).norm() < 1e-3 * change.norm() > 0, name


def test_the_penalty_does_not_depend_on_how_the_batch_is_cut(start):
    keys = {**SHORT, "train_router": "full", "router_lr": 1e-2, "router_kl": 3.0, "optim": "sgd", "max_grad_norm": 0}
    start("one", **{**keys, "batch_size": 4})
    start("four", **{**keys, "batch_size": 1, "accumulation_steps": 4})
    assert losses(start.folder / "four") == pytest.approx(losses(start.folder / "one"), rel=1e-5)


def test_dpo_measures_its_policy_and_not_its_reference(files, start):
    rows = [
        {"prompt": f"is it {i}?", "chosen": f"yes {i}", "rejected": " ".join(["no"] * (1 + i % 4))} for i in range(12)
    ]
    path = start.folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = {"method": "dpo", "train_dataset": path, "train_router": "full", "router_lr": 1e-2, **SHORT}
    assert start(**keys)["router_kl"] > 1e-5


def test_a_run_broken_off_goes_on_bit_for_bit(files, killed_and_repeated):
    keys = {"base_model_path": files / "m16", "train_router": "full", "save_opt_states": True, "max_steps": 4}
    whole, again = killed_and_repeated(at=4, **keys)
    assert again["router_kl"] == whole["router_kl"] > 0


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_also_after_a_kill(files, tmp_path):
    keys = {"train_router": "full", "router_lr": 2e-3, "l2_to_base": 20.0, "max_steps": 6, "verify_frozen": True}
    argv = rank_arguments(files, tmp_path / "whole", **keys)
    finishes(2, argv, tmp_path)
    one = rank_arguments(files, tmp_path / "one", **{**keys, "ep_size": 1})
    finishes(1, one, tmp_path)
    assert_near(tmp_path / "whole", tmp_path / "one")
    broken = rank_arguments(files, tmp_path / "out", **keys)
    train_on(2, broken, tmp_path, functools.partial(gets, sent=signal.SIGKILL, victim=1, place=STEP, nth=5))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    finishes(2, broken, tmp_path)
    assert same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"train_router": "full", "method": "full"}, "train_router is for methods esft, dpo and random, not full"),
        ({"train_router": "full", "method": "lora", "lora_experts": "selected"}, "not lora with lora_experts"),
        ({"router_lr": 1e-3}, "router_lr is for routers that are trained"),
        ({"router_kl": 0.1}, "router_kl is for routers that are trained"),
        ({"train_router": "full", "router_kl": -1}, "router_kl=-1.0 is below 0"),
        ({"train_router": "bias"}, "those of deepseek_v2 have no bias with a gradient, so train them in full"),
        ({"train_router": "bias", "expert_config": None}, "those of deepseek_v2 have no bias"),
        ({"train_router": "full", "gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "use_reentrant"),
        ({"train_router": "full", "router_lr": 0.5, "l2_to_base": 2}, "past the base"),
    ],
)
def test_what_makes_no_sense_is_refused(files, tmp_path, capsys, keys, words):
    assert words in fails(arguments(files, tmp_path / "out", **keys), capsys)
    assert not (tmp_path / "out").exists()
