"""The grouped products on a device: against a slow loop, the library's grouped_mm, and the CPU."""

import pytest
import torch

from deepseek.fp8 import EMULATE, Fp8Experts, reason_against
from deepseek.grouped_gemm import IMPLEMENTATION, REFERENCE, has_kernel
from tests.fused_experts import LAYOUTS, assert_near, inputs, make_experts, run

DTYPES = [torch.float32, torch.bfloat16]
TRAINED = (4, 1)


def call(device, implementation, layout, dtype, trained=(), wrap=lambda module: module):
    """Return the output of random experts, and the gradients by name."""
    x_TD, ids_TK, weights_TK = (t.detach().to(device).requires_grad_(t.requires_grad) for t in inputs(dtype))
    module = make_experts(layout, dtype, trained).to(device)
    return run(module, implementation, x_TD, ids_TK, weights_TK, wrap)


def tolerance(dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_loop_and_the_library(device, layout, dtype):
    """The output has the library's bits, where both use one kernel. Gradients are those of the slow loop."""
    out, grads = call(device, IMPLEMENTATION, layout, dtype, TRAINED)
    loop_out, loop_grads = call(device, REFERENCE, layout, dtype, TRAINED)
    full_out, full_grads = call(device, "grouped_mm", layout, dtype)
    assert out.device.type == device.type and out.abs().max() > 0
    if has_kernel(out):
        assert torch.equal(out, full_out)
    assert_near({"out": out, **grads}, {"out": loop_out, **loop_grads}, tolerance(dtype))
    full_grads = {n: g if n in ("x", "weights") else g[sorted(TRAINED)] for n, g in full_grads.items()}
    assert_near({"out": out, **grads}, {"out": full_out, **full_grads}, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_cpu(device, layout, dtype):
    out, grads = call(device, IMPLEMENTATION, layout, dtype, TRAINED)
    wanted_out, wanted = call("cpu", IMPLEMENTATION, layout, dtype, TRAINED)
    found = {name: grad.cpu() for name, grad in {"out": out, **grads}.items()}
    assert_near(found, {"out": wanted_out, **wanted}, tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed_interleaved_bias", "post_norm_bias"])
def test_a_gpu_without_the_kernel_computes_the_same(device, layout, dtype, monkeypatch):
    """As below compute capability 9: a product per expert, with the offsets on the host."""
    out, grads = call(device, IMPLEMENTATION, layout, dtype, TRAINED)
    monkeypatch.setattr("deepseek.grouped_gemm.has_kernel", lambda x: False)
    monkeypatch.delattr("deepseek.grouped_gemm.grouped_mm")  # nothing may call it then
    loop_out, loop_grads = call(device, IMPLEMENTATION, layout, dtype, TRAINED)
    assert_near({"out": loop_out, **loop_grads}, {"out": out, **grads}, tolerance(dtype))


@pytest.mark.parametrize("layout", ["plain", "transposed_interleaved_bias"])
def test_compiled_experts_compute_the_same(device, layout):
    """With inductor on a GPU, and with the graphs alone on a CPU, where inductor would take minutes."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    out, grads = call(device, IMPLEMENTATION, layout, torch.bfloat16, TRAINED)
    compiled, compiled_grads = call(
        device,
        IMPLEMENTATION,
        layout,
        torch.bfloat16,
        TRAINED,
        lambda m: torch.compile(m, backend=backend, fullgraph=True),
    )
    assert_near({"out": compiled, **compiled_grads}, {"out": out, **grads}, 0.02)


def test_rows_after_the_last_offset_are_not_read(device):
    """The backward of a GPU hands grouped_mm all N rows, and the offsets of the trained prefix alone."""
    rows, dtype = 64, torch.bfloat16
    torch.manual_seed(0)
    left, right = torch.randn(rows, 16, device=device, dtype=dtype), torch.randn(rows, 24, device=device, dtype=dtype)
    offs = torch.tensor([8, 24], dtype=torch.int32, device=device)
    wanted = torch.stack([left[a:b].float().T @ right[a:b].float() for a, b in ((0, 8), (8, 24))])
    left[24:] = right[24:] = float("nan")
    found = torch.nn.functional.grouped_mm(left.T, right, offs=offs)
    assert_near({"dW": found}, {"dW": wanted}, 0.02)


@pytest.mark.parametrize("layout", ["plain", "transposed_interleaved_bias"])
def test_products_in_fp8_are_those_of_the_emulation(device, layout, monkeypatch):
    """On a GPU of compute capability 9: torch's kernel, against its rounding in fp32 products on the CPU."""
    if device.type == "cuda" and (why := reason_against(device)):
        pytest.skip(why)
    monkeypatch.setattr("tests.fused_experts.F", 16)  # the kernel takes multiples of 16

    def in_fp8(on):
        x_TD, ids_TK, weights_TK = (t.detach().to(on).requires_grad_(t.requires_grad) for t in inputs(torch.bfloat16))
        module = make_experts(layout, torch.bfloat16, TRAINED).to(on)
        module.fp8 = Fp8Experts()
        out, grads = run(module, IMPLEMENTATION, x_TD, ids_TK, weights_TK)
        return {name: tensor.cpu() for name, tensor in {"out": out, **grads}.items()}

    if device.type == "cpu":
        monkeypatch.setenv(EMULATE, "1")
    found = in_fp8(device)
    monkeypatch.setenv(EMULATE, "1")
    assert_near(found, in_fp8("cpu"), 0.02)
    out, _ = call("cpu", IMPLEMENTATION, layout, torch.bfloat16, TRAINED)
    with pytest.raises(AssertionError):  # bf16 is further away
        assert_near({"out": found["out"]}, {"out": out}, 0.005)
