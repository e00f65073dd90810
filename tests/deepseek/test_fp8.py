"""Products in fp8: rounding of rows, one plain loop for reference, and what torch's kernel would be given."""

import copy

import pytest
import torch

from deepseek import fp8
from deepseek.experts import FusedExperts, MoELayer, moe_layers, train_experts
from deepseek.fp8 import EMULATE, compute_in_fp8, quantize_rows
from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE
from deepseek.lora import Lora, LoraExperts
from esft import ExpertConfig, Reselection, add_adapter, base_values, save_adapter, to_esft
from tests.fused_experts import LAYOUTS, E, assert_near, inputs, make_experts, run
from tests.helpers import make_model

TRAINED = (4, 1)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    monkeypatch.setenv(EMULATE, "1")


def in_fp8(layout, dtype=torch.bfloat16, trained=TRAINED, **kind):
    module = make_experts(layout, dtype, trained, **kind)
    module.fp8 = fp8.Fp8Experts()
    return module


def rounded(matrices: torch.Tensor) -> torch.Tensor:
    values, scale = quantize_rows(matrices)
    return values.float() * scale[..., None]


def test_a_row_is_rounded_by_its_own_scale():
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-8, 1, 1e3, 1, 0])[:, None]
    rows[3, 7] = 1e6  # an outlier spoils its row alone
    values, scale = quantize_rows(rows)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (5,) and values.float().abs().max() == 448
    error = (values.float() * scale[:, None] - rows).abs()
    assert (error[:3] <= rows[:3].abs() / 16 + scale[:3, None] * 2**-10).all() and not error[4].any()
    assert not values[3, :7].any() and values[1, :7].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_and_input_gradients_are_those_of_rounded_operands(layout):
    """h = q(x) q(W)^T by a loop; the same of each product in the backward, and weight gradients of what bf16 holds."""
    data = inputs(torch.bfloat16)
    out, grads = run(in_fp8(layout), IMPLEMENTATION, *data)
    exact_out, exact = run(make_experts(layout, torch.bfloat16, TRAINED), IMPLEMENTATION, *data)
    assert not torch.equal(out, exact_out)
    assert_near({"out": out, **grads}, {"out": exact_out, **exact}, 0.3)
    layer = FusedExperts(in_fp8(layout))
    layer.fp8.refresh(layer)
    generator, offs = torch.Generator().manual_seed(0), torch.tensor([3, 3, 7, 8, 8, 12], dtype=torch.int32)
    for name in layer.weight_names:
        weight = layer.tensor(name).data
        weight = weight.mT if layer.module.is_transposed else weight
        for backward, matrices in ((False, weight), (True, weight.mT)):
            x = torch.randn(12, matrices.shape[2], generator=generator).bfloat16()
            found, start = layer.fp8.linear(name, x, offs, backward), 0
            for expert, stop in enumerate(offs.tolist()):
                wanted = rounded(x[start:stop]) @ rounded(matrices[expert]).T
                torch.testing.assert_close(found[start:stop], wanted.bfloat16(), atol=1e-3, rtol=1e-2)
                start = stop
            first = layer.fp8.linear(name, x[:7], offs[:3], backward)  # the prefix of trained experts
            assert torch.equal(first, found[:7])


def test_trained_experts_are_quantized_anew_and_frozen_ones_once(monkeypatch):
    module = in_fp8("plain")
    run(module, IMPLEMENTATION, *inputs(torch.bfloat16))
    before = copy.deepcopy(module.fp8._copies)
    calls = []
    monkeypatch.setattr(fp8, "quantize_rows", lambda x: calls.append(x.shape) or quantize_rows(x))
    with torch.no_grad():
        module.trained.down_proj.mul_(2)
    FusedExperts(module).trained.write_back()
    module.fp8.refresh(FusedExperts(module))
    assert {shape[0] for shape in calls} == {len(TRAINED)}
    for key, (values, scale) in module.fp8._copies.items():
        assert torch.equal(values.float(), before[key][0].float())
        assert torch.equal(scale[2:], before[key][1][2:])
        assert torch.equal(scale[:2], before[key][1][:2]) == (key[0] != "down_proj")


def test_another_order_of_rows_is_noticed():
    """As when a run changes its experts: the copies have the old order."""
    data = inputs(torch.bfloat16)
    module = in_fp8("plain", trained=())
    run(module, IMPLEMENTATION, *data)
    train_experts(MoELayer(module, 0, "experts"), (5, 2))
    found, _ = run(module, IMPLEMENTATION, *data)
    wanted, _ = run(in_fp8("plain", trained=(5, 2)), IMPLEMENTATION, *data)
    assert torch.equal(found, wanted) and module.fp8._copies["down_proj", False][0].shape[0] == E


def test_lora_is_added_to_the_product_in_fp8():
    data = inputs(torch.bfloat16)
    kind = {"kind": lambda layer, ids: LoraExperts(layer, ids, Lora(4, 8))}
    out, grads = run(in_fp8("plain", **kind), IMPLEMENTATION, *data)
    exact, _ = run(make_experts("plain", torch.bfloat16, TRAINED, **kind), REFERENCE, *data)
    assert_near({"out": out}, {"out": exact}, 0.1)
    assert not torch.equal(out, exact) and any(grad is not None and grad.any() for grad in list(grads.values())[2:])


def test_no_token_at_all_is_no_error():
    x, ids, weights = inputs(torch.bfloat16, tokens=0)
    out, _ = run(in_fp8("plain"), IMPLEMENTATION, x, ids, weights)
    assert out.shape == x.shape


@pytest.mark.parametrize("layout", ["plain", "transposed"])
def test_torch_accepts_what_its_kernel_would_get(layout, monkeypatch):
    """By the checks that torch makes of dtypes, strides and scales on tensors without storage."""
    called, real = [], torch._scaled_grouped_mm

    def on_meta(*args, **options):
        meta = [arg.to("meta") for arg in args]
        options["offs"] = options["offs"].to("meta")
        called.append([tuple(arg.shape) for arg in meta])
        shape = real(*meta, **options)
        return torch.zeros(shape.shape, dtype=shape.dtype)

    monkeypatch.setattr("tests.fused_experts.F", 16)
    module = in_fp8(layout)
    monkeypatch.delenv(EMULATE)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", on_meta)
    run(module, IMPLEMENTATION, *inputs(torch.bfloat16))
    assert len(called) == 4


def test_what_cannot_be_computed_in_fp8_is_refused(monkeypatch):
    model = to_esft(make_model(dtype=torch.bfloat16), ExpertConfig({1: (3,)}))
    compute_in_fp8(model)
    assert all(layer.fp8 for layer in moe_layers(model).values())
    for changes, words in (({}, "the weights are torch.float32"), ({"moe_intermediate_size": 24}, "with 24 rows")):
        other = make_model(dtype=torch.bfloat16 if changes else torch.float32, **changes)
        with pytest.raises(ValueError, match=words):
            compute_in_fp8(other)
    monkeypatch.delenv(EMULATE)
    with pytest.raises(ValueError, match="compute capability 9"):
        compute_in_fp8(make_model(dtype=torch.bfloat16))


def test_the_base_s_values_are_computed_in_fp8_while_they_are_open():
    model = compute_in_fp8(to_esft(make_model(dtype=torch.bfloat16), ExpertConfig({1: (3, 5)}), keep_base=True))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = model(ids).logits
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.1)
        tuned = model(ids).logits
        with base_values(model):
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, tuned) and not torch.equal(tuned, base)


def test_values_of_frozen_experts_that_were_replaced_are_quantized_anew(tmp_path):
    """An expert that left is frozen, and yet gets the base's values, or those of an adapter."""
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    model = make_model(dtype=torch.bfloat16)
    compute_in_fp8(to_esft(model, ExpertConfig({1: (5, 2), 2: (0,)}), keep_base=True))

    def logits():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    base, optimizer = logits(), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    reselection = Reselection(model, optimizer)
    for config in ({1: (5, 1), 2: (0,)}, {1: (3,), 2: (4,)}):
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reselection.train(ExpertConfig(config))
        tuned = logits()
        with base_values(model):
            assert torch.equal(logits(), base)
        assert torch.equal(logits(), tuned) and not torch.equal(tuned, base)
    save_adapter(model, tmp_path / "tuned")
    with base_values(model):
        save_adapter(model, tmp_path / "base")
    for name, wanted in (("base", base), ("tuned", tuned)):
        add_adapter(model, tmp_path / name)
        assert torch.equal(logits(), wanted)
