"""Expert parallelism: the experts of each layer are on several ranks, and tokens travel to them and back.

    world_size = replicas x ep_size            ranks 0 1 2 3 with ep_size 2:   replica 0 = {0, 1}, replica 1 = {2, 3}
                                               the same experts on ranks {0, 2} and {1, 3}

Every rank has batches of its own and all dense weights. A routed row is a token with one of its K experts. In an MoE
layer, one all-to-all sends each row to the rank that holds the expert, with the gate weight in spare columns. There the
usual ESFT forward (grouped_gemm.py) runs with K = 1. A second all-to-all brings the weighted outputs home. A slot is an
expert's place in the order "rows of rank 0, rows of rank 1, ...". One sort by slot makes every message contiguous:

    rank 0 holds experts 0 2 4 and trains 2: rows 2 0 4       slot of   2 0 4 | 5 1 3
    rank 1 holds experts 1 3 5 and trains 5: rows 5 1 3       is        0 1 2 | 3 4 5

    ids_TK     5 0 | 2 5 | 0 1        three tokens, K = 2
    slot_N     3 1   0 3   1 4
    sorted_N   0 1 1 | 3 3 4          sent: 3 rows to rank 0, 3 to rank 1
    perm_N     2 1 4 | 0 3 5          what `_Combine` undoes

Only the device knows the number of rows per message. Reading it is the one host synchronization of a layer. A token is
sent once per expert. To send it once per rank would save about a quarter of the traffic (K 6, 8 ranks), but change the
order in which a token's outputs are summed.

Gradients: the loss is divided by the label tokens of the whole world. A rank's backward covers all tokens of its
replica that reached its experts. So gradients of experts are summed over the ranks that hold the same ones, and all
others over the world.

Legend: T tokens, D hidden, K top-k, N = T*K routed rows, R rows a rank holds after dispatch, E experts, P ranks of a
group.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deepseek.experts import FusedExperts, moe_layers
from deepseek.grouped_gemm import grouped_experts
from deepseek.placement import Placement
from deepseek.process_groups import Ranks

IMPLEMENTATION = "esft_expert_parallel"


# --------------------------------------------------------------------------------------------------------------------
# routing rows to ranks


@dataclass(frozen=True)
class Route:
    """How `_Dispatch` and `_Combine` send rows and bring them back."""

    group: Any
    perm_N: Tensor  # sent row -> routed row (token * K + k)
    inverse_TK: Tensor  # routed row -> sent row
    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    row_R: Tensor  # local expert (row of the fused tensors) of each received row

    def exchange(self, rows: Tensor, back: bool = False) -> Tensor:
        """Send rows (N, C) and return those received (R, C). With `back`, R rows go home and N return."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        out = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        return out


@dataclass(frozen=True)
class ExpertShard:
    """The placement of a layer, as one rank sees it."""

    group: Any
    sizes_P: tuple[int, ...]  # experts per rank
    local: int  # experts here
    trained: bool  # on any rank

    def route(self, slot_TK: Tensor) -> Route:
        """Return the route of each token's K slots."""
        slot_N, (E, P) = slot_TK.reshape(-1), (sum(self.sizes_P), len(self.sizes_P))
        sorted_N, perm_N = torch.sort(slot_N, stable=True)
        arange = torch.arange(max(E, len(slot_N)), device=slot_N.device)
        inverse_N = torch.empty_like(perm_N).scatter_(0, perm_N, arange[: len(slot_N)])
        count_E = torch.searchsorted(sorted_N, arange[:E], right=True).diff(prepend=arange[:1])
        count_PE = torch.empty(P * self.local, dtype=count_E.dtype, device=count_E.device)  # by rank and local row
        dist.all_to_all_single(count_PE, count_E, [self.local] * P, list(self.sizes_P), group=self.group)
        sent_P = torch.stack([part.sum() for part in count_E.split(self.sizes_P)])
        sent, received = torch.stack([sent_P, count_PE.view(P, -1).sum(1)]).tolist()  # the host waits only here
        row_R = torch.repeat_interleave(arange[: self.local].repeat(P), count_PE, output_size=sum(received))
        return Route(self.group, perm_N, inverse_N.view(slot_TK.shape), sent, received, row_R)


def connect_experts(
    model: nn.Module, placements: Mapping[int, Placement], trained_L: Mapping[int, Iterable[int]], ranks: Ranks
) -> None:
    """Make the forward of a model that holds local experts only send rows to the ranks of their experts.

    Call this after `to_esft`, which puts the trained experts of each rank first.
    """
    for layer in moe_layers(model).values():
        trained, placement = set(trained_L.get(layer.index, ())), placements[layer.index]
        slots = [expert for ids in placement for expert in sorted(ids, key=lambda e: (e not in trained, e))]
        slot_E = torch.argsort(torch.tensor(slots)).to(layer.module.down_proj.device)
        layer.module.register_buffer("slot_E", slot_E, persistent=False)
        sizes = tuple(map(len, placement))
        layer.module.shard = ExpertShard(ranks.expert_group, sizes, sizes[ranks.expert_rank], bool(trained))
    model.set_experts_implementation(IMPLEMENTATION)


def follow_rows(model: nn.Module, ranks: Ranks) -> None:
    """Send tokens to the rows where the experts are now, after a change of what is trained. All ranks call this."""
    layers = moe_layers(model).values()
    own = {layer.index: (layer.ids_by_row, layer.num_trained) for layer in layers}
    first = ranks.rank - ranks.expert_rank
    replica = ranks.gather(own)[first : first + ranks.ep_size]
    for layer in layers:
        rows_P, trained_P = zip(*(rank[layer.index] for rank in replica))
        layer.module.slot_E.copy_(torch.argsort(torch.tensor([expert for ids in rows_P for expert in ids])))
        layer.module.shard = dataclasses.replace(layer.module.shard, trained=any(trained_P))


def _pack(x_ND: Tensor, index_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return rows `index_N` of x, each with its weight in spare columns. Rows stay aligned to 16 bytes."""
    D = x_ND.shape[1]
    out = x_ND.new_empty(len(index_N), D + 16 // x_ND.element_size())
    torch.index_select(x_ND, 0, index_N, out=out[:, :D])
    out[:, D:].view(weight_N.dtype)[:, 0] = weight_N
    return out


def _unpack(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (x, weights) of packed rows, as views."""
    D = rows.shape[1] - 16 // rows.element_size()
    return rows[:, :D], rows[:, D:].view(dtype)[:, 0]


class _Dispatch(torch.autograd.Function):
    """Send x_TD and weight_TK to the ranks that hold the experts, where they are x_RD and weight_R1."""

    @staticmethod
    def forward(ctx, x_TD, weight_TK, route):
        ctx.route, ctx.dtype = route, weight_TK.dtype
        rows = _pack(x_TD, route.perm_N // weight_TK.shape[1], weight_TK.reshape(-1)[route.perm_N])
        x_RD, weight_R = _unpack(route.exchange(rows), weight_TK.dtype)
        return x_RD, weight_R[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD, dweight_R1):
        route = ctx.route
        every_R = torch.arange(len(dx_RD), device=dx_RD.device)
        rows = route.exchange(_pack(dx_RD, every_R, dweight_R1[:, 0]), back=True)
        dx_ND, dweight_N = _unpack(rows, ctx.dtype)
        return _home(dx_ND, route), dweight_N[route.inverse_TK], None


class _Combine(torch.autograd.Function):
    """Bring y_RD home and sum the K rows of each token."""

    @staticmethod
    def forward(ctx, y_RD, route):
        ctx.route = route
        return _home(route.exchange(y_RD, back=True), route)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        route = ctx.route
        dy_ND = dy_TD.index_select(0, route.perm_N // route.inverse_TK.shape[1])
        return route.exchange(dy_ND), None


def _home(rows_ND: Tensor, route: Route) -> Tensor:
    """Sum rows, in the order in which they were sent, by token: (N, D) -> (T, D)."""
    rows = rows_ND.index_select(0, route.inverse_TK.reshape(-1))
    return rows.view(*route.inverse_TK.shape, rows_ND.shape[1]).sum(1)


def expert_parallel_forward(module: nn.Module, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Compute `grouped_gemm.esft_experts_forward` over the ranks of a group. All ranks call it, each with its own T."""
    if torch.is_grad_enabled() and module.shard.trained and not x_TD.requires_grad:
        # In the first trained layer, a rank without trained experts must still take part in the others' backward.
        x_TD = x_TD.detach().requires_grad_()
    route = module.shard.route(module.slot_E[topk_ids_TK])
    x_RD, weight_R1 = _Dispatch.apply(x_TD, topk_weights_TK, route)
    y_RD = grouped_experts(FusedExperts(module), x_RD, route.row_R[:, None], weight_R1)
    return _Combine.apply(y_RD, route)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, expert_parallel_forward)


# --------------------------------------------------------------------------------------------------------------------
# bringing tensors together


def gather_to_first(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return on rank 0 the tensors (by name, in host memory) of all ranks of the first replica; elsewhere {}.

    If several ranks have a name, the lowest rank's tensor is taken.
    """
    if ranks.ep_size == 1:
        return dict(tensors) if ranks.rank == 0 else {}
    notes_P = ranks.gather({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})[: ranks.ep_size]
    owner = {name: rank for rank in reversed(range(ranks.ep_size)) for name in notes_P[rank]}  # the lowest comes last
    gathered = dict(tensors) if ranks.rank == 0 else {}
    for name, source in owner.items():
        if source == 0:
            continue
        if ranks.rank == source:
            dist.send(_as_bytes(tensors[name]), 0, group=ranks.host_group)
        elif ranks.rank == 0:
            shape, dtype = notes_P[source][name]
            gathered[name] = torch.empty(shape, dtype=dtype)
            dist.recv(_as_bytes(gathered[name]), source, group=ranks.host_group)
    return gathered


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def shard_dense(model: nn.Module, timeout: timedelta, device: torch.device) -> None:
    """Shard the frozen dense weights over the world with FSDP2, layer by layer, before the first forward.

    This works in place and moves the model to `device`. Experts and trained parameters are not sharded. FSDP2 gets a
    process group of its own, because ranks differ in the order of its gathers and the reductions of gradients.
    """
    mesh = DeviceMesh.from_group(dist.new_group(timeout=timeout), device.type)
    layers = list(moe_layers(model).values())
    kept = {param for layer in layers for param in layer.module.parameters()}
    kept |= {param for param in model.parameters() if param.requires_grad}
    model.to(device)
    decoder_layers = model.get_submodule(re.match(r"(.+?)\.\d+\.", layers[0].name)[1])
    for block in (*decoder_layers, model):
        fully_shard(block, mesh=mesh, ignored_params=kept, reshard_after_forward=True)
