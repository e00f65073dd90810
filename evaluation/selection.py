"""How certain is a selection of experts, how much do two selections share, and where do tokens go after training?

Routing is counted pack by pack (`PackCounts`), so the tokens of a task can be drawn again. A bootstrap draws as many
packs as there are, with replacement, selects experts by the paper's rule, and repeats this a thousand times. An expert
in nearly all of these sets, or in nearly none, is certain. Another sample of the same data could decide otherwise about
the rest.

    counts_BLE = times_BP @ counts_PLE      times_BP: how often draw b takes pack p

Packs hold whole documents, so the tokens of a document are drawn together. Two selections are compared by Jaccard,
shared / in either, over all layers at once, beside what two random selections of these sizes would share. (In a mean
over layers, a layer with two experts would weigh as much as one with twenty.)

Legend: P packs, B draws, L MoE layers, E experts, T tokens, K top-k.
"""

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek.files import atomic_path, check_file
from deepseek.routing import SUMS, RouterCounts, read_logs
from esft import SCORE_FILES, WITHOUT_SUM, ExpertConfig, ExpertScores, score_decimals, select_experts

PACKS_NAME = "packs.safetensors"  # beside summary.json
UNCERTAIN = (0.05, 0.95)  # shares of the draws between which an expert is neither in nor out
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
AT_ONCE = 2**24  # counts in a chunk of draws, 128 MiB

# ------------------------------------------------------------------------------------------------ counts by pack


@dataclass(frozen=True)
class PackCounts:
    """The `RouterCounts` of each pack.

    `layers` are the decoder layers. `sums` has (P, L, E) under the names that `RouterCounts.sums` has.
    """

    top_k: int
    layers: list[int]
    tokens_P: Tensor
    sums: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.tokens_P)

    @classmethod
    def of(cls, counts_P: list[RouterCounts]) -> "PackCounts":
        """Join the counts of the packs."""
        sums = {kind: torch.stack([counts.sums[kind] for counts in counts_P]) for kind in counts_P[0].sums}
        return cls(counts_P[0].top_k, counts_P[0].layers, torch.tensor([counts.tokens for counts in counts_P]), sums)

    def total(self) -> RouterCounts:
        """Return the counts of all packs together."""
        sums = {kind: sums_PLE.sum(0) for kind, sums_PLE in self.sums.items()}
        return RouterCounts(self.top_k, int(self.tokens_P.sum()), self.layers, sums)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file. The slots of a pack fit into 32 bits, the sums of gate weights do not."""
        tensors = {kind: sums_PLE.contiguous() for kind, sums_PLE in self.sums.items()}
        tensors["slots"] = tensors["slots"].int()
        tensors |= {"tokens": self.tokens_P, "layers": torch.tensor(self.layers), "top_k": torch.tensor(self.top_k)}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, folder: str | Path) -> "PackCounts":
        """Read what get_expert_scores.py wrote to a folder, or the released raw logs in it, with a line per pack."""
        folder = Path(folder)
        path = folder / PACKS_NAME
        if not path.is_file() and any(folder.rglob("expert_weights_*.txt")):
            return cls.of(read_logs(folder))
        try:
            check_file(path)
            tensors = load_file(path)
            tensors["slots"] = tensors["slots"].long()
            sums = {kind: tensors[kind] for kind in SUMS.values() if kind in tensors}
            packs = cls(int(tensors["top_k"]), tensors["layers"].tolist(), tensors["tokens"], sums)
            if ExpertScores.from_counts(packs.total()).by_function != ExpertScores.load(folder).by_function:
                raise ValueError("summary.json beside it has other scores")
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            again = "Score the experts again with scripts/expert/get_expert_scores.py"
            raise ValueError(f"cannot read the counts of packs in {path}: {str(error).rstrip('.')}. {again}") from error
        return packs


# ------------------------------------------------------------------------------------------------ stability


def select_cumulative(score_LE: Tensor, top_p: float, shares: bool = False) -> Tensor:
    """Return bool (..., L, E): what `select_experts` selects by its cumulative rule, for many tables at once."""
    if shares:  # scores without a sum of their own
        score_LE = score_LE / score_LE.sum(-1, keepdim=True)
    ranked_LE, ids_LE = score_LE.sort(dim=-1, descending=True, stable=True)
    before_LE = ranked_LE.cumsum(-1).roll(1, -1)
    before_LE[..., 0] = 0
    taken_LE = (before_LE < top_p) & (ranked_LE > 0) if shares else before_LE < top_p
    return torch.zeros_like(score_LE, dtype=torch.bool).scatter(-1, ids_LE, taken_LE)


def bootstrap_selections(packs: PackCounts, times_BP: Tensor, score_function: str, top_p: float) -> Tensor:
    """Return bool (B, L, E): the experts selected on each draw, with scores rounded as `ExpertScores` rounds them.

    times_BP says how often each pack is in a draw. The sums stay below 2**53, so float64 is exact.
    """
    P, L, E = packs.sums["slots"].shape
    flat = {kind: packs.sums[kind].reshape(P, -1).double() for kind in ("slots", SUMS[score_function])}
    found, shares = [], score_function in WITHOUT_SUM
    for part_BP in times_BP.double().split(max(1, AT_ONCE // (L * E))):
        counts_BLE = (part_BP @ flat[SUMS[score_function]]).view(-1, L, E)
        if score_function == "token":
            total_BLE = counts_BLE.sum(-1, keepdim=True).clamp(min=1)
        elif score_function == "reap":
            total_BLE = (part_BP @ flat["slots"]).view(-1, L, E).clamp(min=1)
        else:
            total_BLE = (part_BP @ packs.tokens_P.double()).clamp(min=1)[:, None, None] * RouterCounts.UNIT
        score_BLE = counts_BLE / total_BLE
        score_BLE = score_BLE if shares else score_BLE.round(decimals=score_decimals(E))
        found.append(select_cumulative(score_BLE, top_p, shares))
    return torch.cat(found)


def jaccard(a_LE: Tensor, b_LE: Tensor) -> Tensor:
    """Return the Jaccard (...) of sets bool (..., L, E) over all layers at once. Two empty sets are equal."""
    both, either = (a_LE & b_LE).sum((-2, -1)), (a_LE | b_LE).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def expected_jaccard(sizes: list[tuple[int, int, int]]) -> tuple[float, float, float]:
    """Return the exact mean and the 2.5 % and 97.5 % quantiles of the Jaccard of two random sets.

    `sizes` has (a, b, E) for each layer: a and b of E experts are drawn. What they share is hypergeometric, and its sum
    over the layers is a convolution.
    """
    chance = np.ones(1)
    for a, b, E in sizes:
        ways = [math.comb(a, i) * math.comb(E - a, b - i) / math.comb(E, b) for i in range(min(a, b) + 1)]
        chance = np.convolve(chance, ways)
    total = sum(a + b for a, b, _ in sizes)
    value = np.array([i / (total - i) if total > i else 1.0 for i in range(len(chance))])
    low, high = value[np.searchsorted(chance.cumsum(), (0.025, 0.975))]
    return float(chance @ value), float(low), float(high)


def bootstrap_counts(num_packs: int, size: int, draws: int, seed: int) -> Tensor:
    """Return (draws, num_packs): how often each pack is among `size` packs drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(num_packs, (draws, size), generator=generator)
    return torch.zeros(draws, num_packs).scatter_add(1, drawn, torch.ones(draws, size))


def split_draws(num_packs: int, size: int, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return two (draws, num_packs): `size` packs each, drawn without replacement, with none in common."""
    generator, first, second = random.Random(seed), torch.zeros(draws, num_packs), torch.zeros(draws, num_packs)
    for row in range(draws):
        both = generator.sample(range(num_packs), 2 * size)
        first[row, both[:size]] = 1
        second[row, both[size:]] = 1
    return first, second


def stability(packs: PackCounts, score_function: str, top_p: float, draws: int = 1000, seed: int = 0) -> dict:
    """Return how certain the experts are that `select_experts` selects on all packs, as numbers for JSON:

    selected: {layer: ids};  frequency: {layer: [share of the draws that select expert e]}
    jaccard, jaccard_ci95, jaccard_by_layer: of a draw's selection with that on all packs
    random_jaccard: of two random selections of these sizes;  growth: see `growth_of_stability`
    uncertain: [(layer, expert, frequency)] within `UNCERTAIN`, the most frequent first
    """
    if len(packs) < 2:
        raise ValueError("cannot draw packs again: there is one. Score more tokens, or with a shorter --seq_length.")
    scores = ExpertScores.from_counts(packs.total())
    config = select_experts(scores, score_function=score_function, top_p=top_p)
    layers, (P, _, E) = packs.layers, packs.sums["slots"].shape
    (all_LE,) = bootstrap_selections(packs, torch.ones(1, P), score_function, top_p)
    drawn_BLE = bootstrap_selections(packs, bootstrap_counts(P, P, draws, seed), score_function, top_p)
    frequency_LE = drawn_BLE.double().mean(0)
    found_B = jaccard(drawn_BLE, all_LE).double()
    by_layer_L = jaccard(drawn_BLE.unsqueeze(-2), all_LE.unsqueeze(-2)).double().mean(0)
    unsure = ((frequency_LE > UNCERTAIN[0]) & (frequency_LE < UNCERTAIN[1])).nonzero().tolist()
    uncertain = sorted(((layers[row], e, frequency_LE[row, e].item()) for row, e in unsure), key=lambda x: -x[2])
    return {
        "score_function": score_function,
        "top_p": top_p,
        "draws": draws,
        "seed": seed,
        "packs": P,
        "tokens": int(packs.tokens_P.sum()),
        "num_experts": E,
        "selected": {layer: list(ids) for layer, ids in config.experts.items()},
        "jaccard": found_B.mean().item(),
        "jaccard_ci95": found_B.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist(),
        "jaccard_by_layer": dict(zip(layers, by_layer_L.tolist())),
        "random_jaccard": expected_jaccard([(len(ids), len(ids), E) for ids in config.experts.values()])[0],
        "frequency": dict(zip(layers, frequency_LE.tolist())),
        "uncertain": uncertain,
        "growth": growth_of_stability(packs, all_LE, score_function, top_p, draws, seed),
    }


def growth_of_stability(
    packs: PackCounts, all_LE: Tensor, score_function: str, top_p: float, draws: int, seed: int
) -> list[dict]:
    """Return for a sample of each of `SHARES` the Jaccard of its selection with two others.

    "jaccard_with_all": with the selection on all packs; the sample is drawn with replacement.
    "jaccard_with_other_packs": with the selection on as many other packs, like a second sample of the data; None for
    more than half of the packs.
    """
    P, rows = len(packs), []
    for number, share in enumerate(SHARES, start=1):
        size, other = max(1, int(share * P)), None
        some_BLE = bootstrap_selections(packs, bootstrap_counts(P, size, draws, seed + number), score_function, top_p)
        if 2 * size <= P:
            halves = split_draws(P, size, draws, seed)
            first, second = (bootstrap_selections(packs, times, score_function, top_p) for times in halves)
            other = jaccard(first, second).mean().item()
        rows.append(
            {
                "share": share,
                "packs": size,
                "tokens": round(size * int(packs.tokens_P.sum()) / P),
                "jaccard_with_all": jaccard(some_BLE, all_LE).mean().item(),
                "jaccard_with_other_packs": other,
            }
        )
    return rows


# ------------------------------------------------------------------------------------------------ several selections


def correlation(a_LE: dict[int, dict[int, float]], b_LE: dict[int, dict[int, float]]) -> float:
    """Return Pearson's correlation of two tasks' scores within layers: each layer's mean is taken off first.

    NaN if the scores of one task do not differ within layers.
    """

    def centered(score_LE: dict[int, dict[int, float]]) -> Tensor:
        rows = [torch.tensor([score_LE[la][e] for e in sorted(score_LE[la])]).double() for la in sorted(score_LE)]
        return torch.cat([row - row.mean() for row in rows])

    a, b = centered(a_LE), centered(b_LE)
    return (a @ b / (a.norm() * b.norm())).item()


def overlap(configs: list[ExpertConfig], num_experts: dict[int, int]) -> list[list[dict]]:
    """Return [i][j] -> {"jaccard", "shared", "random_jaccard", "random_ci95"} of every two selections."""

    def pair(a: ExpertConfig, b: ExpertConfig) -> dict:
        a_set, b_set = ({(layer, e) for layer, ids in c.experts.items() for e in ids} for c in (a, b))
        shared, either = len(a_set & b_set), len(a_set | b_set)
        sizes = [(len(a.experts.get(la, ())), len(b.experts.get(la, ())), E) for la, E in num_experts.items()]
        mean, low, high = expected_jaccard(sizes)
        found = {"jaccard": shared / either if either else 1.0, "shared": shared}
        return {**found, "random_jaccard": mean, "random_ci95": [low, high]}

    return [[pair(a, b) for b in configs] for a in configs]


def union_of(configs: list[ExpertConfig]) -> ExpertConfig:
    """Join selections (best first), ordered by an expert's best rank in one of them. A tie goes to the lower id."""
    experts = {}
    for layer in sorted(set().union(*(config.experts for config in configs))):
        rank: dict[int, int] = {}
        for config in configs:
            for place, expert in enumerate(config.experts.get(layer, ())):
                rank[expert] = min(place, rank.get(expert, place))
        experts[layer] = tuple(sorted(rank, key=lambda e: (rank[e], e)))
    return ExpertConfig(experts)


def short_name(path: str | Path) -> str:
    """Return what to call scores or a config in a table: the last part of the path that says something."""
    parts = [part for part in re.split(r"[/\\]", str(path)) if part not in ("", ".")]
    dull = (*SCORE_FILES, "expert_scores", "expert_cfg.json", "expert_configs")
    return Path(next((part for part in reversed(parts) if part not in dull), str(path))).stem


# ------------------------------------------------------------------------------------------------ after training


def routed(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    """Return bool (T, E) on the CPU: the experts of each token. In ZAYA, weight 0 skips the expert."""
    slots_TE = torch.zeros(len(ids_TK), num_experts, dtype=torch.int8, device=ids_TK.device)
    return slots_TE.scatter_add(1, ids_TK, (weights_TK != 0).char()).bool().cpu()


def moved(before_TE: Tensor, after_TE: Tensor) -> Tensor:
    """Return (3, E) of two `routed`: the slots of each expert before and after, and those that went elsewhere after."""
    return torch.stack([before_TE.sum(0), after_TE.sum(0), (before_TE & ~after_TE).sum(0)])


def drift(moved_3E: Tensor, trained: list[int] | None) -> dict:
    """Return total_variation (half the sum of |differences| of the token scores, 0 to 1), the share of slots that
    changed, and the shares of slots on the experts `trained` before and after (None without them).

    `moved_3E` is the sum of `moved` over the tokens.
    """
    (before_E, after_E, _), (before, after, changed) = moved_3E, moved_3E.sum(1).tolist()
    return {
        "total_variation": (before_E / before - after_E / after).abs().sum().item() / 2,
        "changed": changed / before,
        "trained_before": None if trained is None else before_E[trained].sum().item() / before,
        "trained_after": None if trained is None else after_E[trained].sum().item() / after,
    }
