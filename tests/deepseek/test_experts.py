"""Test views of single experts in every layout, the tie of trained rows to the fused tensors, and fp32 masters."""

import copy
import io
import pickle
from types import MethodType

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from deepseek.experts import moe_layers
from esft import ExpertConfig, to_esft, unload
from tests.helpers import FAMILIES, make_model

IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
DTYPES = [torch.float32, torch.bfloat16]


def prepare(model, experts=(5, 2), **flags):
    """Make `experts` of the first MoE layer trainable. Return (model, MoELayer)."""
    layer = next(iter(moe_layers(model).values()))
    return to_esft(model, ExpertConfig({layer.index: tuple(experts)}, **flags)), layer


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def step(model, lr=0.1, **kwargs):
    """Take one AdamW step on all that is trainable."""
    params = [param for param in model.parameters() if param.requires_grad]
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    torch.optim.AdamW(params, lr=lr, **kwargs).step()
    model.zero_grad()


def tiny(model_type, **changes):
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **changes))


# ------------------------------------------------------------------------------------------------- finding and reading


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_experts(family):
    layers = moe_layers(make_model(family))
    assert list(layers) == {"deepseek_v2": [1, 2], "deepseek_v3": [1, 2], "nemotron_h": [0, 2]}.get(family, [0, 1, 2])
    assert all(layer.num_experts == 8 for layer in layers.values())


def test_refuses_models_without_fused_experts():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*dense"):
        moe_layers(tiny("llama", **sizes))
    llama4 = tiny("llama4_text", **sizes, num_local_experts=2, intermediate_size_mlp=16, interleave_moe_layer_step=1)
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM.*does not fuse"):
        moe_layers(llama4)


def test_the_view_is_true_after_anything_that_happens_to_the_model():
    """A deep copy, a replaced module, a wrapper and a compiled model all give their own modules."""
    model, layer = prepare(make_model())
    copied = copy.deepcopy(model)
    assert moe_layers(copied)[1].module is copied.model.layers[1].mlp.experts is not layer.module
    assert moe_layers(copied)[1].trained is not layer.trained
    assert copy.deepcopy(layer).module is not layer.module  # a view is copied with its module
    model.model.layers[1].mlp.experts = other = make_model(seed=1).model.layers[1].mlp.experts
    assert moe_layers(model)[1].module is other and not moe_layers(model)[1].trained
    wrapper = nn.ModuleDict({"base": copied})
    for outer in (wrapper, torch.compile(copied)):
        found = moe_layers(outer)[1]
        assert found.trained is moe_layers(copied)[1].trained
        assert outer.get_submodule(found.name) is found.module


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_a_plain_ffn(family):
    """An FFN made of the views computes what the fused module computes if every token goes to that expert."""
    model = make_model(family)
    layer = next(iter(moe_layers(model).values()))
    module = layer.module
    x = torch.randn(5, 32)
    for expert in (0, 6):
        views = layer.expert_views(expert)

        def linear(name, x, views=views):
            return nn.functional.linear(x, views[f"{name}.weight"], views.get(f"{name}.bias"))

        if module.has_gate:
            halves = torch.stack(
                [linear("gate_proj", x), linear("up_proj", x)], -1
            )  # the gate's own code wants them fused
            h = module._apply_gate(
                halves.flatten(-2) if not module.is_concatenated else torch.cat(halves.unbind(-1), -1)
            )
        else:
            h = module.act_fn(linear("up_proj", x))
        ids = torch.full((5, 1), expert)
        torch.testing.assert_close(linear("down_proj", h), module(x, ids, torch.ones(5, 1)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_write_through_and_follow_the_order(family):
    model = make_model(family)
    first = next(iter(moe_layers(model).values()))
    before = {expert: copy.deepcopy(first.expert_views(expert)) for expert in range(8)}
    _, layer = prepare(model)
    assert layer.trained.expert_ids == [2, 5]
    for expert, views in before.items():
        for name, view in layer.expert_views(expert).items():
            assert torch.equal(view, views[name]), (expert, name)
    untouched = logits(model)
    for view in layer.expert_views(5).values():
        view.mul_(3)
    assert not torch.equal(logits(model), untouched)
    found = model.state_dict()
    unload(model)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, found[name])]
    assert len(changed) == len(layer.tensor_names)
    assert all(torch.equal(model.state_dict()[n][e], found[n][e]) == (e != 5) for n in changed for e in range(8))


# ------------------------------------------------------------------------------------------------------------- the tie


def reload_strict(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    for param in model.parameters():
        param.data.zero_()
    model.load_state_dict(torch.load(buffer))
    return model


MOVES = {
    "nothing": lambda model: model,
    "to": lambda model: model.to("cpu:0"),
    "cast and back": lambda model: model.bfloat16().to(model.dtype_before),
    "another dtype": lambda model: model.to(torch.bfloat16 if model.dtype_before == torch.float32 else torch.float32),
    "deepcopy": copy.deepcopy,
    "load_state_dict": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "save and load": reload_strict,
    "new storage": lambda model: ([setattr(p, "data", p.data.clone()) for p in model.parameters()], model)[1],
    "inference mode": lambda model: (torch.inference_mode()(model)(IDS), model)[1],
    "cast, inference mode": lambda model: (torch.inference_mode()(model.bfloat16())(IDS), model)[1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, {"shared_experts": True, "non_expert_modules": True}], ids=["experts", "all"])
@pytest.mark.parametrize("move", MOVES)
def test_training_reaches_the_forward_after_a_move(move, dtype, flags):
    model, _ = prepare(make_model(dtype=dtype, tie_word_embeddings=bool(flags)), **flags)
    model.dtype_before = dtype
    moved = MOVES[move](model)
    module = moe_layers(moved)[1].module
    before, value, start = logits(moved), module.trained.down_proj.detach().clone(), copy.deepcopy(moved.state_dict())
    if move in ("nothing", "to", "deepcopy", "load_state_dict", "save and load", "new storage", "inference mode"):
        assert torch.equal(before, logits(unload(prepare(make_model(dtype=dtype, tie_word_embeddings=bool(flags)))[0])))
    for name, param in module.trained.named_parameters():
        fused = getattr(module, name)
        assert param.dtype == torch.float32
        assert param.untyped_storage().data_ptr() != fused.untyped_storage().data_ptr()
    if dtype == torch.bfloat16:
        assert {param.dtype for param in moved.parameters() if param.requires_grad} == {torch.float32}
    step(moved)
    assert not torch.equal(module.trained.down_proj, value)
    assert not torch.equal(logits(moved), before)
    assert torch.equal(module.down_proj[:2], module.trained.down_proj.to(module.down_proj.dtype))
    if not flags:  # the experts alone account for what the forward sees
        changed = [n for n, t in moved.state_dict().items() if not torch.equal(t, start[n])]
        assert changed == ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"]
    else:
        assert moved.lm_head.weight.dtype == moved.dtype == module.down_proj.dtype
        assert torch.equal(moved.lm_head.weight, moved.model.embed_tokens.weight)
        assert not torch.equal(moved.lm_head.weight, start["lm_head.weight"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", [{}, {"foreach": True}, {"fused": True}], ids=["loop", "foreach", "fused"])
def test_training_reaches_the_forward_with_any_optimizer(optimizer, dtype):
    """A fused optimizer does not raise the version counter of a parameter, nor does a write to its `.data`."""
    model, layer = prepare(make_model(dtype=dtype))
    start = logits(model)
    step(model, **optimizer)
    after_step = logits(model)
    assert not torch.equal(after_step, start)
    layer.trained.down_proj.data.zero_()
    assert not torch.equal(logits(model), after_step)


def test_without_write_back_the_trap_is_real(monkeypatch):
    """Without write_back, training does not reach the forward after a move. The tests above guard against that."""
    model, _ = prepare(make_model())
    moved = copy.deepcopy(model)
    module = moe_layers(moved)[1].module
    monkeypatch.setattr(type(module.trained), "write_back", lambda self, params=None: None)
    before = logits(moved)
    step(moved)
    assert torch.equal(logits(moved), before)


# ------------------------------------------------------------------------------------------------- state dict, masters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_is_the_bases(family, dtype):
    """Compare keys in order, shapes, dtypes and values: while trained, after unload, of a copy, after loading."""
    model = make_model(family, dtype, tie_word_embeddings=family == "mixtral")
    base = copy.deepcopy(model.state_dict())

    def same(found):
        assert list(found) == list(base)
        assert all(torch.equal(found[name], base[name]) and found[name].dtype == base[name].dtype for name in base)

    prepare(model, shared_experts=True, non_expert_modules=True)
    assert sum(param.requires_grad for param in model.parameters()) > 10
    assert model.dtype == dtype
    same(model.state_dict())
    same(copy.deepcopy(model).state_dict())
    same({name.removeprefix("module."): t for name, t in nn.ModuleDict({"module": model}).state_dict().items()})
    same(unload(copy.deepcopy(model)).state_dict())
    step(model)
    with pytest.raises(AssertionError):
        same(model.state_dict())
    model.load_state_dict(base)
    same(model.state_dict())
    same(unload(model).state_dict())
    assert not [name for name, _ in model.named_parameters() if name not in base]


def test_load_state_dict_still_checks_keys():
    model, _ = prepare(make_model(dtype=torch.bfloat16), non_expert_modules=True)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected.*nonsense"):
        model.load_state_dict({**state, "nonsense": torch.zeros(1)})
    state.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*model\.norm"):
        model.load_state_dict(state)


@pytest.mark.parametrize("optimizer", [{}, {"fused": True}], ids=["loop", "fused"])
def test_masters_keep_small_updates(optimizer):
    """200 updates are each too small for bf16. With masters they add up as in fp32, without them all are lost."""
    base = make_model()
    for param in base.parameters():  # no entry so small that bf16 would do
        param.data = (param.data.sign() * (param.data.abs() + 0.5)).bfloat16().float()
    fused, norm, ids = "model.layers.1.mlp.experts.down_proj", "model.norm.weight", [2, 5]

    def displacement(dtype, esft):
        model = copy.deepcopy(base).to(dtype)
        if esft:
            prepare(model, ids, non_expert_modules=True)
        params = [param for param in model.parameters() if param.requires_grad]
        assert not esft or {param.dtype for param in params} == {torch.float32}
        trainer = torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0, **optimizer)
        for param in params:
            param.grad = torch.ones_like(param)
        for _ in range(200):
            trainer.step()
        logits(model)  # a forward has read them
        state, start = model.state_dict(), base.state_dict()
        return {name: (state[name].float() - start[name])[ids] for name in (fused, norm)}

    wanted, kept, stalled = (
        displacement(*a) for a in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False))
    )
    for name in (fused, norm):
        assert wanted[name].mean().item() == pytest.approx(-200 * 2e-5, rel=0.02)
        assert (kept[name] - wanted[name]).abs().max() <= 2**-8 * 1.01 and kept[name].any()  # half a bf16 ulp at 1
        assert not stalled[name].any()
    assert kept[fused].mean().item() == pytest.approx(wanted[fused].mean().item(), rel=0.1)


# ------------------------------------------------------------------------------------------------------ other forwards


def pickled(model):
    return pickle.loads(pickle.dumps(model))


SWITCHES = {
    "model": lambda model, name: model.set_experts_implementation(name),
    "config": lambda model, name: setattr(model.config, "_experts_implementation", name),
}
FORMS = {"itself": lambda model: model, "copy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "eager"])
def test_another_implementation_is_refused_until_unload(name, switch, form):
    base, model = make_model(), FORMS[form](prepare(make_model())[0])
    for one in (base, model):
        SWITCHES[switch](one, name)
    with pytest.raises(ValueError, match=rf"'{name}': their rows are in another order.*implementation\('esft'\)"):
        nn.DataParallel(model)(IDS)
    SWITCHES[switch](model, "esft")
    assert torch.equal(logits(model), logits(prepare(make_model())[0]))
    SWITCHES[switch](model, name)
    unload(model)
    SWITCHES[switch](model, name)
    assert torch.equal(logits(model), logits(base))


def test_another_implementation_is_right_where_no_row_moved():
    model, base = make_model(), make_model()
    to_esft(model, ExpertConfig({}, shared_experts=True))
    for one in (base, model):
        one.set_experts_implementation("eager")
    assert torch.equal(logits(model), logits(base))


def on_the_module(module, monkeypatch):
    module.forward = MethodType(grouped_mm_experts_forward, module)


def on_the_class(module, monkeypatch):
    monkeypatch.setattr(type(module), "forward", grouped_mm_experts_forward)


def in_the_registry(module, monkeypatch):
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "esft", grouped_mm_experts_forward)


@pytest.mark.parametrize("replace", [on_the_module, on_the_class, in_the_registry])
def test_a_replaced_forward_is_refused(replace, monkeypatch):
    """As Liger and the kernels of a hub do it. A model without trained experts may have any forward."""
    model, layer = prepare(make_model())
    logits(model)
    with monkeypatch.context() as patch:
        replace(layer.module, patch)
        with pytest.raises(ValueError, match="something replaced the forward of DeepseekV2"):
            model(IDS)
        unload(model)
        assert torch.equal(logits(model), logits(make_model()))
