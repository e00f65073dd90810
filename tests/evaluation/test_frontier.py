"""The frontier of learning and keeping: which points none dominates, which is taken, and what a curve reaches."""

import math
import random

import pytest

from evaluation.frontier import Point, draw_frontier, frontier, kept_at, learned_at, recommend

BASE = Point("base", 0, 3, 92)


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [Point(f"m{i}", 1, task, general) for i, (task, general) in enumerate(pairs)]


def test_a_point_dominates_what_is_no_better_on_either_axis():
    one, same, more, other = points((90, 91), (90, 91), (95, 91), (99, 80))
    assert more.dominates(one) and not one.dominates(more)
    assert not one.dominates(same) and not other.dominates(one) and not one.dominates(other)


def test_the_frontier_is_what_none_dominates_in_the_order_of_keeping():
    a, b, c, d, e = points((90, 91), (95, 88), (94, 88), (89, 91.5), (99, 60))
    assert frontier([e, a, c, b, d]) == [d, a, b, e]
    generator = random.Random(0)
    many = points(*((generator.randint(0, 9), generator.randint(0, 9)) for _ in range(60)))
    best = frontier(many)
    assert best and all(any(p.dominates(q) for p in best) for q in many if q not in best)
    assert not any(p.dominates(q) for p in best for q in best)


def test_the_point_taken_learns_most_of_those_that_keep_enough():
    a, b, c = points((90, 91), (95, 89.9), (99, 80))
    assert recommend([a, b, c], BASE, 2) == a and recommend([a, b, c], BASE, 2.1) == b
    assert recommend([a, b, c], BASE, 100) == c
    assert recommend([c], BASE, 2) == BASE  # nothing keeps enough
    small, large = Point("s", 0.7, 90, 91, share=0.02), Point("l", 1, 90, 91, share=0.2)
    assert recommend([large, small], BASE, 2) == recommend([small, large], BASE, 2) == small


def test_a_curve_is_straight_between_two_strengths():
    curve = [BASE, Point("m", 0.5, 53, 90), Point("m", 1, 93, 80)]
    assert kept_at(curve, 53) == 90 and kept_at(curve, 73) == pytest.approx(85) and kept_at(curve, 3) == 92
    assert kept_at(curve, 94) == -math.inf and kept_at(curve[::-1], 73) == kept_at(curve, 73)
    assert learned_at(curve, 90) == 53 and learned_at(curve, 85) == pytest.approx(73) and learned_at(curve, 0) == 93
    assert learned_at(curve, BASE.general) == BASE.task and learned_at(curve, 93) == -math.inf
    back = [BASE, Point("m", 0.5, 50, 80), Point("m", 1, 90, 90)]  # what was lost can come again
    assert kept_at(back, 90) == 90 and kept_at(back, 50) == 90 and kept_at(back, 91) == -math.inf
    assert learned_at(back, 90) == 90 and learned_at(back, 91) == pytest.approx(BASE.task + (50 - BASE.task) / 12)


def test_the_picture_shows_every_model_and_the_stairs():
    a, b = Point("esft", 0.5, 40, 91), Point("esft", 1, 90, 90)
    c = Point("full", 1, 99, 80)
    axes = draw_frontier([a, b, c], BASE, b, "title", "general", "task").axes[0]
    drawn = {line.get_label(): line for line in axes.lines}
    assert set(drawn) == {"esft", "full", "frontier", "base", "recommended: esft x 1"}
    assert list(drawn["esft"].get_xdata()) == [91, 90] and list(drawn["esft"].get_ydata()) == [40, 90]
    assert list(drawn["frontier"].get_xdata()) == [92, 91, 90, 80]
    assert drawn["frontier"].get_drawstyle() == "steps-post"  # left of a point, its score still holds
    assert (drawn["recommended: esft x 1"].get_xdata(), drawn["recommended: esft x 1"].get_ydata()) == ([90], [90])
    text = [t.get_text() for t in axes.texts]
    assert text == ["0", "0.5", "1", "1"]
