"""Runs of train.py that put LoRA on the selected experts."""

import json

import pytest
import torch

import esft
import train
from deepseek.experts import moe_layers
from deepseek.loading import empty_model
from scripts import estimate_memory
from tests.helpers import EXPERTS, arguments, config_of, fails, make_model, tensors_of
from tests.rank_helpers import finishes, rank_arguments
from training.config import read_config
from training.keys import LORA_SELECTED
from training.memory import Estimator, MemorySettings
from training.methods import count_trained, prepare_model

SELECTED = {"method": "lora", "lora_experts": "selected", "lora_rank": 4}
RUNS = {
    "experts": {},
    "bf16, frozen experts in int8": {"base_model_path": "m16", "frozen_dtype": "int8"},
    "other layers, too": {"lora_modules": "self_attn,shared_experts"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_and_goes_on_bit_for_bit_after_a_kill(files, start, name, killed_and_repeated):
    changes = {
        **SELECTED,
        **RUNS[name],
        "save_opt_states": True,
        "max_steps": 5,
        "save_steps": 2,
        "verify_frozen": True,
    }
    if "base_model_path" in changes:
        changes["base_model_path"] = files / changes["base_model_path"]
    whole, result = killed_and_repeated(at=4, **changes)
    assert whole["frozen_verified"]
    assert (result["train_loss"], result["eval_loss"]) == (whole["train_loss"], whole["eval_loss"])
    held = tensors_of(start.folder / "out")
    assert sum(tensor.numel() for tensor in held.values()) == whole["trained_parameters"]
    assert all(tensor.any() for tensor in held.values())
    experts = esft.ExpertConfig.load(start.folder / "out")
    assert experts.experts == {int(layer): tuple(sorted(ids)) for layer, ids in EXPERTS["experts"].items()}
    assert bool(experts.parameters) == ("lora_modules" in changes)
    base = make_model() if "base_model_path" not in changes else esft.load_base_model(changes["base_model_path"])[0]
    before, ids = base(torch.arange(20)[None]).logits.detach().clone(), torch.arange(20)[None]
    assert (esft.add_adapter(base, start.folder / "out")(ids).logits - before).abs().max() > 1e-3


@pytest.mark.slow
def test_two_processes_that_share_the_experts_train_as_one(files, tmp_path):
    finishes(2, rank_arguments(files, tmp_path / "two", **SELECTED), tmp_path)
    one = rank_arguments(files, tmp_path / "one", **{**SELECTED, "ep_size": 1})
    train.main(one)
    found, wanted = tensors_of(tmp_path / "two"), tensors_of(tmp_path / "one")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted)
    assert any((wanted[name] - found[name].flip(0)).abs().max() > 1e-2 for name in wanted)


@pytest.mark.slow
def test_the_experts_are_scored_and_selected_if_no_config_is_given(files, start):
    start(**SELECTED, expert_config=None, max_steps=1, strategy="topk", top_k=2)
    chosen = json.loads((start.folder / "out" / "expert_configs" / "selected.json").read_text())["experts"]
    held = esft.ExpertConfig.load(start.folder / "out").experts
    assert held == {int(layer): tuple(sorted(ids)) for layer, ids in chosen.items()}
    assert all(len(ids) == 2 for ids in held.values())


def test_gradients_and_states_are_smaller_by_the_ratio_of_experts(files):
    base = files / "m32"
    every = esft.ExpertConfig(dict.fromkeys(moe_layers(empty_model(base)), tuple(range(8))))
    some = esft.ExpertConfig(dict.fromkeys(every.experts, (5, 2)))
    counts = [count_trained(prepare_model(empty_model(base), LORA_SELECTED, experts)) for experts in (every, some)]
    for key in ("trained_parameters", "gradient_bytes", "optimizer_bytes"):
        assert counts[0][key] == 4 * counts[1][key]
    assert counts[0]["parameters"] == counts[1]["parameters"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_memory_is_estimated(files, device):
    base, settings = files / "m16", MemorySettings(seq_length=128, device=device)
    experts = esft.ExpertConfig({1: (5, 2), 2: (7,)})
    found = Estimator(empty_model(base), LORA_SELECTED, experts).estimate(settings)
    whole = Estimator(empty_model(base), "esft", experts).estimate(settings)
    factors = count_trained(prepare_model(empty_model(base), LORA_SELECTED, experts))["gradient_bytes"]
    assert (found.masters, found.optimizer) == (factors, 2 * factors) and found.masters < whole.masters
    assert found.peak < whole.peak and found.experts == whole.experts
    split = Estimator(empty_model(base), LORA_SELECTED, experts)
    quarter = split.estimate(MemorySettings(seq_length=128, device=device, world_size=2, ep_size=2))
    assert quarter.experts == found.experts // 2


def test_the_command_estimates_it_for_experts_that_are_named(files, capsys):
    flags = [f"--base_model_path={files / 'm16'}", "--method=lora", "--lora_rank=4", "--seq_length=128", "--json"]
    estimate_memory.main([*flags, "--lora_experts=selected", "--experts_per_layer=2"])
    found = json.loads(capsys.readouterr().out)["memory"]["gradients"]
    experts = esft.ExpertConfig({1: (0, 1), 2: (0, 1)})
    model = prepare_model(empty_model(files / "m16"), LORA_SELECTED, experts, lora_rank=4)
    assert found == count_trained(model)["gradient_bytes"]
    with pytest.raises(SystemExit):  # all layers, and so no experts to name
        estimate_memory.main([*flags, "--experts_per_layer=2"])


def test_what_does_not_fit_together_is_told_first(files, tmp_path, capsys):
    told = fails(arguments(files, tmp_path / "a", **SELECTED, lora_modules="self_atn"), capsys)
    assert "cannot put LoRA on 'self_atn' (did you mean 'self_attn'?)" in told
    told = fails(arguments(files, tmp_path / "a", method="lora", frozen_dtype="int8"), capsys)
    assert f"is for methods esft, dpo, random and {LORA_SELECTED}, not lora" in told
    read_config(arguments(files, tmp_path / "a", method="lora", lora_modules="self_attn"))
    assert f"lora_modules has no effect: it is for method {LORA_SELECTED}, and this is lora" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
    config = config_of(files, tmp_path / "a", **SELECTED)
    assert (config.kind, config.method) == (LORA_SELECTED, "lora")
    assert config_of(files, tmp_path / "a", method="lora").kind == "lora"  # the default stays: all layers
