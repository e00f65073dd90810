"""Means, intervals, comparisons and their table: as wide as theory says, in pairs, nothing left out in silence."""

import re

import numpy as np
import pytest

from evaluation.results import compare, format_results, summarize


def lines(values, metric="exact_match", skills=None) -> list[dict]:
    """Result lines with these scores in percent."""
    skills = skills or [None] * len(values)
    return [
        {"score": None if v is None else v / 100, "metrics": {metric: v}} | ({"skill": s} if s else {})
        for v, s in zip(values, skills)
    ]


def test_a_score_that_is_missing_is_no_zero():
    summary = summarize([*lines([100, 50], "rouge_l"), *lines([None], "rouge_l")])
    assert (summary["n"], summary["mean"], summary["metrics"], summary["missing"]) == (
        3, 75, {"rouge_l": 75}, {"rouge_l": 1},
    )  # fmt: skip
    nothing = summarize(lines([None, None]))
    assert nothing["mean"] is None and nothing["ci95"] is None and nothing["missing"] == {"exact_match": 2}


def test_interval_is_seeded_and_as_wide_as_theory_says():
    values = [100.0 * (i % 4 == 0) for i in range(400)]  # mean 25, standard error 2.165
    summary = summarize(lines(values), seed=1)
    low, high = summary["ci95"]
    assert summary["mean"] == 25 and summary == summarize(lines(values), seed=1)
    assert np.allclose([low, high], [25 - 1.96 * 2.165, 25 + 1.96 * 2.165], atol=0.6)
    assert summarize(lines([40.0]))["ci95"] is None  # one says nothing of the others


def test_few_samples_of_many_skills_do_not_make_a_narrow_interval():
    rng = np.random.default_rng(0)
    skills = [f"skill {i % 8}" for i in range(16)]

    def draw() -> np.ndarray:
        return 100.0 * (rng.random(16) < 0.5)

    found = [paired(draw(), draw(), skills)["certain"] for _ in range(200)]
    assert np.mean(found) < 0.1  # of models that do not differ; without widening: 0.15
    widths = [np.ptp(summarize(lines(draw(), skills=skills))["ci95"]) for _ in range(200)]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 50 / 16**0.5, rel=0.15)
    assert paired([0] * 9, [100] * 9, ["a"] * 8 + ["b"])["ci95"] is None
    extreme = summarize(lines([100.0, 100.0, 0.0, 100.0]))["ci95"]
    assert extreme[1] == 100 and extreme[0] >= 0


def test_skills_count_the_same_whatever_their_size():
    summary = summarize(lines([100.0] * 30 + [0.0] * 10, skills=["add"] * 30 + ["copy"] * 10))
    assert summary["mean"] == summary["metrics"]["exact_match"] == 50 and summary["ci95"] == [50, 50]
    assert summary["groups"] == {"add": {"n": 30, "mean": 100}, "copy": {"n": 10, "mean": 0}}


def paired(base, adapted, skills=None) -> dict:
    return compare(lines(base, skills=skills), lines(adapted, skills=skills))


def test_a_comparison_is_of_pairs():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 80, 200)
    better = paired(base, base + 5 + rng.normal(0, 5, 200))  # far less than the spread between samples
    assert better["difference"] == pytest.approx(5, abs=1) and better["certain"]
    low, high = better["ci95"]
    assert 0.5 < high - low < 2 * 1.96 * 5 / 200**0.5 * 1.2 and low < better["difference"] < high
    assert better["adapter"] - better["base"] == pytest.approx(better["difference"], abs=1e-3)
    worse = paired(base + 5 + rng.normal(0, 5, 200), base)
    assert worse["certain"] and worse["ci95"][1] < 0
    assert not paired(base, base + rng.normal(0, 5, 200) - 0.1)["certain"]
    shuffled = paired(base, rng.permutation(base) + 1)  # as many points, but no pairs
    assert shuffled["ci95"][1] - shuffled["ci95"][0] > 5 and not shuffled["certain"]
    assert paired(base, base)["ci95"] == [0, 0] and not paired(base, base)["certain"]


def test_a_comparison_leaves_out_what_one_of_them_lacks_and_counts_skills_the_same():
    some = paired([10, None, 30, 50], [20, 40, None, 60])
    assert (some["n"], some["base"], some["adapter"], some["difference"]) == (2, 30, 40, 10)
    skills = ["a"] * 9 + ["b"] * 2
    even = paired([0] * 11, [10] * 9 + [50] * 2, skills)
    assert (even["difference"], even["ci95"]) == (30, [30, 30])
    assert not paired([0] * 5, [10] * 5)["certain"] and paired([0] * 6, [10] * 6)["certain"]
    few, enough = (paired([0] * 100, [100] * changed + [0] * (100 - changed)) for changed in (5, 6))
    assert few["ci95"][0] > 0 and not few["certain"] and enough["certain"]  # a sign test of 5: p = 0.06
    assert paired([None], [1])["difference"] is None and not paired([None], [1])["certain"]
    with pytest.raises(ValueError):
        paired([1, 2], [1])


def summary(name: str, values, base=None, **more) -> dict:
    against = {} if base is None else {"against_base": compare(lines(base), lines(values))}
    return {"dataset": name, "primary": "exact_match", **summarize(lines(values)), "seconds": 1.0, **against, **more}


def test_a_table_shows_gains_losses_and_their_intervals():
    rng = np.random.default_rng(0)
    half = [100.0 * (i % 2) for i in range(60)]
    gained = summary("a_long_name_of_a_data_set", [100.0] * 60, half)
    noise = summary("b", [*half[1:], *half[:1]], half)
    lost = summary("c", list(rng.uniform(0, 10, 60)), half, primary="acc_norm,with_a_filter")
    shown = format_results([gained, noise, lost]).splitlines()
    assert [line.split()[0] for line in shown] == ["dataset", "a_long_name_of_a_data_set", "b", "c", "*"]
    for line, s in zip(shown[1:], (gained, noise, lost)):
        c = s["against_base"]
        numbers = [c["base"], c["adapter"], c["difference"], *c["ci95"]]
        assert np.allclose([float(x) for x in re.findall(r"[-+]?\d+\.\d", line)], numbers, atol=0.051)
        assert line.endswith("*") == c["certain"]
    assert [line.endswith("*") for line in shown[1:4]] == [True, False, True]
    ends = [line.rstrip(" *").rindex("]") for line in shown[1:4]]
    assert len(set(ends)) == 1  # in one column


def test_a_table_says_what_was_left_out_and_what_is_not_in_percent():
    cut = {"truncated": 2, "arguments": {"max_new_tokens": 7}}
    own = summary("mine", [50.0, 50.0, None], tokens_per_second=3.0, **cut)
    likelihood = summary("held_out", [1.0, 1.0], unit="as in lm-eval", higher_is_better=False)
    shown = format_results([own, likelihood])
    assert "  1 without exact_match, left out\n  2 cut off at 7 tokens or at the end of the context\n" in shown
    assert shown.endswith("in the unit of exact_match, less is better")
    assert "  no interval: that needs at least two samples of each skill or task" in format_results(
        [summary("mine", [50.0])]
    )
    pair = summary("mine", [50.0, 50.0], [0.0, 0.0])
    assert "mine (base): 2 cut off at 7 tokens" in format_results([pair], {"mine": {**own, "missing": {}}})
    both = format_results([pair, likelihood])
    assert both.count("dataset") == 2 and both.index("difference") < both.index("mean")
