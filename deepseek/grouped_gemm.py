"""The experts' forward and backward as grouped GEMMs, with weight gradients for the trained prefix only.

    h = x W_up^T (+ b)     a = gate(h)     y = a W_down^T (+ b)     out_t = sum_k w_tk y_tk

Rows are sorted by expert, and trained experts come first (`experts.TrainedExperts`). So the rows that reach trained
experts are the prefix [:n], and their weight gradient is one grouped product over it:

    sorted rows   | expert 2 | expert 5 | expert 6 | expert 0 | expert 1 | ...        N rows
    dW            |<------------ n rows ---------->|   not computed: frozen
    dx            |<------------------------ all N rows ------------------->|

Why not the library's grouped_mm with autograd? It computes and stores the gradient of all E experts. For the backward
it keeps the gathered x, h, the parts of the gate, a and y. Here the backward keeps the tokens x, which the residual
stream holds anyway, and h. It computes a again, elementwise. The gradient of the routing weights comes from a product
that the backward needs anyway: <g, y> = <g W_down, a> (+ <g, b>). So y is never stored. The values of the forward are
those of the library's grouped_mm, bit for bit.

torch.compile sees one node per layer, an operator that runs the same forward and backward (`esft::experts`). Layers
without trained experts use the same function. LoRA (lora.py) adds two thin products for the rows of the prefix.
`reference_experts_forward` is the same mathematics as a plain loop under autograd. Tests compare the two.

Legend: T tokens, K top-k, N = T*K routed rows, n of them on trained experts, D hidden, F expert hidden, E experts,
S trained experts of the layer, I and O inputs and outputs of a matrix.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deepseek.expert_sums import expert_forward
from deepseek.experts import IMPLEMENTATION, FusedExperts, note_run

REFERENCE = "esft_reference"
Bounds = list[int] | None  # 0 and the offsets of all experts, on the host
Factors = Mapping[str, Sequence[Tensor]]  # (A, B) by fused matrix, with LoRA


def esft_experts_forward(module: nn.Module, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Compute the output of a fused experts module. transformers knows this function as "esft".

    Args:
        x_TD: tokens, (T, D).
        topk_ids_TK: expert ids from the router, (T, K).
        topk_weights_TK: gate weights, which multiply the outputs of the experts, (T, K).

    Returns:
        (T, D), in the dtype of `x_TD`.
    """
    layer = FusedExperts(module)
    return grouped_experts(layer, x_TD, layer.rows_of(topk_ids_TK), topk_weights_TK)


def grouped_experts(layer: FusedExperts, x_TD: Tensor, rows_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Do the same as `esft_experts_forward` for experts given by their rows in the fused tensors. T may be 0."""
    params = layer.trained.operands() if layer.trained else ()
    if torch.compiler.is_compiling():
        return torch.ops.esft.experts(x_TD, topk_weights_TK, rows_TK, params, _handle(layer.module))[0]
    return _GroupedExperts.apply(layer, x_TD, topk_weights_TK, rows_TK, *params)


def reference_experts_forward(module: nn.Module, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Do the same as `esft_experts_forward` in a slow and obvious loop. transformers knows it as "esft_reference"."""
    layer = FusedExperts(module)
    note_run(module)
    rows_TK, out_TD = layer.rows_of(topk_ids_TK), torch.zeros_like(x_TD)
    for row in rows_TK.unique().tolist():
        token, k = torch.where(rows_TK == row)
        *_, z_nD = expert_forward(layer, row, x_TD[token])
        out_TD = out_TD.index_add(0, token, (z_nD * topk_weights_TK[token, k, None]).to(x_TD.dtype))
    return out_TD


def _activate(module: nn.Module, h: Tensor) -> Tensor:
    return module._apply_gate(h) if module.has_gate else module.act_fn(h)


def _forward(layer: FusedExperts, x_TD: Tensor, topk_weights_TK: Tensor, rows_TK: Tensor, params: Sequence[Tensor]):
    """Return the output (T, D), what the backward needs of it, and the bounds of `_bounds`."""
    if params:
        layer.trained.write_back(params)
    if layer.fp8:
        layer.fp8.refresh(layer)
    note_run(layer.module)
    module, (up_name, down_name) = layer.module, layer.weight_names
    up_bias, down_bias = _biases(layer)
    dtype, x_TD = x_TD.dtype, x_TD.to(layer.tensor(up_name).dtype)
    T, K = rows_TK.shape
    row_N, perm_N = torch.sort(rows_TK.reshape(-1), stable=True)
    inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, torch.arange(T * K, device=perm_N.device))
    every_E = torch.arange(len(layer.local_ids), device=row_N.device)
    offs_E = torch.searchsorted(row_N, every_E, right=True).int()
    bounds, lora = _bounds(layer, x_TD, offs_E), _factors(layer, params)

    h_N = _linear(layer, up_name, x_TD.index_select(0, perm_N // K), offs_E, bounds, lora)
    if module.has_bias:
        h_N += up_bias[row_N]
    a_NF = _activate(module, h_N)
    y_ND = _linear(layer, down_name, a_NF, offs_E, bounds, lora)
    if module.has_bias:
        y_ND += down_bias[row_N]
    if module.has_post_expert_norm:
        y_ND = module.post_expert_norm(y_ND)
    y_ND = y_ND * topk_weights_TK.reshape(-1)[perm_N, None]
    out_TD = y_ND.index_select(0, inverse_N).view(T, K, y_ND.shape[1]).sum(1).to(dtype)
    return out_TD, (h_N, row_N, perm_N, inverse_N, offs_E), bounds


def _backward(layer: FusedExperts, g_TD: Tensor, saved: Sequence[Tensor], bounds: Bounds, needs: tuple):
    """Return the gradients of x_TD, of the routing weights, and of the trained parameters, or None for each.

    `saved` are x_TD, topk_weights_TK, what `_forward` returned, and the factors of LoRA. `needs` says whether x_TD and
    the routing weights need a gradient, and for how many trained experts.
    """
    if layer.trained and "_is_fsdp_managed_module" in vars(layer.module):  # fully_shard sets it
        layer.trained.write_back()  # it has gathered the fused tensors anew, with the rows of the base
    module, (need_x, need_weights, S) = layer.module, needs
    x_TD, topk_weights_TK, h_N, row_N, perm_N, inverse_N, offs_E, *factors = saved
    dtype, x_TD, lora = x_TD.dtype, x_TD.to(h_N.dtype), _factors(layer, factors)
    (T, K), transposed = topk_weights_TK.shape, module.is_transposed
    up_name, down_name = layer.weight_names
    _, down_bias = _biases(layer)
    N, n = len(row_N), _prefix_rows(offs_E, S, bounds)
    n = N if n is None else n  # N does: grouped_mm stops at the last offset
    if not (need_x or need_weights):  # nothing is trained below this layer, so only the prefix matters
        N, offs_E = n, offs_E[:S]
    token_N, weight_N1 = perm_N[:N] // K, topk_weights_TK.reshape(-1)[perm_N[:N], None]

    g_ND = g_TD.to(x_TD.dtype).index_select(0, token_N)
    with torch.enable_grad():
        h_N = h_N[:N].detach().requires_grad_()
        a_NF = _activate(module, h_N)
    dweight_N = None
    if module.has_post_expert_norm:
        y_ND = _linear(layer, down_name, a_NF.detach(), offs_E, bounds, lora)
        if module.has_bias:
            y_ND += down_bias[row_N[:N]]
        g_ND, dweight_N = _backward_norm(module.post_expert_norm, y_ND, g_ND, weight_N1)
        weight_N1 = torch.ones_like(weight_N1)
    da_NF = _linear(layer, down_name, g_ND, offs_E, bounds, lora, backward=True)
    if need_weights and dweight_N is None:
        dweight_N = (da_NF * a_NF.detach()).sum(-1)
        if module.has_bias:
            dweight_N += (g_ND * down_bias[row_N[:N]]).sum(-1)
    dh_N = torch.autograd.grad(a_NF, h_N, (da_NF * weight_N1).to(a_NF.dtype))[0]

    dx_TD = dweight_TK = dtrained = None
    if S:
        wa_nF = (a_NF.detach()[:n] * weight_N1[:n]).to(g_ND.dtype)  # has fewer columns than w g
        pairs, where = ((dh_N[:n], x_TD.index_select(0, token_N[:n])), (g_ND[:n], wa_nF)), (offs_E[:S], bounds)
        if lora:
            dtrained = [grad for pair, AB in zip(pairs, lora.values()) for grad in _factor_grads(*pair, *AB, *where)]
        else:
            dtrained = [_grouped_outer(*pair, *where, transposed) for pair in pairs]
            if module.has_bias:
                dtrained += [_segment_sum(rows, row_N[:n], S) for rows in (dh_N[:n], g_ND[:n] * weight_N1[:n])]
            dtrained = [grad.float() for grad in dtrained]  # trained parameters are fp32 (experts.py)
    if need_x:
        dx_ND = _linear(layer, up_name, dh_N, offs_E, bounds, lora, backward=True)
        dx_TD = _sum_slots(dx_ND, inverse_N.view(T, K)).to(dtype)
    if need_weights:
        dweight_TK = dweight_N[inverse_N].view(T, K).to(topk_weights_TK.dtype)
    return dx_TD, dweight_TK, dtrained


class _GroupedExperts(torch.autograd.Function):
    """Joins `_forward` and `_backward`. x_TD, topk_weights_TK and the trained parameters can have a gradient."""

    @staticmethod
    def forward(ctx, layer, x_TD, topk_weights_TK, rows_TK, *params):
        out_TD, saved, ctx.bounds = _forward(layer, x_TD, topk_weights_TK, rows_TK, params)
        ctx.layer = layer
        ctx.save_for_backward(x_TD, topk_weights_TK, *saved, *(params if layer.lora else ()))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, g_TD):
        _, need_x, need_weights, _, *need_params = ctx.needs_input_grad
        needs = (need_x, need_weights, ctx.layer.num_trained if any(need_params) else 0)
        dx_TD, dweight_TK, dparams = _backward(ctx.layer, g_TD, ctx.saved_tensors, ctx.bounds, needs)
        return None, dx_TD, dweight_TK, None, *(dparams or [None] * len(need_params))


# --------------------------------------------------------------------------------------------------------------------
# The same as two operators for torch.compile, which does not look into them. Eager has no use for them: a call costs
# more. The fused tensors are not among their inputs, as a compiler would copy them because of `write_back`, and the
# gate is code of the model. So a handle stands for the module. torch.library.custom_op would keep autograd out of the
# backward.

_modules: "WeakValueDictionary[int, nn.Module]" = WeakValueDictionary()  # that were compiled, by handle
_handles = count()


@torch.compiler.assume_constant_result
def _handle(module: nn.Module) -> int:
    """Return the number that stands for an experts module in a compiled graph, which serves that module only."""
    note_run(module)
    for handle, known in _modules.items():
        if known is module:
            return handle
    _modules[handle := next(_handles)] = module
    return handle


def _op_forward(x_TD, topk_weights_TK, rows_TK, params, handle):
    out_TD, saved, _ = _forward(FusedExperts(_modules[handle]), x_TD, topk_weights_TK, rows_TK, params)
    return [out_TD, *saved]


def _op_forward_shapes(x_TD, topk_weights_TK, rows_TK, params, handle):
    layer, N = FusedExperts(_modules[handle]), rows_TK.numel()
    up = layer.tensor(layer.weight_names[0])
    h_N = x_TD.new_empty(N, up.shape[2 if layer.module.is_transposed else 1], dtype=up.dtype)
    row_N, perm_N, inverse_N = (rows_TK.new_empty(N) for _ in range(3))
    return [x_TD.new_empty(x_TD.shape), h_N, row_N, perm_N, inverse_N, rows_TK.new_empty(len(layer.local_ids)).int()]


def _op_backward(g_TD, saved, need_x, need_weights, S, handle):
    layer, (_, _, h_N, _, _, _, offs_E, *_) = FusedExperts(_modules[handle]), saved
    bounds = _bounds(layer, h_N, offs_E)
    dx_TD, dweight_TK, dparams = _backward(layer, g_TD, saved, bounds, (need_x, need_weights, S))
    return [grad for grad in (dx_TD, dweight_TK, *(dparams or ())) if grad is not None]


def _op_backward_shapes(g_TD, saved, need_x, need_weights, S, handle):
    layer, (x_TD, topk_weights_TK, _, _, _, _, _, *factors) = FusedExperts(_modules[handle]), saved
    grads = [t.new_empty(t.shape) for t, need in ((x_TD, need_x), (topk_weights_TK, need_weights)) if need]
    if layer.lora:
        return grads + [factor.new_empty(factor.shape) for factor in factors if S]
    shapes = [layer.tensor(name).shape[1:] for name in layer.tensor_names] if S else []
    return grads + [x_TD.new_empty(S, *shape, dtype=torch.float32) for shape in shapes]


def _op_context(ctx, inputs, output):
    x_TD, topk_weights_TK, _, params, ctx.handle = inputs
    factors = params if FusedExperts(_modules[ctx.handle]).lora else ()
    ctx.save_for_backward(x_TD, topk_weights_TK, *output[1:], *factors)
    ctx.S = len(params[0]) if params else 0


def _op_autograd(ctx, grads):
    need_x, need_weights, _, need_params, _ = ctx.needs_input_grad
    S = ctx.S if any(need_params) else 0
    found = iter(torch.ops.esft.experts_backward(grads[0], ctx.saved_tensors, need_x, need_weights, S, ctx.handle))
    dx_TD, dweight_TK = next(found) if need_x else None, next(found) if need_weights else None
    return dx_TD, dweight_TK, None, list(found) or [None] * len(need_params), None


SCHEMAS = {
    "esft::experts": "(Tensor x, Tensor weights, Tensor rows, Tensor[] params, int handle) -> Tensor[]",
    "esft::experts_backward": "(Tensor g, Tensor[] saved, bool need_x, bool need_w, int S, int handle) -> Tensor[]",
}
for name, schema in SCHEMAS.items():
    torch.library.define(name, schema, tags=torch.Tag.cudagraph_unsafe)  # `_bounds` may wait for the device
torch.library.impl("esft::experts", "default", _op_forward)
torch.library.register_fake("esft::experts", _op_forward_shapes)
torch.library.register_autograd("esft::experts", _op_autograd, setup_context=_op_context)
torch.library.impl("esft::experts_backward", "default", _op_backward)
torch.library.register_fake("esft::experts_backward", _op_backward_shapes)


def _bounds(layer: FusedExperts, x: Tensor, offs_E: Tensor) -> Bounds:
    """Return 0 and the offsets on the host, if it must know them to dequantize (frozen.py) or to multiply in a loop."""
    return [0, *offs_E.tolist()] if layer.frozen or not has_kernel(x) else None


def _backward_norm(norm: nn.Module, y_ND: Tensor, g_ND: Tensor, weight_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y, where weight * norm(y) has the gradient g, and of the routing weights."""
    with torch.enable_grad():
        y_ND.requires_grad_()
        normed_ND = norm(y_ND)
    dweight_N = (g_ND * normed_ND.detach()).sum(-1)
    return torch.autograd.grad(normed_ND, y_ND, (g_ND * weight_N1).to(normed_ND.dtype))[0], dweight_N


def _biases(layer: FusedExperts) -> tuple[Tensor | None, Tensor | None]:
    return tuple(layer.tensor(name).data for name in layer.tensor_names[2:]) or (None, None)


def _prefix_rows(offs: Tensor, S: int, bounds: Bounds) -> int | None:
    """Return n, or None where it is on an accelerator: to read it there would stall the stream."""
    if bounds or not S:
        return bounds[S] if bounds else 0
    return int(offs[S - 1]) if offs.device.type == "cpu" else None


def _factors(layer: FusedExperts, trained: Sequence[Tensor]) -> Factors:
    """Return (A, B) of each fused matrix, from the operands that lora.py gives; {} without LoRA."""
    return dict(zip(layer.weight_names, (trained[:2], trained[2:]))) if layer.lora else {}


def _linear(
    layer: FusedExperts, name: str, x_NI: Tensor, offs: Tensor, bounds: Bounds, lora: Factors, backward: bool = False
) -> Tensor:
    """Multiply the rows of the first len(offs) experts by their matrices in the fused tensor `name`.

    In the backward, the matrices are transposed. With `lora`, those of the trained prefix are W + B A.
    """
    y_NO = _base_linear(layer, name, x_NI, offs, bounds, backward)
    if lora:
        first, second = lora[name][::-1] if backward else lora[name]
        n, offs = _prefix_rows(offs, len(first), bounds), offs[: len(first)]
        if n is None:  # one group more holds the rows after the prefix, with a change of zero
            n = len(x_NI)
            first, second = (nn.functional.pad(factor, (0, 0, 0, 0, 0, 1)) for factor in (first, second))
            offs = torch.cat([offs, offs.new_full((1,), n)])
        u_nR = _grouped_linear(x_NI[:n], first, offs, bounds, backward)
        y_NO[:n] += _grouped_linear(u_nR, second, offs, bounds, backward)
    return y_NO


def _factor_grads(dy_nO: Tensor, x_nI: Tensor, A: Tensor, B: Tensor, offs: Tensor, bounds: Bounds) -> tuple:
    """Return the gradients of A (S, R, I) and B (S, O, R), where y = x A^T B^T in each group."""
    u_nR, du_nR = _grouped_linear(x_nI, A, offs, bounds, False), _grouped_linear(dy_nO, B, offs, bounds, True)
    return _grouped_outer(du_nR, x_nI, offs, bounds, False), _grouped_outer(dy_nO, u_nR, offs, bounds, False)


def _base_linear(layer: FusedExperts, name: str, x_NI: Tensor, offs: Tensor, bounds: Bounds, backward: bool) -> Tensor:
    """Do the same without LoRA. Matrices of stored experts (frozen.py) are dequantized a few at a time, if used."""
    if layer.fp8:
        return layer.fp8.linear(name, x_NI, offs, backward)
    weight, transposed = layer.tensor(name).data, layer.module.is_transposed != backward
    if len(offs) <= len(weight):
        return _grouped_linear(x_NI, weight[: len(offs)], offs, bounds, transposed)
    y_NO = x_NI.new_empty(len(x_NI), weight.shape[2 if transposed else 1])
    for start, stop in [(0, len(weight)), *layer.frozen.chunks()]:
        low, high = bounds[start], bounds[stop]
        if low < high:
            part = weight if start < len(weight) else layer.frozen.rows(name, start, stop, weight.dtype)
            here = [bound - low for bound in bounds[start : stop + 1]]
            y_NO[low:high] = _grouped_linear(x_NI[low:high], part, offs[start:stop] - low, here, transposed)
    return y_NO


def has_kernel(x: Tensor) -> bool:
    """Return whether torch's grouped_mm is one kernel: on the CPU, and in bf16 on GPUs of compute capability 9 or 10.

    On other GPUs, and in fp32, grouped_mm is a loop that reads the offsets from the device at every call. Ours reads
    them once per layer. It has not been run on such a GPU.
    """
    if x.device.type != "cuda":
        return True
    return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def _grouped_linear(x_NI: Tensor, weight: Tensor, offs: Tensor, bounds: Bounds, transposed: bool) -> Tensor:
    """Multiply the rows of group e by weight[e], (groups, I, O) if `transposed` else (groups, O, I). Return (N, O)."""
    weight = weight if transposed else weight.transpose(-2, -1)
    if bounds is None or has_kernel(x_NI):
        return grouped_mm(x_NI, weight, offs=offs)
    y_NO = x_NI.new_empty(len(x_NI), weight.shape[2])
    for group in range(len(offs)):
        rows = slice(bounds[group], bounds[group + 1])
        torch.mm(x_NI[rows], weight[group], out=y_NO[rows])
    return y_NO


def _grouped_outer(dy_nO: Tensor, x_nI: Tensor, offs: Tensor, bounds: Bounds, transposed: bool) -> Tensor:
    """Return the weight gradient of `_grouped_linear` for the first len(offs) groups. Rows after them are not read."""
    left, right = (x_nI, dy_nO) if transposed else (dy_nO, x_nI)
    if bounds is None or has_kernel(dy_nO):
        return grouped_mm(left.T, right, offs=offs)
    out = left.new_empty(len(offs), left.shape[1], right.shape[1])
    for group in range(len(offs)):
        rows = slice(bounds[group], bounds[group + 1])
        torch.mm(left[rows].T, right[rows], out=out[group])
    return out


def _sum_slots(rows_ND: Tensor, slots_TK: Tensor) -> Tensor:
    """Sum the K rows of each token: (N, D), (T, K) row numbers -> (T, D)."""
    if rows_ND.device.type == "cpu":  # makes no copy of the rows in token order; may round differently than .sum(1)
        return nn.functional.embedding_bag(slots_TK, rows_ND, mode="sum")
    return rows_ND.index_select(0, slots_TK.flatten()).view(*slots_TK.shape, -1).sum(1)


def _segment_sum(rows: Tensor, group: Tensor, S: int) -> Tensor:
    """Sum the rows of each group < S, for bias gradients: (n, C), (n,) -> (S, C)."""
    total = torch.zeros(S + 1, rows.shape[1], dtype=torch.float32, device=rows.device)
    return total.index_add_(0, group.clamp(max=S), rows.float())[:S]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, esft_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(REFERENCE, reference_experts_forward)
