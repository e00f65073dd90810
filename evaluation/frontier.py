"""What models learn of a task against what they keep of general skills: the frontier, the point to take, a picture.

A `Point` is one trained model at one strength: base + strength x (tuned - base). At strength 0 it is the base. A point
dominates another if it is at least as good on both axes, and better on one. The frontier holds the points that none
dominates. Between two strengths of a model a `curve` is taken as straight.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

from evaluation.figures import colors_of, new_figure

RULES: dict[str, dict] = {  # method -> what selects its experts, as flags of generate_expert_config.py
    "esft-token": {"score_function": "token"},
    "esft-gate": {"score_function": "gate"},
    "esft-gradient": {"score_function": "gradient"},
    "esft-reap": {"score_function": "reap"},
    "esft-contrast": {"score_function": "token", "contrast": "difference"},
    "esft-fisher": {"score_function": "gradient", "contrast": "ratio"},
    "esft-token-global": {"score_function": "token", "strategy": "global"},
    "esft-gradient-global": {"score_function": "gradient", "strategy": "global"},
    "esft-layers": {"score_function": "token", "strategy": "layers"},
    "esft-token-shared": {"score_function": "token", "train_shared_experts": True},
    "esft-gradient-global-shared": {"score_function": "gradient", "strategy": "global", "train_shared_experts": True},
    "random": {"score_function": "token", "strategy": "random"},
}
SELECTS = RULES | {"lora-selected": RULES["esft-token"]}
METHODS = {**dict.fromkeys(RULES, "esft"), "lora-selected": "lora", "lora": "lora", "full": "full"}  # -> of train.py


@dataclass(frozen=True)
class Point:
    """A model at a strength. `task` and `general` are scores in percent, and `share` is that of trained parameters."""

    name: str
    strength: float
    task: float
    general: float
    share: float = 0.0

    def dominates(self, other: "Point") -> bool:
        mine, others = (self.task, self.general), (other.task, other.general)
        return mine != others and mine[0] >= others[0] and mine[1] >= others[1]


def frontier(points: Iterable[Point]) -> list[Point]:
    """Return the points that none dominates, the ones that keep most first."""
    points = list(points)
    best = [point for point in points if not any(other.dominates(point) for other in points)]
    return sorted(best, key=lambda point: (-point.general, point.task))


def recommend(points: Iterable[Point], base: Point, max_loss: float) -> Point:
    """Return the point that learns most among those that lose at most `max_loss` general points; else the base.

    Of equals, the one that keeps most counts, then the smaller share, then the greater strength.
    """
    kept = [point for point in points if point.general >= base.general - max_loss]
    return max([base, *kept], key=lambda point: (point.task, point.general, -point.share, point.strength))


# ---- curves: the points of one model, from the base on --------------------------------------------------------------


def kept_at(curve: list[Point], task: float) -> float:
    """Return the highest general score on a curve where its task score is at least `task`; -inf where it never is."""
    return _most(curve, lambda point: (point.task, point.general), task)


def learned_at(curve: list[Point], general: float) -> float:
    """Return the highest task score on a curve where it keeps at least `general`; -inf where it never does."""
    return _most(curve, lambda point: (point.general, point.task), general)


def _most(curve: list[Point], scores: Callable[[Point], tuple[float, float]], least: float) -> float:
    """Return the highest second score where the first is at least `least`, on straight lines between strengths."""
    corners = [scores(point) for point in sorted(curve, key=lambda point: point.strength)]
    reached = [second for first, second in corners if first >= least]
    for (x, a), (y, b) in pairwise(corners):
        if min(x, y) < least < max(x, y):  # crossed between two strengths
            reached.append(a + (b - a) * (least - x) / (y - x))
    return max(reached, default=float("-inf"))


# ---- a picture ------------------------------------------------------------------------------------------------------


def draw_frontier(points: list[Point], base: Point, taken: Point | None, title: str, xlabel: str, ylabel: str):
    """Return a figure: each model's strengths as a line, the frontier as stairs, and the recommended point as a star.

    The numbers at the points are strengths.
    """
    figure, axes = new_figure(7.6, 5.2, ncols=1)
    names = list(dict.fromkeys(point.name for point in points))
    colors, marks = colors_of(names), "osD^vPX*<>"
    for number, name in enumerate(names):
        own = sorted((point for point in points if point.name == name), key=lambda point: point.strength)
        x, y = [point.general for point in own], [point.task for point in own]
        mark = marks[number % len(marks)]
        axes.plot(x, y, marker=mark, color=colors[name], lw=0.9, ms=4, alpha=0.8, label=name)
    best = frontier([base, *points])
    axes.step([p.general for p in best], [p.task for p in best], where="post", color="black", lw=1.6, label="frontier")
    for point in best:
        spot = {"textcoords": "offset points", "xytext": (4, 4), "fontsize": 7}
        axes.annotate(f"{point.strength:g}", (point.general, point.task), **spot)
    axes.plot(base.general, base.task, "k+", ms=10, label="base")
    if taken:
        star = {"marker": "*", "ms": 17, "mfc": "none", "mec": "#e8000b", "mew": 1.6, "ls": "none"}
        axes.plot(taken.general, taken.task, **star, label=f"recommended: {taken.name} x {taken.strength:g}")
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
