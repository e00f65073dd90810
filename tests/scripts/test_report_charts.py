"""Charts of the page of scripts/report.py, and which answers it shows: what is drawn is what was given."""

import re
from itertools import pairwise

import pytest

from scripts import report, report_charts, report_evaluation


def points(chart: str, kind: str = "curve") -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<path class="{kind}"[^>]* d="M([^"]*)"', chart)
    return [[tuple(map(float, point.split())) for point in d.split("L")] for d in found]


@pytest.mark.parametrize("losses", [(2.0, 1.0, 0.5, 0.001), (2.0, 1.9, 1.8, 1.7), (0.5, 0.0, -0.25, -1.0)])
def test_a_curve_falls_where_the_loss_does(losses):
    curve = list(zip((1, 10, 20, 30), losses))
    chart = report_charts.loss_chart("loss", {"a": curve, "b": [(1, losses[0])]}, {"a": 0, "b": 1}, True)
    (xy, _) = points(chart)
    assert [x for x, _ in xy] == sorted(x for x, _ in xy) and len(xy) == 4
    assert all(below > above for (_, above), (_, below) in pairwise(xy)), "y grows downwards"
    assert ("log scale" in chart) == (losses[-1] == 0.001)
    steps = [y / x for (x, y) in zip([a - b for a, b in pairwise(losses)], [b[1] - a[1] for a, b in pairwise(xy)])]
    assert (max(steps) - min(steps) < 1) == ("log scale" not in chart)  # pixels per nat are equal where it is linear


@pytest.mark.parametrize(
    "curve", [[(5, 1.0)], [(5, 0.0)], [(1, 2.0), (2, 2.0)], [(0, 0.0), (1, 1e-9)], [(1, 1.0), (2, 5.5)]]
)
@pytest.mark.parametrize("dots", [True, False])
def test_curves_that_have_no_range_are_drawn_too(curve, dots):
    chart = report_charts.loss_chart("loss", {"a": curve}, {"a": 0}, dots)
    assert "nan" not in chart and "inf" not in chart and points(chart)[0]
    assert len(re.findall(r'class="tick">[\d.]', chart)) >= 2


def test_a_long_curve_is_thinned_and_ends_where_it_ends():
    curve = [(float(step), 1 + 1 / (step + 1)) for step in range(100_000)]
    chart = report_charts.loss_chart("loss", {"a": curve}, {"a": 0}, False)
    thick, raw = points(chart)[0], points(chart, "curve raw")[0]
    assert len(thick) <= report_charts.POINTS + 1 and len(raw) <= report_charts.POINTS + 1 and len(chart) < 30_000
    assert thick[-1][0] == raw[-1][0] == pytest.approx(max(x for x, _ in raw))


@pytest.mark.parametrize(
    "low, high, log", [(0, 100, False), (0, 7, False), (-3, 0.2, False), (1e-4, 3, True), (0.2, 1.5, True)]
)
def test_ticks_are_few_round_and_inside(low, high, log):
    found = report_charts.ticks(low, high, log)
    assert 2 <= len(found) <= 8 and all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(f"{tick:.6g}".strip("-0.").replace(".", "").strip("0")) <= 2 for tick in found)


def test_labels_are_moved_apart_in_their_order():
    places = [50.0, 52.0, 10.0, 51.0, 199.0]
    moved = report_charts.spread(places, 14, 0, 200)
    order = sorted(range(5), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= 14 for a, b in pairwise(order)) and max(moved) <= 200
    assert report_charts.spread([10.0, 90.0], 14, 0, 100) == [10.0, 90.0]


def test_a_heat_map_has_every_expert_once_and_marks_the_trained():
    score_LE = {la: {e: (e + 1) / 36 for e in range(8)} for la in (1, 2, 5)}
    by_id = {la: list(range(8)) for la in score_LE}
    chart = report_charts.heat_map("scores", score_LE, by_id, {1: {7, 0}, 5: {3}}, {1: 2, 2: 0, 5: 1}, "id")
    assert chart.count("M") - 1 == 3 * 8  # and one of the cut
    assert re.findall(r"<title>(layer \d, expert \d)", chart) == [
        "layer 1, expert 0",
        "layer 1, expert 7",
        "layer 5, expert 3",
    ]
    assert (
        report_charts.scale_end(score_LE) == 8 / 36
        and report_charts.scale_end({1: {e: float(e) for e in range(200)}}) == 197
    )
    darkest = re.search(r'fill="var\(--q8\)" d="([^"]*)"', chart)[1]
    assert darkest.count("M") == 3 and 'fill="var(--q9)"' not in chart


def answers(*scores) -> list[dict]:
    return [{"example": {"prompt": str(i)}, "score": s} for i, s in enumerate(scores)]


def test_the_best_the_worst_and_some_random_questions_are_picked():
    by_label = {"base": answers(*[0.5] * 50), "a": answers(*(i / 50 for i in range(50)))}
    picked = report_evaluation.pick(by_label, "base", 2, seed=0)
    assert [i for i, why in picked.items() if why == "most gained"] == [49, 48]
    assert [i for i, why in picked.items() if why == "least gained, or lost"] == [0, 1]
    drawn = [i for i, why in picked.items() if why == "drawn at random"]
    assert len(picked) == 6 and len(drawn) == 2
    assert report_evaluation.pick(by_label, "base", 2, seed=0) == picked
    assert any(report_evaluation.pick(by_label, "base", 2, seed=seed) != picked for seed in (1, 2, 3))
    assert set(report_evaluation.pick({"a": answers(0.0, 1.0, None)}, "base", 5, 0)) == {0, 1, 2}


@pytest.mark.parametrize(
    "line, told",
    [
        ({"score": 1.0}, "correct"),
        ({"score": 0.0}, "incorrect"),
        ({"score": 0.934}, "scores 93 of 100"),
        ({"score": None}, "not scored"),
        ({"score": None, "error": "too long"}, "failed"),
        ({"score": 0.0, "truncated": True}, "incorrect, cut off"),
    ],
)
def test_the_verdict_on_an_answer(line, told):
    assert f">{told}<" in report_evaluation.chip(line)


def test_a_running_mean_is_of_the_last_values():
    curve = [(1.0, 4.0), (2.0, 2.0), (5.0, 9.0), (6.0, 1.0)]
    assert report_charts.running_mean(curve, 1) == curve
    assert report_charts.running_mean(curve, 3) == [(1, 4), (2, 3), (5, 5), (6, 4)]


def contrast(a: str, b: str) -> float:
    """Of two colours, by WCAG 2."""

    def light(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted((light(a), light(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", report.THEMES)
def test_text_and_curves_stand_out(name):
    theme = report.THEMES[name]
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    for ground in (theme["bg"], theme["card"]):
        for kind in ("ink", "soft", "accent", "good", "bad", "warn"):
            assert contrast(theme[kind], ground) >= 4.5, (kind, ground)
        for colour in (*theme["c"], theme["base"], theme["chosen"]):
            assert contrast(colour, ground) >= 3, colour
    steps = [contrast(shade, theme["card"]) for shade in theme["q"]]
    assert steps == sorted(steps), "a higher score stands out more"
