"""Sum gradients over ranks in buckets while the backward still runs, and clip them by one global norm.

A parameter belongs to the process group of the ranks that hold it: for trained experts the ranks with the same ones,
for all others the world. Buckets follow the order in which a backward reaches the parameters, the last layer first. All
ranks start them in that order, even if a later one is complete first. A bucket has one flag per parameter:

    bucket   [ grad of p7 | grad of p6 | ... | 1 1 ... ]

If the flags of a parameter sum to 0, no rank has a gradient. It stays None, and no optimizer touches the parameter.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from deepseek.experts import moe_layers
from deepseek.process_groups import Ranks

BUCKET_BYTES = 25 * 2**20


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return (parameters of trained experts, all other trained parameters)."""
    layers = moe_layers(model, dense_ok=True).values()
    experts = [param for layer in layers if layer.trained for param in layer.trained.parameters()]
    known = {id(param) for param in experts}
    return experts, [p for p in model.parameters() if p.requires_grad and id(p) not in known]


class _Bucket:
    def __init__(self, params: list[nn.Parameter], group):
        self.params, self.group = params, group
        self.waiting = {id(param) for param in params}
        self.flat: Tensor | None = None
        self.work = None

    def start(self) -> None:
        first = self.params[0]
        size = sum(param.numel() for param in self.params) + len(self.params)
        self.flat = torch.zeros(size, dtype=first.dtype, device=first.device)
        *parts, flags = self.flat.split([*(p.numel() for p in self.params), len(self.params)])
        for number, (param, part) in enumerate(zip(self.params, parts)):
            if param.grad is not None:
                part.copy_(param.grad.reshape(-1))
                flags[number] = 1
            param.grad = part.view_as(param)  # from here on the bucket is the gradient, and not a copy of it
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def finish(self) -> None:
        self.work.wait()
        for param, flag in zip(self.params, self.flat[-len(self.params) :].tolist()):
            if not flag:
                param.grad = None
        self.waiting = {id(param) for param in self.params}
        self.flat = self.work = None


class GradientReducer:
    """Replace the gradients of a backward by their mean over the world. The loss must be scaled by world_size.

    Args:
        active: returns whether the present backward is the last one before the optimizer step.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, active: Callable[[], bool]):
        self.ranks, self.active = ranks, active
        self.experts, self.others = split_parameters(model)
        self.params = self.experts + self.others
        self.device = next(model.parameters()).device
        self.buckets: list[_Bucket] = []
        if ranks.world_size > 1 and ranks.ep_size == 1:  # all in one queue, in the order of the backward
            self._add(reversed([p for p in model.parameters() if p.requires_grad]), ranks.world_group)
        elif ranks.world_size > 1:
            if ranks.world_size > ranks.ep_size:
                self._add(reversed(self.experts), ranks.replica_group)
            self._add(reversed(self.others), ranks.world_group)
        self._bucket_of = {id(param): bucket for bucket in self.buckets for param in bucket.params}
        self._started = 0
        params = [param for bucket in self.buckets for param in bucket.params]
        self._hooks = [param.register_post_accumulate_grad_hook(self._ready) for param in params]

    def close(self) -> None:
        """Leave the gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def _add(self, params: Iterable[nn.Parameter], group) -> None:
        full, size, kind = [], 0, None
        for param in params:
            nbytes, this = param.numel() * param.element_size(), (param.dtype, param.device)
            if full and (size + nbytes > BUCKET_BYTES or this != kind):
                self.buckets.append(_Bucket(full, group))
                full, size = [], 0
            full, size, kind = [*full, param], size + nbytes, this
        if full:
            self.buckets.append(_Bucket(full, group))

    def _ready(self, param: nn.Parameter) -> None:
        if self.active():
            self._bucket_of[id(param)].waiting.discard(id(param))
            self._start(lambda bucket: not bucket.waiting)

    def _start(self, complete: Callable[[_Bucket], bool]) -> None:
        while self._started < len(self.buckets) and complete(self.buckets[self._started]):
            self.buckets[self._started].start()
            self._started += 1

    def finish(self) -> None:
        """Wait for all buckets. Then every gradient is that of the world."""
        self._start(lambda bucket: True)
        for bucket in self.buckets:
            bucket.finish()
        self._started = 0
        if self.ranks.world_size > 1 and (grads := [p.grad for p in self.params if p.grad is not None]):
            torch._foreach_mul_(grads, 1 / self.ranks.world_size)

    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients by min(1, max_norm / norm). Return the norm over the parameters of all ranks."""
        parts = [[p.grad for p in part if p.grad is not None] for part in (self.experts, self.others)]
        experts_norm, others_norm = (get_total_norm(part).to(self.device) for part in parts)
        if self.ranks.ep_size > 1:
            square = experts_norm.square()
            dist.all_reduce(square, group=self.ranks.expert_group)
            experts_norm = square.sqrt()
        norm = torch.linalg.vector_norm(torch.stack([experts_norm, others_norm]))
        clip_grads_with_norm_([p for p in self.params if p.grad is not None], max_norm, norm)
        return norm
