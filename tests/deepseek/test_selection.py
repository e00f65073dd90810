"""Test every rule of selection against what it promises: how many experts, of which layers, and which of them."""

import itertools
import random

import pytest

from deepseek.selection import CONTRASTS, STRATEGIES, TAKES, check_rule, contrast_scores, rank
from esft import ExpertScores, select_experts
from scripts.expert import generate_expert_config
from tests.helpers import refused, scores_of

L, E = 6, 16


def random_scores(seed: int, function: str = "token") -> ExpertScores:
    """Scores whose layers differ in how unequal their experts are. Those of gradient and reap differ in scale, too."""
    rng = random.Random(seed)
    rows = []
    for layer in range(L):
        row = [rng.random() ** (1 + layer) for _ in range(E)]
        scale = 2.0**layer if function in ("gradient", "reap") else 1 / sum(row)
        rows.append([x * scale for x in row])
    return scores_of(rows, function)


def total(config) -> int:
    return sum(map(len, config.experts.values()))


def places(config) -> set[tuple[int, int]]:
    return {(layer, e) for layer, ids in config.experts.items() for e in ids}


@pytest.mark.parametrize("function", ["token", "gradient"])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "budget" in TAKES[name]])
def test_every_rule_takes_as_many_as_the_budget_says_or_cumulative_takes(strategy, function):
    for seed in range(5):
        scores = random_scores(seed, function)
        for budget, expected in ((0.025, 2), (0.07, 7), (0.25, 24), (1e-6, 1), (0.5, 48)):
            config = select_experts(scores, score_function=function, strategy=strategy, budget=budget)
            assert total(config) == expected
        for top_p in (0.05, 0.2, 0.5):
            options = {"score_function": function, "top_p": top_p}
            assert total(select_experts(scores, strategy=strategy, **options)) == total(
                select_experts(scores, **options)
            )


def test_a_budget_of_cumulative_is_its_selection_at_some_top_p():
    """What `cumulative` takes at a top_p, it takes at the budget of that size; budgets in between add one expert."""
    scores = random_scores(1)
    for top_p in (0.1, 0.2, 0.45, 0.8):
        config = select_experts(scores, top_p=top_p)
        assert select_experts(scores, budget=total(config) / (L * E)) == config
    grown = [places(select_experts(scores, budget=n / (L * E))) for n in range(1, L * E + 1)]
    assert all(a < b and len(b - a) == 1 for a, b in itertools.pairwise(grown))
    first = places(select_experts(scores, budget=1 / (L * E)))
    best = {(layer, ids[0]): scores["token"][layer][ids[0]] for layer, ids in rank(scores["token"]).items()}
    assert first == {max(best, key=best.get)}  # the best expert of the layer in which it has most


def test_global_takes_the_best_of_all_layers():
    for seed in range(5):
        for function in ("token", "gradient"):
            scores = random_scores(seed, function)
            flat = {(la, e): s for la, score_E in scores[function].items() for e, s in score_E.items()}
            config = select_experts(scores, score_function=function, strategy="global", budget=0.2)
            assert places(config) == set(sorted(flat, key=lambda place: -flat[place])[:19])
            assert all(config.experts.values())  # a layer without experts is left out
    assert config.experts.keys() < set(range(L))
    tie = scores_of([[0.25] * 4] * 3)
    assert select_experts(tie, strategy="global", budget=0.5).experts == {0: (0, 1, 2, 3), 1: (0, 1)}


def test_layers_takes_the_uppermost_and_there_what_cumulative_would():
    scores = random_scores(2)
    upper = ExpertScores({"token": {layer: scores["token"][layer] for layer in (4, 5)}})
    config = select_experts(scores, strategy="layers", upper_layers=2, budget=12 / (L * E))
    assert config == select_experts(upper, budget=12 / (2 * E)) and config.experts.keys() == {4, 5}
    assert min(select_experts(scores, strategy="layers", budget=0.3).experts) == 3  # half of them
    with pytest.raises(ValueError, match="cannot select 24 experts: the upper 1 layers have 16"):
        select_experts(scores, strategy="layers", upper_layers=1, budget=0.25)


def test_controls_keep_the_counts():
    scores = random_scores(3)
    cumulative = select_experts(scores, budget=0.2)
    drawn = select_experts(scores, strategy="random", budget=0.2, seed=1)
    assert {la: len(ids) for la, ids in drawn.experts.items()} == {la: len(i) for la, i in cumulative.experts.items()}
    assert places(drawn) != places(cumulative)
    uniform = select_experts(scores, strategy="uniform", budget=0.2)
    assert sorted(map(len, uniform.experts.values())) == [3, 3, 3, 3, 3, 4]
    assert all(ids == tuple(rank(scores["token"])[layer][: len(ids)]) for layer, ids in uniform.experts.items())


def test_top_p_of_scores_without_a_sum_is_a_share_of_their_layer():
    """So it selects the same whatever the scale of a layer. A gate score is summed as it is, as in the paper."""
    for function in ("gradient", "reap"):
        scores = random_scores(4, function)
        shares = {}
        for layer, score_E in scores[function].items():
            shares[layer] = {e: s / sum(score_E.values()) for e, s in score_E.items()}
        as_token = ExpertScores({"token": shares})
        assert select_experts(scores, score_function=function, top_p=0.3) == select_experts(as_token, top_p=0.3)
    gates = scores_of([[0.2, 0.1, 0.1]], "gate")
    assert select_experts(gates, score_function="gate", top_p=0.21).experts == {0: (0, 1)}
    none = scores_of([[0.0, 3.0, 1.0]], "gradient")
    assert select_experts(none, score_function="gradient", top_p=1).experts == {0: (1, 2)}  # an expert with 0 is not


def test_contrast_is_what_matters_more_to_the_task():
    task = {1: {0: 0.5, 1: 0.3, 2: 0.2}, 2: {0: 0.1, 1: 0.6, 2: 0.3}}
    general = {1: {0: 0.5, 1: 0.1, 2: 0.4}, 2: {0: 0.0, 1: 0.3, 2: 0.7}}
    assert contrast_scores(task, general) == {1: {0: 0.0, 1: 0.2, 2: -0.2}, 2: {0: 0.1, 1: 0.3, 2: -0.4}}
    ratio, mean = contrast_scores(task, general, "ratio"), 2 / 6
    for layer, score_E in task.items():
        for e, score in score_E.items():
            assert ratio[layer][e] == pytest.approx(score / (general[layer][e] + mean))
    scores, others = ExpertScores({"token": task}), ExpertScores({"token": general})
    assert select_experts(scores, top_p=0.5).experts == {1: (0,), 2: (1,)}
    assert select_experts(scores, general=others, top_p=0.5).experts == {1: (1,), 2: (1,)}
    assert select_experts(scores, general=others, top_p=1).experts == {1: (1,), 2: (1, 0)}  # none below 0
    assert select_experts(scores, general=others, strategy="topk", top_k=3).experts == {1: (1, 0, 2), 2: (1, 0, 2)}
    by_ratio = select_experts(scores, general=others, contrast="ratio", strategy="global", budget=0.5).experts
    assert by_ratio == {1: (1, 0), 2: (1,)}
    with pytest.raises(ValueError, match="none has a token score above that on the general data"):
        select_experts(scores, general=scores, top_p=1)
    with pytest.raises(ValueError, match="those of the general data have other layers or experts"):
        select_experts(scores, general=ExpertScores({"token": {1: task[1]}}))
    with pytest.raises(ValueError, match=r"cannot contrast scores by 'diference' .did you mean 'difference'"):
        contrast_scores(task, general, "diference")


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        ("gradient", {}, "'gradient': it is a score .score_function=gradient., which every rule takes"),
        ("reap", {}, "it is a score"),
        ("contrast", {}, "contrast_scores_dir"),
        ("globl", {}, "did you mean 'global'"),
        ("global", {"top_p": 0.2, "budget": 0.1}, "top_p and budget both say how many. Give one of them"),
        ("layers", {"fraction": 0.2}, "it takes top_p or budget, and upper_layers, and not fraction. Leave that out"),
        ("cumulative", {"upper_layers": 2}, "and not upper_layers. Leave that out"),
        ("topk", {"budget": 0.2}, "it takes top_k, and not budget. Leave that out"),
        ("topk", {}, "it needs top_k. Give it"),
        ("global", {"budget": 0}, "budget is 0. Give a number above 0 and up to 1"),
        ("uniform", {"budget": 1.5}, "budget is 1.5"),
        ("layers", {"upper_layers": 0}, "upper_layers is 0. Give a number above 0"),
        ("random", {"top_p": float("nan")}, "top_p is nan"),
    ],
)
def test_what_a_rule_does_not_take_is_refused(strategy, options, words):
    with pytest.raises(ValueError, match=words):
        check_rule(strategy, **options)


def test_the_rules_by_command(tmp_path, capsys):
    task, general = random_scores(5), random_scores(6)
    task.save(tmp_path / "task.json")
    general.save(tmp_path / "general.json")
    base = [f"--expert_scores_dir={tmp_path / 'task.json'}", f"--output_path={tmp_path / 'c.json'}"]
    against = f"--contrast_scores_dir={tmp_path / 'general.json'}"
    for flags, options in (
        (["--strategy=global", "--budget=0.1"], {"strategy": "global", "budget": 0.1}),
        (["--strategy=layers", "--upper_layers=2"], {"strategy": "layers", "upper_layers": 2}),
        (["--budget=0.07", against], {"budget": 0.07, "general": general}),
        ([against, "--contrast=ratio", "--top_p=0.1"], {"general": general, "contrast": "ratio", "top_p": 0.1}),
        (["--strategy=uniform", "--budget=0.3"], {"strategy": "uniform", "budget": 0.3}),
        (["--strategy=random", "--budget=0.3", "--seed=4"], {"strategy": "random", "budget": 0.3, "seed": 4}),
    ):
        (config,) = generate_expert_config.main([*base, *flags])
        assert config == select_experts(task, **options)
    assert {"difference", "ratio"} == set(CONTRASTS) and "of 96 routed experts" in capsys.readouterr().out
    (tmp_path / "c.json").unlink()
    for flags, words in (
        (["--strategy=gradient"], "--score_function=gradient"),
        (["--budget=0.1", "--top_p=0.2"], "top_p and budget"),
        (["--contrast=ratio"], "--contrast_scores_dir"),
        ([against, "--score_function=gradient"], "'gradient'"),
        ([f"--contrast_scores_dir={tmp_path / 'nowhere.json'}"], "nowhere.json"),
    ):
        refused(capsys, generate_expert_config.main, [*base, *flags], words.replace("--score", "score"))
    assert not (tmp_path / "c.json").exists()
