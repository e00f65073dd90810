"""LoRA on selected experts: its products against a plain loop under autograd, its start, and what it leaves alone."""

import copy
import functools

import pytest
import torch

from deepseek import grouped_gemm
from deepseek.experts import FusedExperts, MoELayer, release_experts
from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE
from deepseek.lora import Lora, LoraExperts
from tests.fused_experts import LAYOUTS, D, E, K, assert_near, inputs, make_experts, run

TRAINED = (4, 1)


@pytest.fixture(params=["one kernel", "one by one", "n not known"], autouse=True)
def kernel(request, monkeypatch):
    """Run every test also as on GPUs: without a grouped kernel, and without n on the host."""
    if request.param == "one by one":
        monkeypatch.setattr(grouped_gemm, "has_kernel", lambda x: False)
        monkeypatch.delattr(grouped_gemm, "grouped_mm")  # nothing may call it then
    if request.param == "n not known":
        monkeypatch.setattr(grouped_gemm, "_prefix_rows", lambda offs, S, bounds: None)


def lora_experts(layout="plain", dtype=torch.float32, trained=TRAINED, rank=3, moved=True):
    """A fused experts module with factors that are all away from their start."""
    kind = functools.partial(LoraExperts, lora=Lora(rank, 6))
    module = make_experts(layout, dtype, trained, kind=kind)
    if moved:
        for param in module.trained.parameters():
            param.data += 0.3 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel()))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop(layout, rank, dtype):
    data = inputs(dtype)
    out, grads = run(lora_experts(layout, dtype, rank=rank), IMPLEMENTATION, *data)
    loop_out, loop_grads = run(lora_experts(layout, dtype, rank=rank), REFERENCE, *data)
    names = [name for name in grads if "lora" in name]
    assert len(names) in (4, 6) and all(grads[name].dtype == torch.float32 for name in names)
    assert {"x", "weights", *names} == {name for name, grad in grads.items() if grad is not None}
    assert_near({"out": out, **grads}, {"out": loop_out, **loop_grads}, 1e-5 if dtype == torch.float32 else 0.1)
    with pytest.raises(AssertionError):  # the negative: those of other experts
        assert_near({n: grads[n].flip(0) for n in names}, {n: loop_grads[n] for n in names}, 0.1)


@pytest.mark.parametrize("layout", ["plain", "transposed_interleaved_bias", "post_norm_bias"])
@pytest.mark.parametrize("need_x", [True, False], ids=["x", "no_x"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("case", ["one_idle", "all_trained_idle", "all_trained"])
def test_corners(layout, need_x, need_weights, case):
    """Vary which inputs need gradients, which trained experts get tokens, and whether anything is frozen."""
    trained = range(E) if case == "all_trained" else (0, 3, 5)
    routed = {"one_idle": (0, 1, 2, 5), "all_trained_idle": (1, 2, 4)}.get(case, range(E))
    x_TD, ids_TK, weights_TK = inputs(experts=routed)
    data = x_TD.detach().requires_grad_(need_x), ids_TK, weights_TK.detach().requires_grad_(need_weights)
    out, grads = run(lora_experts(layout, trained=trained), IMPLEMENTATION, *data)
    loop_out, loop_grads = run(lora_experts(layout, trained=trained), REFERENCE, *data)
    if case == "all_trained_idle":
        names = [name for name in grads if "lora" in name]
        assert names and not any(grads.pop(name).any() for name in names)
        loop_grads = {name: grad for name, grad in loop_grads.items() if name not in names}
    assert_near({"out": out, **grads}, {"out": loop_out, **loop_grads}, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_at_all(layout):
    out, grads = run(lora_experts(layout), IMPLEMENTATION, *inputs(tokens=0))
    assert out.shape == (0, D) and grads["x"].shape == (0, D) and grads["weights"].shape == (0, K)
    assert all(grad is not None and not grad.any() for name, grad in grads.items() if "lora" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_the_start_the_output_is_the_base_s_and_only_B_has_a_gradient(layout, dtype):
    out, grads = run(lora_experts(layout, dtype, moved=False), IMPLEMENTATION, *inputs(dtype))
    base, _ = run(make_experts(layout, dtype), "grouped_mm", *inputs(dtype))
    assert torch.equal(out, base)
    assert {name[-1] for name, grad in grads.items() if "lora" in name and grad.any()} == {"B"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_it_is_the_sum_rounded_once_and_nothing_else_moves(layout, dtype):
    module, base = lora_experts(layout, dtype), FusedExperts(make_experts(layout, dtype))
    out, _ = run(module, IMPLEMENTATION, *inputs(dtype))
    factors = {name: param.detach().clone() for name, param in module.trained.named_parameters()}
    module.trained.merge()
    release_experts(MoELayer(module, 0, "experts"))
    merged = FusedExperts(module)
    for expert in range(E):
        views, before = merged.expert_views(expert), base.expert_views(expert)
        for key, view in views.items():
            name, wanted = key.removesuffix(".weight"), before[key]
            if expert in TRAINED and "bias" not in key:
                row = sorted(TRAINED).index(expert)
                B, A = factors[f"{name}_lora_B"][row], factors[f"{name}_lora_A"][row]
                wanted = (wanted.float() + 2 * B @ A).to(dtype)
            assert torch.equal(view, wanted) and (expert not in TRAINED or "bias" in key or view.ne(before[key]).any())
    after, _ = run(module, IMPLEMENTATION, *inputs(dtype))
    assert_near({"out": after}, {"out": out}, 1e-5 if dtype == torch.float32 else 0.05)


def test_A_is_drawn_as_peft_draws_it_by_seed_and_place():
    torch.manual_seed(5)
    one, other = lora_experts(moved=False), lora_experts(moved=False)
    A = one.trained.gate_proj_lora_A
    assert torch.equal(A, other.trained.gate_proj_lora_A) and 0.5 < A.abs().max() * D**0.5 <= 1
    assert not torch.equal(A[0], A[1]) and not torch.equal(A, one.trained.up_proj_lora_A)
    alone = lora_experts(trained=(4,), moved=False)  # as where another rank holds expert 1
    assert torch.equal(alone.trained.gate_proj_lora_A[0], A[1])


def test_a_state_dict_gives_back_the_factors_and_a_cast_leaves_them_in_fp32():
    module = lora_experts()
    state = module.state_dict()
    assert torch.equal(state["down_proj"], make_experts().down_proj)  # in the base's order
    again = lora_experts(moved=False)
    again.load_state_dict(state)
    twin = copy.deepcopy(module)
    out, _ = run(module, IMPLEMENTATION, *inputs())
    for same in (again, twin):
        assert torch.equal(run(same, IMPLEMENTATION, *inputs())[0], out)
    module.bfloat16()
    assert {param.dtype for param in module.trained.parameters()} == {torch.float32}
    assert module.down_proj.dtype == torch.bfloat16
