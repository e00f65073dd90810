"""The rules that select experts by their scores. A rule fits any score (docs/selection.md has formulas and sources).

    cumulative    by how much the better experts of the layer sum to: those below `top_p`
    global        by score over all layers, as many as `cumulative`
    layers        as many as `cumulative`, all in the `upper_layers` uppermost layers
    fraction      the best share of every layer
    topk          the best so many of every layer
    random        a control: as many in each layer as `cumulative`, drawn by seed
    uniform       a control: as many in all as `cumulative`, the same number in every layer

`budget` takes the place of `top_p`: the share of all routed experts, and so of their parameters, that is selected.

Legend: E experts, L MoE layers; score_E maps expert -> score, and score_LE maps layer -> expert -> score.
"""

import math
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

from deepseek.files import suggest

ScoreTable = dict[int, dict[int, float]]  # score_LE

TAKES = {  # rule -> its options; the first is the one that it needs
    "cumulative": ("top_p", "budget"),
    "global": ("top_p", "budget"),
    "layers": ("top_p", "budget", "upper_layers"),
    "fraction": ("fraction",),
    "topk": ("top_k",),
    "random": ("top_p", "budget", "seed"),
    "uniform": ("top_p", "budget"),
}
STRATEGIES = tuple(TAKES)
CONTRASTS = ("difference", "ratio")
OPTIONS = ("top_p", "budget", "upper_layers", "fraction", "top_k")  # of the rules, beside the seed
# all that says how to select
SETTINGS = ("score_function", "strategy", *OPTIONS, "contrast_scores_dir", "contrast", "train_shared_experts")
SCORES = {"gradient", "reap"}  # which others call rules, too
DIGITS = 12  # of a difference of scores: what is beyond is rounding, and would break ties


def settings_beside_a_config(expand: bool, reselect: bool) -> set[str]:
    """Return which of SETTINGS count in a run whose config names the first experts: those that say which come next."""
    if expand:
        return {"score_function", "strategy", "upper_layers", "contrast_scores_dir", "contrast"}
    return {"score_function"} if reselect else set()


def check_strategy(strategy: str) -> None:
    """Raise ValueError if there is no such rule."""
    if strategy not in TAKES:
        hint = suggest(strategy, STRATEGIES)
        if strategy in SCORES:
            hint = f": it is a score (score_function={strategy}), which every rule takes"
        if strategy == "contrast":
            hint = ": it is a score less that of other data (contrast_scores_dir), which every rule takes"
        raise ValueError(f"cannot select by {strategy!r}{hint}. Give one of {', '.join(STRATEGIES)}.")


def check_rule(strategy: str, **given: float | None) -> None:
    """Raise ValueError if there is no such rule, or if it lacks an option or does not take what is given (not None)."""
    check_strategy(strategy)
    options = {name: value for name, value in given.items() if value is not None}
    needed, *_ = takes = TAKES[strategy]
    why = None
    if others := options.keys() - takes:
        names = " or ".join(takes[:2]) + "".join(f", and {name}" for name in takes[2:])
        why = f"it takes {names}, and not {' and '.join(sorted(others))}. Leave that out."
    elif needed != "top_p" and needed not in options:
        why = f"it needs {needed}. Give it."
    elif {"top_p", "budget"} <= options.keys():
        why = "top_p and budget both say how many. Give one of them."
    if why:
        raise ValueError(f"cannot select by {strategy}: {why}")
    check_amounts(**options)


def check_amounts(experts: float = math.inf, layers: float = math.inf, **amounts: float | None) -> None:
    """Raise ValueError if an option is out of its range: top_k up to `experts`, and upper_layers up to `layers`."""
    most = {"top_p": 1, "budget": 1, "fraction": 1, "top_k": experts, "upper_layers": layers}
    for name, value in amounts.items():
        if value is not None and name in most and not 0 < value <= most[name]:
            up_to = f" and up to {most[name]}" if most[name] < math.inf else ""
            raise ValueError(f"cannot select experts: {name} is {value}. Give a number above 0{up_to}.")


def contrast_scores(task_LE: ScoreTable, general_LE: ScoreTable, how: str = "difference") -> ScoreTable:
    """Return how much more an expert matters to a task than to general data.

    how: "difference" is task - general, and may be below 0. "ratio" is task / (general + the mean of all general
        scores); the mean keeps an expert that general data do not use from being divided by 0.
    """
    if how not in CONTRASTS:
        raise ValueError(f"cannot contrast scores by {how!r}{suggest(how, CONTRASTS)}. Give {' or '.join(CONTRASTS)}.")
    if {layer: score_E.keys() for layer, score_E in task_LE.items()} != {la: s.keys() for la, s in general_LE.items()}:
        raise ValueError("cannot contrast the scores: those of the general data have other layers or experts. Compute "
                         "both on the same model.")  # fmt: skip
    general = [score for score_E in general_LE.values() for score in score_E.values()]
    mean = math.fsum(general) / len(general)
    return {
        layer: {
            e: round(s - general_LE[layer][e], DIGITS) if how == "difference" else s / (general_LE[layer][e] + mean)
            for e, s in score_E.items()
        }
        for layer, score_E in task_LE.items()
    }


def rank(score_LE: ScoreTable) -> dict[int, list[int]]:
    """Return the experts of each layer, best first. A tie goes to the lower id."""
    return {layer: sorted(score_E, key=lambda e: (-score_E[e], e)) for layer, score_E in sorted(score_LE.items())}


def sums_before(score_LE: ScoreTable, ranked_L: dict[int, list[int]], shares: bool) -> dict[int, list[float]]:
    """Return for each expert in the order of `ranked_L` what the better ones of its layer sum to.

    shares: take scores as shares of the layer's sum, for scores that do not have one by themselves. A score below 0
        counts as 0, and an expert with none is never reached.
    """
    found = {}
    for layer, ids in ranked_L.items():
        score_N = [max(score_LE[layer][e], 0) for e in ids]
        total = sum(score_N) if shares else 1
        before_N = accumulate(score_N[:-1], initial=0.0)
        found[layer] = [math.inf if shares and not s else before / total for before, s in zip(before_N, score_N)]
    return found


def count_experts(
    score_LE: ScoreTable, strategy: str, top_p: float, budget: float | None, upper_layers: int | None, shares: bool
) -> dict[int, int]:
    """Return how many of its best experts each layer gives under a rule that takes `top_p` or `budget`."""
    order = order_experts(score_LE, strategy, upper_layers, shares)
    if budget is None:
        before_L = sums_before(score_LE, rank(score_LE), shares)
        number = sum(before < top_p for before_N in before_L.values() for before in before_N)
    else:
        number = max(1, round(budget * sum(map(len, score_LE.values()))))
    if number > len(order):
        raise ValueError(f"cannot select {number} experts: the upper {len({layer for layer, _ in order})} layers have "
                         f"{len(order)}. Give more upper_layers, or a smaller budget.")  # fmt: skip
    counts_L = Counter(layer for layer, _ in order[:number])
    return spread(counts_L, score_LE) if strategy == "uniform" else counts_L


def order_experts(score_LE: ScoreTable, strategy: str, upper_layers: int | None, shares: bool) -> list[tuple[int, int]]:
    """Return (layer, expert) in the order in which a rule that takes `budget` selects them."""
    ranked_L = rank(score_LE)
    before_L = sums_before(score_LE, ranked_L, shares)
    places = [(layer, row) for layer, ids in ranked_L.items() for row in range(len(ids))]
    if strategy == "layers":
        upper = sorted(ranked_L)[-(upper_layers or math.ceil(len(ranked_L) / 2)) :]
        places = [(layer, row) for layer, row in places if layer in upper]

    def key(place: tuple[int, int]) -> tuple[float, float]:  # the sort is stable: a tie goes to the lower layer
        layer, row = place
        return 0 if strategy == "global" else before_L[layer][row], -score_LE[layer][ranked_L[layer][row]]

    return [(layer, ranked_L[layer][row]) for layer, row in sorted(places, key=key)]


def spread(counts_L: dict[int, int], layers: Iterable[int]) -> dict[int, int]:
    """Return as many experts in all as `counts_L`, spread evenly over the layers.

    The remainder goes, one each, to the layers in which `counts_L` has most. A tie goes to the lower layer.
    """
    layers = sorted(layers)
    each, left = divmod(sum(counts_L.values()), len(layers))
    by_size = sorted(layers, key=lambda layer: (-counts_L.get(layer, 0), layer))
    return {layer: each + (layer in by_size[:left]) for layer in layers}
