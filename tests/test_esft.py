"""Test to_esft on whole models: what moves, gradients against full fine-tuning, and the bits of the forward."""

import copy
import warnings

import pytest
import torch
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek.experts import moe_layers
from deepseek.masters import trained_parameter
from esft import ExpertConfig, RouterCapture, to_esft, unload
from tests.helpers import FAMILIES, SMALL, make_model

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
BOTH = {"shared_experts": True, "non_expert_modules": True}


def layers_of(model):
    return list(moe_layers(model))


def pick(model, which="all"):
    """Return experts by layer: in all layers, in one of them, or a different number in each."""
    layers = layers_of(model)
    if which == "uneven":
        return {layer: (6, 1, 3, 0)[: 2 * i] for i, layer in enumerate(layers)}
    chosen = {"all": layers, "first": layers[:1], "middle": layers[len(layers) // 2 :][:1], "last": layers[-1:]}[which]
    return {layer: (5, 2) for layer in chosen}


def backward(model, ids=IDS):
    model.zero_grad()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return model


def selected(model, config):
    """Return {state dict key: expert ids in row order} of the fused tensors with trained rows."""
    rows = {}
    for index, layer in moe_layers(model).items():
        if config.experts.get(index):
            rows |= {f"{layer.name}.{fused}": sorted(config.experts[index]) for fused in layer.tensor_names}
    return rows


def gradients(model):
    """Return gradients by state dict key: of the trained rows of fused tensors, and of whole other tensors."""
    grads = {}
    for layer in moe_layers(model).values():
        if layer.trained:
            grads |= {f"{layer.name}.{fused}": param.grad for fused, param in layer.trained.named_parameters()}
    for name in model.state_dict():
        if name not in grads and isinstance(param := trained_parameter(model, name), Parameter) and param.requires_grad:
            grads[name] = param.grad
    return grads


def full_gradients(base, config, names, ids=IDS):
    """Return the same of full fine-tuning through transformers' grouped_mm."""
    model = copy.deepcopy(base).requires_grad_(True)
    assert model.config._experts_implementation == "grouped_mm"
    grads = {name: param.grad for name, param in backward(model, ids).named_parameters()}
    rows = selected(model, config)
    return {name: grads[name][rows[name]] if name in rows else grads[name] for name in names}


def assert_equal_gradients(found, wanted, tolerance=5e-6):
    largest = 0.0
    for name, grad in found.items():
        if wanted[name] is None:  # an e.g. unused bias
            assert grad is None or not grad.any(), name
            continue
        scale = wanted[name].abs().max()
        assert (grad - wanted[name]).abs().max() <= tolerance * scale + 1e-12, name
        largest = max(largest, float(scale))
    assert largest > 0


# ----------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("flags", [{}, {"shared_experts": True}, {"non_expert_modules": True}, BOTH])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_moves_what_is_selected_and_nothing_else(family, dtype, flags):
    """With weight decay too, selected rows and modules move and every other entry keeps its bits."""
    base = make_model(family, dtype)
    model = copy.deepcopy(base)
    config = ExpertConfig(pick(model, "uneven"), **flags)
    to_esft(model, config)
    params = [param for param in model.parameters() if param.requires_grad]
    backward(model)
    torch.optim.AdamW(params, lr=0.05, weight_decay=0.5).step()

    rows, before, after = selected(base, config), base.state_dict(), model.state_dict()
    routers = {
        f"{layer.name.rpartition('.')[0]}.{g}.weight" for layer in moe_layers(base).values() for g in ("gate", "router")
    }
    assert before.keys() == after.keys()
    assert any(r in before for r in routers)
    for name in before:
        if ".experts." in name:
            for expert in range(8):
                same = torch.equal(before[name][expert], after[name][expert])
                assert same == (expert not in rows.get(name, ())), (name, expert)
            continue
        is_shared = ".shared_experts." in name
        trained = is_shared if flags == {"shared_experts": True} else bool(flags) and (flags == BOTH or not is_shared)
        if name in dict(base.named_buffers()):
            trained = False
        assert torch.equal(before[name], after[name]) == (not trained), name


def test_shared_expert_gate_is_a_router_and_not_a_shared_expert():
    sizes = {"shared_expert_intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 8}
    config = AutoConfig.for_model("qwen2_moe", **SMALL, **sizes, intermediate_size=16, num_experts_per_tok=2)
    model = to_esft(AutoModelForCausalLM.from_config(config), ExpertConfig({}, shared_experts=True))
    trained = {name.split("mlp.")[-1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"shared_expert"}


def test_gradient_memory_is_that_of_the_trained_rows():
    model = make_model()
    to_esft(model, ExpertConfig(pick(model)))
    backward(model)
    for layer in moe_layers(model).values():
        assert all(layer.tensor(name).grad is None for name in layer.tensor_names)
    nbytes = sum(param.grad.nbytes for param in model.parameters() if param.grad is not None)
    assert nbytes == 2 * 2 * (3 * 16 * 32) * 4  # layers, experts, F * D of three projections, fp32
    assert nbytes == sum(param.nbytes for param in model.parameters() if param.requires_grad)


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["all", "first", "middle", "last", "uneven"])
def test_gradients_are_full_fine_tunings(family, which):
    """With "first" and "all", gradients come through the routers and experts of later layers."""
    base = make_model(family)
    config = ExpertConfig(pick(base, which))
    model = to_esft(copy.deepcopy(base), config)
    found = gradients(backward(model))
    assert found.keys() == selected(base, config).keys()
    wanted = full_gradients(base, config, found)
    assert_equal_gradients(found, wanted)
    with pytest.raises(AssertionError):  # the negative: the rows of other experts
        others = ExpertConfig({layer: tuple((e + 1) % 8 for e in ids) for layer, ids in config.experts.items()})
        assert_equal_gradients(found, full_gradients(base, others, found))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [{"shared_experts": True}, {"non_expert_modules": True}, BOTH])
def test_gradients_of_other_modules_are_full_fine_tunings(family, flags):
    """Routers are among them. The grouped backward computes the gradient of the gate weights itself."""
    base = make_model(family)
    config = ExpertConfig(pick(base, "last"), **flags)
    model = to_esft(copy.deepcopy(base), config)
    found = gradients(backward(model))
    assert (len(found) > 10) == ("non_expert_modules" in flags)
    assert_equal_gradients(found, full_gradients(base, config, found), 2e-5)


def test_tied_embeddings_stay_tied_and_train():
    base = make_model(tie_word_embeddings=True)
    config = ExpertConfig({}, non_expert_modules=True)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = to_esft(copy.deepcopy(base).to(dtype), config)
        assert [n for n, p in model.named_parameters() if "lm_head" in n and p.requires_grad] == []
        grads[dtype] = gradients(backward(model))["model.embed_tokens.weight"]
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
        state = model.state_dict()
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
        assert not torch.equal(model.lm_head.weight, base.lm_head.weight.to(dtype))
        unload(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, base.lm_head.weight.to(dtype))
    wanted = full_gradients(base, config, ["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    assert_equal_gradients({"fp32": grads[torch.float32]}, {"fp32": wanted})
    assert_equal_gradients({"bf16": grads[torch.bfloat16]}, {"bf16": wanted}, 0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("flags", [{}, BOTH])
def test_gradient_checkpointing_changes_nothing(family, flags):
    base = make_model(family)
    config = ExpertConfig(pick(base, "uneven"), **flags)
    plain = gradients(backward(to_esft(copy.deepcopy(base), config)))
    model = to_esft(copy.deepcopy(base), config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    for layer in moe_layers(model).values():
        layer.module.register_forward_pre_hook(lambda *_: calls.append(1))
    found = gradients(backward(model))
    assert len(calls) > len(layers_of(model))  # there was a second forward
    assert_equal_gradients(found, plain, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_without_a_token(family):
    """Train one expert per layer that gets a token and one that gets none. The idle one's gradient is zero."""
    base, ids = make_model(family), torch.tensor([[7, 8]])
    with RouterCapture(base) as capture, torch.no_grad():
        base(ids)
    counts = capture.counts()
    slots = dict(zip(counts.layers, counts.sums["slots"].tolist()))
    busy = {layer: max(range(8), key=slots_E.__getitem__) for layer, slots_E in slots.items()}
    idle = {layer: slots_E.index(0) for layer, slots_E in slots.items()}
    config = ExpertConfig({layer: (idle[layer], busy[layer]) for layer in slots})
    found = gradients(backward(to_esft(copy.deepcopy(base), config), ids))
    assert_equal_gradients(found, full_gradients(base, config, found, ids))
    for index, layer in moe_layers(base).items():
        grad = found[f"{layer.name}.down_proj"]
        row = sorted(config.experts[index]).index(idle[index])
        assert not grad[row].any() and grad[1 - row].any()
    config = ExpertConfig({layer: (expert,) for layer, expert in idle.items()})
    found = gradients(backward(to_esft(copy.deepcopy(base), config), ids))
    assert not any(grad.any() for grad in found.values())


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_keeps_its_bits(family, dtype):
    """Compare before the first step, with all but some experts in training, and again after unload."""
    model = make_model(family, dtype)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
    to_esft(model, ExpertConfig(pick(model, "uneven"), **BOTH))
    assert model.config._experts_implementation == "esft"
    found = model(IDS, use_cache=False).logits
    assert torch.equal(found, wanted) and found.requires_grad
    backward(model)
    torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1).step()
    assert not torch.equal(model(IDS, use_cache=False).logits, wanted)
    unload(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(model(IDS, use_cache=False).logits, wanted)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_generation_with_a_cache_agrees(family):
    model = make_model(family)
    wanted = model.generate(IDS[:, :6], max_new_tokens=5, do_sample=False)
    to_esft(model, ExpertConfig(pick(model)))
    assert torch.equal(model.generate(IDS[:, :6], max_new_tokens=5, do_sample=False), wanted)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v2"])
def test_a_config_of_what_the_model_lacks(family):
    """deepseek_v2 has shared experts."""
    model, lacks = make_model(family), "names shared experts, and this model has none"
    for config in ({"experts": {}, "shared_experts": True}, {"experts": {"1": [], "2": []}, "shared_experts": True}):
        if family == "deepseek_v2":
            unload(to_esft(model, config))
        else:
            with pytest.raises(ValueError, match=f"{lacks}: nothing would be trained"):
                to_esft(model, config)
    with pytest.raises(ValueError, match="names nothing: nothing would be trained"):
        to_esft(model, ExpertConfig({}))
    assert all(param.requires_grad for param in model.parameters())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        unload(to_esft(model, {"experts": {"1": [3]}, "shared_experts": True}))
        unload(to_esft(model, {"experts": {"1": [3]}, "non_expert_modules": True}))
    assert [lacks in str(warning.message) for warning in told] == [True] * (family != "deepseek_v2")


def test_requires_grad_comes_back():
    model = make_model()
    model.lm_head.requires_grad_(False)
    unload(to_esft(model, ExpertConfig(pick(model), **BOTH)))
    assert {name for name, param in model.named_parameters() if not param.requires_grad} == {"lm_head.weight"}
    assert all(param.grad is None for param in model.parameters())


# ------------------------------------------------------------------------------------------------ configs and refusals


@pytest.mark.parametrize(
    "data, experts",
    [
        ({"experts": {"2": [3, 1], "1": [0]}}, {1: (0,), 2: (3, 1)}),
        ({"selected_experts": [["layer_2", 3], ["layer_1", 0], ["layer_2", 1]]}, {1: (0,), 2: (3, 1)}),
        ({"experts": {"1": [0]}, "base": {}, "meta": {}, "shared_experts": False}, {1: (0,)}),
        ({"selected_experts": [["layer_1", 3]], "frozen_experts": [["layer_1", 0]], "routing_frozen": True}, {1: (3,)}),
        ({"selected_experts": {"layer_1": [3]}, "frozen_experts": {"1": [0], "2": [3]}}, {1: (3,)}),
        ({"selected_experts": [["layer_1", 3]], "frozen_experts": [], "routing_frozen": True}, {1: (3,)}),
        ({"selected_experts": [[1, 3], [1, 0]], "frozen_experts": [[1, 2]]}, {1: (3, 0)}),
    ],
)
def test_config_reads_both_forms(data, experts):
    config = ExpertConfig.from_dict(data)
    assert config.experts == experts and list(config.experts) == sorted(experts)
    assert ExpertConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "data, message",
    [
        ([1], "expected layers"),
        ({"experts": {"1": [0]}, "shared_expert": True}, "shared_expert.*did you mean 'shared_experts'"),
        ({"shared_experts": True}, "expected layers"),
        ({"experts": {"1": [0]}, "selected_experts": []}, "expected layers"),
        ({"experts": {"1": [0, 2, 0]}}, "layer 1.*distinct"),
        ({"selected_experts": [["layer_1", 3], ["layer_1", 3]]}, "layer 1.*distinct"),
        ({"experts": {"1": [0], "01": [0]}}, "layer 1.*distinct"),
        ({"experts": {"1": [0.0]}}, "layer 1.*numbers"),
        ({"experts": {"1": [True]}}, "layer 1.*numbers"),
        ({"experts": {"1": ["0"]}}, "layer 1.*numbers"),
        ({"experts": {"1": "01"}}, "layer 1.*numbers"),
        ({"experts": {"1": [-1]}}, "layer 1.*from 0"),
        ({"experts": {"one": [1]}}, "expected layers"),
        ({"experts": [1, 2]}, "expected layers"),
        ({"experts": {"1": 3}}, "expected layers"),
        ({"selected_experts": [["layer_x", 3]]}, "expected layers"),
        ({"selected_experts": [["layer_1", 3, 4]]}, "expected layers"),
        ({"selected_experts": [["layer_1", 3]], "frozen_experts": [["layer_1", 3]]}, "layer 1.*3.*and frozen"),
        ({"selected_experts": [["layer_1", 3]], "frozen_experts": [3]}, "expected layers"),
        ({"selected_experts": [["layer_1", 3]], "routing_frozen": False}, "routers.*non_expert_modules"),
        ({"experts": {}, "non_expert_modules": True, "routing_frozen": True}, "routers.*non_expert_modules"),
        ({"selected_experts": [["layer_1", 3]], "routing_frozen": "yes"}, "routing_frozen must be true or false"),
        ({"experts": {"1": [0]}, "shared_experts": 1}, "true or false"),
        ({"experts": {"1": []}}, "selects nothing"),
        ({"token_scores": {"1": {"0": 1.0}}, "meta": {}}, "expert scores.*generate_expert_config"),
        ({"layer_1_expert_0": 1.0}, "expert scores.*generate_expert_config"),
    ],
)
def test_config_refuses(data, message):
    with pytest.raises(ValueError, match=message):
        ExpertConfig.from_dict(data)


def test_routers_may_be_said_to_train_where_they_do():
    config = ExpertConfig.from_dict({"experts": {}, "non_expert_modules": True, "routing_frozen": False})
    assert config == ExpertConfig({}, non_expert_modules=True)


def test_config_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ExpertConfig.load(path)
    (tmp_path / "confg.json").touch()
    with pytest.raises(FileNotFoundError, match=r"did you mean 'confg\.json'"):
        ExpertConfig.load(path)
    for text in ("{", '{"experts": {"1": [0, 0]}}', '{"experts": {"1": [0], "1": [2]}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config\.json"):
            ExpertConfig.load(path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"experts": {"0": [1]}}, "layer 0.*layers are 1 to 2"),
        ({"experts": {"1": [1], "3": [1]}}, "layer 3.*layers are 1 to 2"),
        ({"experts": {"1": [1, 8]}}, "expert 8 of layer 1.*0 to 7"),
        ({"experts": {"1": [1, 1]}}, "distinct"),
    ],
)
def test_to_esft_refuses_and_leaves_the_model_alone(config, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        to_esft(model, config)
    assert all(param.requires_grad for param in model.parameters())
    to_esft(model, {"experts": {"1": [1]}})


def test_to_esft_twice_is_refused():
    model = to_esft(make_model(), {"experts": {"1": [1]}})
    with pytest.raises(ValueError, match="Call unload or merge first"):
        to_esft(model, {"experts": {"2": [1]}})
    assert [p.shape[0] for p in model.parameters() if p.requires_grad] == [1, 1]
    to_esft(unload(model), {"experts": {"2": [1]}})


def test_models_without_experts_are_refused():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "num_key_value_heads": 2}
    with pytest.raises(ValueError, match="dense model"):
        to_esft(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)), {"experts": {"0": [1]}})
