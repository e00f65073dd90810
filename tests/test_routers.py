"""Routers that are trained: which of their weights, and what an adapter of them holds."""

import copy
import warnings

import pytest
import torch

from deepseek.experts import moe_layers
from esft import ExpertConfig, adapter_tensors, add_adapter, merge, save_adapter, to_esft, unload
from scripts import adapter_info, merge_adapter
from tests.helpers import FAMILIES, assert_same_tensors, make_model, noisy_adapter, tensors_of

PARTS = {  # what "full" and "bias" train of a router
    **{family: ({"weight"}, set()) for family in FAMILIES},
    "gpt_oss": ({"weight", "bias"}, {"bias"}),
}
IDS = torch.arange(24).view(2, 12)


def trained(model) -> set[str]:
    return {name for name, param in model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_of_the_routers_of_a_family(family):
    """A correction bias, which changes the choice and no gate weight, is not."""
    full, bias = PARTS[family]
    model = to_esft(make_model(family), {"experts": {}, "routers": "full"})
    model(input_ids=IDS).logits.square().mean().backward()
    routers = {name.rpartition(".")[0] for name in trained(model)}
    assert len(routers) == len(moe_layers(model)) > 1
    assert trained(model) == {f"{router}.{part}" for router in routers for part in full}
    for name, param in model.named_parameters():
        assert (param.grad is not None and param.grad.norm() > 0) == (name in trained(model)), name
    unload(model)
    if bias:
        to_esft(model, {"experts": {}, "routers": "bias"})
        assert trained(model) == {f"{router}.{part}" for router in routers for part in bias}
    else:
        with pytest.raises(ValueError, match=f"those of {family} have no bias with a gradient, so train them in full"):
            to_esft(model, {"experts": {}, "routers": "bias"})
        assert all(param.requires_grad for param in model.parameters())


def test_the_gradient_is_that_of_the_base_model():
    base = make_model("qwen3_moe")
    model = to_esft(copy.deepcopy(base), {"experts": {"1": [3]}, "routers": "full"})
    for one in (base, model):
        one(input_ids=IDS).logits.square().mean().backward()
    for layer, of_base in zip(model.model.layers, base.model.layers):
        found, wanted = layer.mlp.gate.weight.grad, of_base.mlp.gate.weight.grad
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_holds_them_and_merges_on_disk_as_in_memory(tmp_path, dtype):
    base = make_model(dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    config = ExpertConfig({1: (3,)}, routers="full")
    tuned = noisy_adapter(copy.deepcopy(base), config, tmp_path / "adapter")
    routers = {f"model.layers.{layer}.mlp.gate.weight" for layer in (1, 2)}
    assert {name for name in adapter_tensors(tuned) if "experts" not in name} == routers
    assert ExpertConfig.load(tmp_path / "adapter") == config
    with torch.no_grad():
        logits, plain = tuned(input_ids=IDS).logits, base(input_ids=IDS).logits
        assert (logits - plain).abs().max() > 1e-2
        loaded = add_adapter(base, tmp_path / "adapter")
        assert torch.equal(loaded(input_ids=IDS).logits, logits)
        assert torch.equal(unload(loaded)(input_ids=IDS).logits, plain)
    merge_adapter.main([f"--base_model_path={tmp_path / 'base'}", f"--adapter_dir={tmp_path / 'adapter'}",
                        f"--output_dir={tmp_path / 'merged'}"])  # fmt: skip
    merge(add_adapter(base, tmp_path / "adapter")).save_pretrained(tmp_path / "in memory")
    assert_same_tensors(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "in memory"))


def test_an_adapter_says_that_it_holds_routers(tmp_path, capsys):
    model = to_esft(make_model(), {"experts": {"1": [3]}, "routers": "full"})
    save_adapter(model, tmp_path / "a")
    adapter_info.main([str(tmp_path / "a"), str(tmp_path / "a")])
    told = capsys.readouterr().out
    assert "and the routers (full)" in told and "both hold 2 other parameters, such as layers.1.mlp.gate.weight" in told
    assert adapter_info.describe(tmp_path / "a")["routers"] == "full"


def test_files_without_trained_routers_do_not_name_them():
    assert "routers" not in ExpertConfig({1: (3,)}, shared_experts=True).to_dict()


@pytest.mark.parametrize(
    "data, message",
    [
        ({"experts": {"1": [3]}, "routers": True}, "routers must be one of full, bias, found True"),
        ({"experts": {"1": [3]}, "routers": "gate"}, "routers must be one of full, bias, found 'gate'"),
        ({"experts": {"1": [3]}, "routers": "full", "routing_frozen": True}, "routing_frozen contradicts it"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        ExpertConfig.from_dict(data)


def test_both_forms_of_a_config_may_train_routers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = ExpertConfig.from_dict({"selected_experts": [["layer_1", 3]], "routing_frozen": False, "routers": "full"})
    assert one == ExpertConfig.from_dict({"experts": {"1": [3]}, "routers": "full"})
    assert ExpertConfig.from_dict(one.to_dict()) == one
