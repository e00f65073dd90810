"""Compare the grouped forward and backward with the library's grouped_mm and a plain loop, for every layout."""

import copy

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE
from tests.fused_experts import LAYOUTS, D, E, F, K, T, assert_near, inputs, make_experts, run


@pytest.fixture(params=[True, False], ids=["one kernel", "one by one"], autouse=True)
def kernel(request, monkeypatch):
    """Run every test also as on a GPU without a grouped kernel."""
    if not request.param:
        monkeypatch.setattr("deepseek.grouped_gemm.has_kernel", lambda x: False)
        monkeypatch.delattr("deepseek.grouped_gemm.grouped_mm")  # nothing may call it then
    return request.param


def compiled(module, seen=None):
    """Compile a module as one graph. `seen` gets the number of its nodes that are experts."""

    def count(graph, inputs):
        if seen is not None:
            seen.append([node.target for node in graph.graph.nodes].count(torch.ops.esft.experts))
        return aot_eager(graph, inputs)

    return torch.compile(module, backend=count, fullgraph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop_and_the_library(layout, dtype):
    """The output has the library's bits. Gradients are those of the loop, and rows of the library's full ones."""
    trained, data = (4, 1), inputs(dtype)
    out, grads = run(make_experts(layout, dtype, trained), IMPLEMENTATION, *data)
    loop_out, loop_grads = run(make_experts(layout, dtype, trained), REFERENCE, *data)
    full_out, full_grads = run(make_experts(layout, dtype), "grouped_mm", *data)
    assert torch.equal(out, full_out)
    assert all(grads[name].dtype == torch.float32 and grads[name].shape[0] == 2 for name in list(grads)[2:])
    full_grads = {n: g if n in ("x", "weights") else g[sorted(trained)] for n, g in full_grads.items()}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert_near({"out": out, **grads}, {"out": loop_out, **loop_grads}, tolerance)
    assert_near(grads, full_grads, tolerance)
    # the negative: other experts' rows are not these
    other = {n: g if n in ("x", "weights") else g.flip(0) for n, g in full_grads.items()}
    with pytest.raises(AssertionError):
        assert_near(grads, other, tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_trained_experts_gradients_pass_through(layout):
    module = make_experts(layout)
    module.requires_grad_(False)
    out, grads = run(module, IMPLEMENTATION, *inputs())
    wanted_out, wanted = run(module, "grouped_mm", *inputs())
    assert torch.equal(out, wanted_out) and grads["x"].abs().max() > 0
    assert_near(grads, wanted, 1e-5)


@pytest.mark.parametrize("layout", ["plain", "transposed_interleaved_bias", "post_norm_bias"])
@pytest.mark.parametrize("need_x", [True, False], ids=["x", "no_x"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("case", ["one_idle", "all_trained_idle", "only_trained", "all_trained"])
def test_corners(layout, need_x, need_weights, case):
    """Vary which inputs need gradients, which trained experts get tokens, and whether anything is frozen."""
    trained = range(E) if case == "all_trained" else (0, 3, 5)
    routed = {"one_idle": (0, 1, 2, 5), "all_trained_idle": (1, 2, 4), "only_trained": (0, 3, 5)}.get(case, range(E))
    x_TD, ids_TK, weights_TK = inputs(experts=routed)
    data = x_TD.detach().requires_grad_(need_x), ids_TK, weights_TK.detach().requires_grad_(need_weights)
    out, grads = run(make_experts(layout, trained=trained), IMPLEMENTATION, *data)
    loop_out, loop_grads = run(make_experts(layout, trained=trained), REFERENCE, *data)
    if case == "all_trained_idle":
        for name in list(grads)[2:]:
            assert not grads[name].any()
            assert loop_grads[name] is None or not loop_grads[name].any()
            loop_grads.pop(name), grads.pop(name)
    assert_near({"out": out, **grads}, {"out": loop_out, **loop_grads}, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_token_at_all(layout):
    """A rank that receives no token gets an empty output, and gradients of zero instead of None."""
    out, grads = run(make_experts(layout, trained=(2,)), IMPLEMENTATION, *inputs(tokens=0))
    assert out.shape == (0, D) and grads["x"].shape == (0, D) and grads["weights"].shape == (0, K)
    assert all(grad is not None and not grad.any() for name, grad in grads.items() if name not in ("x", "weights"))


def test_wrong_prefix_is_noticed():
    """The comparison above fails if the trained rows are not the prefix that the kernel expects."""
    module = make_experts(trained=(4, 1))
    module.trained.row_of_e = module.trained.row_of_e.roll(1)
    out, _ = run(module, IMPLEMENTATION, *inputs())
    assert not torch.allclose(out, run(make_experts(), "grouped_mm", *inputs())[0])


def test_keeps_few_activations():
    """The backward keeps x, h and indices. It does not keep the gathered x (N, D), a, or y (N, D)."""
    (x_TD, ids_TK, weights_TK), saved = inputs(), {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for implementation, trained in ((IMPLEMENTATION, (4, 1)), ("grouped_mm", ())):
        module = make_experts(trained=trained)
        saved.clear()
        module.config._experts_implementation = implementation
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(x_TD, ids_TK, weights_TK)
        wide = sorted(tuple(t.shape) for t in saved.values() if t.is_floating_point() and t.shape[:1] == (T * K,))
        assert (wide == [(T * K, 2 * F)]) == (implementation == IMPLEMENTATION), wide


def test_autocast_computes_in_the_weights_dtype():
    module, data = make_experts(trained=(4, 1)), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = run(module, IMPLEMENTATION, *data)
    plain_out, plain_grads = run(module, IMPLEMENTATION, *data)
    assert torch.equal(out, plain_out)
    assert_near(grads, plain_grads, 1e-5)


@pytest.mark.parametrize("trained", [(4, 1), ()], ids=["trained", "frozen"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_gives_the_same_bits(layout, trained):
    """torch.compile sees one operator in every layout."""
    torch._dynamo.reset()
    seen = []
    (out, grads), (wanted, expected) = (
        run(make_experts(layout, trained=trained).requires_grad_(bool(trained)), IMPLEMENTATION, *inputs(), wrap)
        for wrap in (lambda module: compiled(module, seen), lambda module: module)
    )
    assert seen == [1] and torch.equal(out, wanted)
    assert_near(grads, expected, 0)


def test_compiled_modules_are_not_mixed_up():
    """All modules of a class share the compiled code. A copy computes with its own weights."""
    torch._dynamo.reset()
    first, x_TD, *routing = make_experts(trained=(4, 1)), *inputs()
    first.config._experts_implementation = IMPLEMENTATION
    modules = [first, copy.deepcopy(first), copy.deepcopy(first)]
    modules[1].down_proj.data.mul_(2)
    modules[2].trained.down_proj.data.mul_(2)
    found = [call(x_TD, *routing) for call in [compiled(module) for module in modules]]
    assert all(torch.equal(out, module(x_TD, *routing)) for out, module in zip(found, modules))
    assert not any(torch.equal(found[a], found[b]) for a in range(3) for b in range(a))
