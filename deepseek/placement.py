"""Place the experts of each layer on the ranks of an expert-parallel group, for even work and memory.

In every MoE layer, all ranks wait for the busiest one. So the measure of work is max / mean over ranks of the routed
tokens, layer by layer. Trained experts have optimizer states, so their number over all layers should be even too.

The method is greedy, the heaviest first. Trained experts go to the rank with the fewest trained ones. Then frozen
experts go to the rank with the lowest load that has room. All ranks hold the same number of experts, within one.

A row of a trained expert costs more, for its weight gradient. Counting it as 1.5 rows shortens a simulated step by 1 %
and makes the load uneven. So it counts as one row.

Legend: E experts, P ranks of the group, L MoE layers.
"""

import itertools
from collections.abc import Collection, Mapping

Placement = tuple[tuple[int, ...], ...]  # [rank of the group] -> ids of its experts, ascending


def place_contiguous(num_experts: int, ranks: int) -> Placement:
    """Place experts 0 .. E-1 in blocks, as most frameworks do."""
    bounds = [rank * num_experts // ranks for rank in range(ranks + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))


def place_by_score(
    load_E: Mapping[int, float], trained: Collection[int], ranks: int, held: list[int] | None = None
) -> Placement:
    """Place the experts of one layer by load and by the number of trained experts.

    Args:
        load_E: expert id -> share of the routed tokens, in any unit.
        trained: ids of the trained experts.
        held: trained experts that each rank has in other layers. It is updated.
    """
    held = held if held is not None else [0] * ranks
    load_P, placed = [0.0] * ranks, [[] for _ in range(ranks)]
    room, larger = divmod(len(load_E), ranks)  # `larger` ranks hold one expert more
    for expert in sorted(load_E, key=lambda e: (e not in trained, -load_E[e], e)):
        full = sum(len(ids) > room for ids in placed)
        free = [rank for rank in range(ranks) if len(placed[rank]) < room + (full < larger)]
        if expert in trained:  # all that was placed so far is trained, too
            rank = min(free, key=lambda r: (len(placed[r]), held[r], load_P[r]))
            held[rank] += 1
        else:
            rank = min(free, key=load_P.__getitem__)
        placed[rank].append(expert)
        load_P[rank] += load_E[expert]
    return tuple(tuple(sorted(ids)) for ids in placed)


def place_layers(
    num_experts_L: Mapping[int, int],
    trained_L: Mapping[int, Collection[int]],
    ranks: int,
    load_LE: Mapping[int, Mapping[int, float]] | None = None,
    contiguous: bool = False,
) -> dict[int, Placement]:
    """Return a placement per layer. Without `load_LE`, all experts have the same load.

    Raises:
        ValueError: there are more ranks than experts, or the loads are of other experts.
    """
    held, placements = [0] * ranks, {}
    for layer, num_experts in num_experts_L.items():
        if ranks > num_experts:
            raise ValueError(f"cannot use ep_size={ranks}: layer {layer} has {num_experts} experts. Lower ep_size.")
        load_E = dict.fromkeys(range(num_experts), 1 / num_experts) if load_LE is None else load_LE.get(layer)
        if load_E is None or set(load_E) != set(range(num_experts)):
            raise ValueError(
                f"cannot place experts by these scores: they have no, or other, experts of layer {layer}. They are of "
                "another model."
            )
        if contiguous:
            placements[layer] = place_contiguous(num_experts, ranks)
        else:
            placements[layer] = place_by_score(load_E, set(trained_L.get(layer, ())), ranks, held)
    return placements


def imbalance(
    placements: Mapping[int, Placement],
    trained_L: Mapping[int, Collection[int]],
    load_LE: Mapping[int, Mapping[int, float]],
) -> dict[str, float]:
    """Return how uneven a placement is, as max / mean over ranks; 1 is even.

    "load" is that of the routed tokens, averaged over layers, and "load_worst" that of the worst layer. "trained" is
    that of the number of trained experts in all layers.
    """
    loads, trained = [], [0] * len(next(iter(placements.values())))
    for layer, placement in placements.items():
        load_P = [sum(load_LE[layer][expert] for expert in ids) for ids in placement]
        if sum(load_P):
            loads.append(max(load_P) * len(load_P) / sum(load_P))
        for rank, ids in enumerate(placement):
            trained[rank] += len(set(ids) & set(trained_L.get(layer, ())))
    return {
        "load": sum(loads) / len(loads) if loads else 1.0,
        "load_worst": max(loads, default=1.0),
        "trained": max(trained) * len(trained) / sum(trained) if sum(trained) else 1.0,
    }
