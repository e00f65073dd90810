"""What one layer's experts do to its tokens: the norms of their outputs, and the squared gradients of their weights.

The gradient of an expert's matrix is a sum over the rows that reach it. Its squared norm needs no gradient at all:

    h = x W_up^T (+ b)     a = gate(h)     y = a W_down^T (+ b)     out_t = sum_k w_tk y_tk

    dW_up = dh^T x         |dW_up|^2 = sum_ij (dh_i . dh_j) (x_i . x_j)          + (dh_i . dh_j) with a bias
    dW_down = dy^T a       |dW_down|^2 = sum_ij (dy_i . dy_j) (a_i . a_j)        + (dy_i . dy_j) with a bias

i and j run over the rows of one expert from one document. So a whole pack of documents goes through one backward, and
every document has the squared gradient that it has alone. An expert with n rows costs n^2 (2F + D) and no memory that
lasts. Layouts do not matter: a transposed or interleaved matrix has the same norm.

Legend: T tokens, K top-k, n rows of one expert, D hidden, F expert hidden, E experts.
"""

import torch
from torch import Tensor

from deepseek.experts import FusedExperts

ROWS = 1024  # of an expert, that are compared with all its rows at a time


def expert_forward(layer: FusedExperts, row: int, x_nD: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return h, a and y of one expert, given by its row, and its output: y, but for layers with a norm there."""
    module, (up_name, down_name) = layer.module, layer.weight_names

    def linear(x: Tensor, name: str) -> Tensor:
        source = layer.trained.get_parameter if row < layer.num_trained and not layer.lora else layer.tensor
        if row < len(layer.tensor(name)):
            weight = source(name)[row].to(x.dtype)
        else:
            weight = layer.frozen.rows(name, row, row + 1, x.dtype)[0]
        if layer.lora and row < layer.num_trained:
            weight = weight + layer.lora.change(name, row).to(x.dtype)
        y = x @ weight if module.is_transposed else x @ weight.T
        return y + source(f"{name}_bias")[row].to(x.dtype) if module.has_bias else y

    h_n = linear(x_nD, up_name)
    a_nF = module._apply_gate(h_n) if module.has_gate else module.act_fn(h_n)
    y_nD = linear(a_nF, down_name)
    return h_n, a_nF, y_nD, module.post_expert_norm(y_nD) if module.has_post_expert_norm else y_nD


def gated_norms(layer: FusedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, keep_T: Tensor) -> Tensor:
    """Return float64 (E,): for each expert the sum of gate weight x norm of its output, over the tokens in `keep_T`."""
    sums_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=x_TD.device)
    for expert, row, token_n, w_n1 in _routed(layer, ids_TK, weights_TK):
        *_, z_nD = expert_forward(layer, row, x_TD[token_n])
        norm_n = z_nD.float().norm(dim=-1) * w_n1[:, 0].float() * keep_T[token_n]
        sums_E[expert] = norm_n.double().sum()
    return sums_E


def squared_gradients(
    layer: FusedExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, g_TD: Tensor, document_T: Tensor
) -> Tensor:
    """Return float64 (E,): for each expert the squared gradients of its weights, summed over the documents.

    g_TD: the gradient of the layer's output.
    document_T: which document a token is of.
    """
    sums_E = torch.zeros(layer.num_experts, dtype=torch.float64, device=x_TD.device)
    bias = float(layer.module.has_bias)
    for expert, row, token_n, w_n1 in _routed(layer, ids_TK, weights_TK):
        x_nD, document_n = x_TD[token_n], document_T[token_n]
        with torch.enable_grad():
            h_n, a_nF, y_nD, z_nD = expert_forward(layer, row, x_nD.requires_grad_())
            out_nD = z_nD * w_n1
            dh_n, dy_nD = torch.autograd.grad(out_nD, (h_n, y_nD), g_TD[token_n].to(out_nD.dtype))
        sums_E[expert] = _squared_norm(dh_n, x_nD.detach(), document_n, bias)
        sums_E[expert] += _squared_norm(dy_nD, a_nF.detach(), document_n, bias)
    return sums_E


def _routed(layer: FusedExperts, ids_TK: Tensor, weights_TK: Tensor):
    """Yield (expert, its row, its tokens (n,), their gate weights (n, 1)) of each expert that has tokens."""
    for expert in ids_TK.unique():
        token_n, k_n = torch.where(ids_TK == expert)
        yield int(expert), int(layer.rows_of(expert)), token_n, weights_TK.detach()[token_n, k_n, None]


def _squared_norm(dy_nO: Tensor, x_nI: Tensor, document_n: Tensor, bias: float) -> Tensor:
    """Return the squared gradient of a matrix, and of its bias if `bias` is 1, summed over documents."""
    dy_nO, x_nI, total = dy_nO.float(), x_nI.float(), dy_nO.new_zeros((), dtype=torch.float64)
    for dy_mO, x_mI, document_m in zip(dy_nO.split(ROWS), x_nI.split(ROWS), document_n.split(ROWS)):
        product_mn = (dy_mO @ dy_nO.T) * (x_mI @ x_nI.T + bias)
        total += product_mn.where(document_m[:, None] == document_n, 0).double().sum()
    return total
