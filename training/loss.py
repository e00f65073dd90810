"""The cross entropy of every label token, without the logits of all of them at once.

    loss_m = log sum_v exp(z_mv) - z_my      z_m = W h_m (+ b), y the label of row m

The logits of M labels in fp32 take 4 M V bytes, and their gradient as much again: 3.4 GB at M = 4,096 and V = 102,400.
Here the head sees a few rows at a time. A row's loss depends on its own hidden state alone, so the gradient of h_m is
computed in the forward, with the logits at hand, and scaled in the backward. If the head is trained, the backward
computes its logits once more.

Legend: B rows of the batch, M label positions, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from training.data import IGNORE

CHUNK = 2**25  # logits that exist at once: 128 MiB in fp32


def label_positions(labels_BT: Tensor, positions_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (labels (B, M), positions (M,)) of the M positions that have a label in some row.

    The label of a position is that of the next one in `labels_BT`. Positions that are known are given: to find them on
    a GPU, the host would wait for it.
    """
    labels_BT = nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORE)
    if positions_M is None:
        positions_M = (labels_BT != IGNORE).any(0).nonzero().squeeze(-1)
    return labels_BT[:, positions_M], positions_M


class TokenLosses:
    """Computes the loss of every label of a batch, with a model whose head is `head`."""

    def __init__(self, head: nn.Module, chunk: int = CHUNK):
        self.head, self.chunk, self.head_is_last = head, chunk, type(head) is nn.Linear

    @torch.no_grad()
    def try_head(self, model: nn.Module) -> None:
        """Run `model` on one token, to find out whether it goes on after its head, to scale or cap its logits.

        All ranks call this before the first batch: ranks that share experts must run the model equally often.
        """
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.head.weight.device)
        inputs = {"input_ids": ids, "position_ids": ids, "use_cache": False}
        if self.head_is_last:
            losses, outputs = self._in_the_head(model, inputs, ids.shape, Terms(ids[0]))
            self.head_is_last = outputs.logits is losses
        else:
            model(**inputs)

    def __call__(
        self, model: nn.Module, inputs: dict, labels_BM: Tensor, smoothing: float = 0.0, terms: "Terms | None" = None
    ) -> Tensor:
        """Return the losses (B, M) in fp32, 0 where there is no label.

        `model` may be wrapped. `inputs` hold what it takes, with the M positions of `labels_BM` as "logits_to_keep".
        `terms` are what to compute of the rows of logits, by default their cross entropy.
        """
        terms = terms or Terms(labels_BM.flatten(), smoothing)
        if self._is_large(labels_BM):
            return self._in_the_head(model, inputs, labels_BM.shape, terms)[0]
        logits_MV = model(**inputs).logits.flatten(0, 1)
        return terms.losses(logits_MV.float(), slice(None)).view(labels_BM.shape)

    def _is_large(self, labels_BM: Tensor) -> bool:
        return self.head_is_last and labels_BM.numel() * len(self.head.weight) > self.chunk

    def _in_the_head(self, model, inputs, shape, terms):
        """Let the head return losses in place of logits: in its forward FSDP has gathered its weight."""
        losses, hidden = [], []

        def take_input(_, args):
            hidden.append(args[0])
            return (args[0][:, :0],)

        def give_losses(head, _args, _logits):
            (h_BMD,) = hidden
            rows = max(1, self.chunk // len(head.weight))
            losses.append(_HeadLoss.apply(h_BMD.flatten(0, 1), head.weight, head.bias, terms, rows).view(shape))
            return losses[0]

        hooks = self.head.register_forward_pre_hook(take_input), self.head.register_forward_hook(give_losses)
        try:
            outputs = model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return losses[0], outputs

    @torch.no_grad()
    def logits(self, model: nn.Module, inputs: dict, labels_BM: Tensor) -> Callable[[slice], Tensor]:
        """Run `model` without gradients. Return what gives the logits of some of the B*M rows.

        Where `__call__` would not hold all logits at once, the hidden states are kept, and the head computes logits of
        what is asked for. A head that FSDP shards has its weight only while it runs, as in `Terms.losses`.
        """
        if not self._is_large(labels_BM):
            return model(**inputs).logits.flatten(0, 1).__getitem__
        kept = []

        def take_input(head, args):
            weights = (head.weight, head.bias)
            if head.weight.requires_grad:  # its values may be others after this forward
                weights = [None if weight is None else weight.clone() for weight in weights]
            kept.extend([args[0].flatten(0, 1).to(head.weight.device), weights if head.weight.requires_grad else None])
            return (args[0][:, :0],)

        hook = self.head.register_forward_pre_hook(take_input)
        try:
            model(**inputs)
        finally:
            hook.remove()
        h_MD, weights = kept
        return lambda rows: linear(h_MD[rows], *(weights or (self.head.weight, self.head.bias))).detach()


class Terms:
    """What a batch's loss is of the logits of its rows, some rows at a time: the cross entropy of each label."""

    def __init__(self, labels_M: Tensor, smoothing: float = 0.0):
        self.labels_M, self.smoothing = labels_M, smoothing

    def losses(self, logits_MV: Tensor, rows: slice) -> Tensor:
        """Return the loss (M,) of each of the `rows`, 0 without a label. `logits_MV` are theirs, in fp32."""
        labels_M = self.labels_M[rows]
        return cross_entropy(logits_MV, labels_M, ignore_index=IGNORE, reduction="none", label_smoothing=self.smoothing)

    def gradient(self, logits_MV: Tensor, rows: slice) -> Tensor:
        """Return the gradient of the sum of `losses`. This may take the memory of the logits."""
        label_M1 = self.labels_M[rows, None]
        grad_MV = torch.softmax(logits_MV, -1, out=logits_MV).sub_(self.smoothing / logits_MV.shape[1])
        grad_MV.scatter_add_(1, label_M1.clamp(min=0), grad_MV.new_full(label_M1.shape, self.smoothing - 1))
        return grad_MV.mul_(label_M1 != IGNORE)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_MD, weight, bias, terms, rows):
        losses_M = torch.empty(len(h_MD), dtype=torch.float32, device=h_MD.device)
        dh_MD = torch.empty_like(h_MD) if ctx.needs_input_grad[0] else None
        for start in range(0, len(h_MD), rows):
            part = slice(start, start + rows)
            logits = linear(h_MD[part], weight, bias)
            dtype, logits = logits.dtype, logits.float()
            losses_M[part] = terms.losses(logits, part)
            if dh_MD is not None:
                dh_MD[part] = terms.gradient(logits, part).to(dtype) @ weight
        ctx.settings = terms, rows
        ctx.save_for_backward(dh_MD, *((h_MD, weight, bias) if ctx.needs_input_grad[1] else ()))
        return losses_M

    @staticmethod
    @once_differentiable
    def backward(ctx, g_M):
        dh_MD, *of_head = ctx.saved_tensors
        dh_MD = None if dh_MD is None else (dh_MD * g_M[:, None]).to(dh_MD.dtype)
        dweight = dbias = None
        if of_head:
            dweight, dbias = _head_gradient(*of_head, g_M, *ctx.settings)
        return dh_MD, dweight, dbias, None, None


def _head_gradient(h_MD, weight, bias, g_M, terms: Terms, rows: int) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the head's weight and bias, summed in fp32."""
    dweight = torch.zeros_like(weight, dtype=torch.float32)
    dbias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    for start in range(0, len(h_MD), rows):
        part = slice(start, start + rows)
        logits = linear(h_MD[part], weight, bias)
        grad = terms.gradient(logits.float(), part).mul_(g_M[part, None]).to(logits.dtype)
        dweight += grad.T @ h_MD[part]
        if dbias is not None:
            dbias += grad.sum(0)
    return dweight.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype)
