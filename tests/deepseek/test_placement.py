"""Test placements: every expert is there once, and sizes, trained experts and load are even."""

import random

import pytest

import esft
from deepseek.placement import (
    imbalance,
    place_by_score,
    place_contiguous,
    place_layers,
)

SHAPES = [(1, 1), (8, 1), (8, 2), (7, 4), (9, 4), (8, 8), (60, 8), (64, 8)]  # experts, ranks


def draw(seed: int, experts: int, layers: int = 1) -> tuple[dict, dict]:
    """Return (loads, a few of them large; trained experts, mostly loaded ones) of layers 1, 2, ..."""
    generator = random.Random(seed)
    load_LE = {la: {e: generator.paretovariate(1.5) for e in range(experts)} for la in range(1, layers + 1)}
    trained_L = {}
    for layer, load_E in load_LE.items():
        best = sorted(load_E, key=load_E.get, reverse=True)
        trained_L[layer] = best[: generator.randint(0, max(1, experts // 6))]
    return load_LE, trained_L


def spread(counts: list[int]) -> int:
    return max(counts) - min(counts)


@pytest.mark.parametrize("experts, ranks", SHAPES)
def test_every_expert_lies_on_one_rank_and_ranks_are_alike(experts, ranks):
    for seed in range(20):
        load_LE, trained_L = draw(seed, experts, layers=6)
        held = [0] * ranks
        for contiguous in (False, True):
            placements = place_layers(dict.fromkeys(load_LE, experts), trained_L, ranks, load_LE, contiguous)
            assert list(placements) == list(load_LE)
            for layer, placement in placements.items():
                assert len(placement) == ranks
                assert sorted(e for ids in placement for e in ids) == list(range(experts))
                assert all(list(ids) == sorted(ids) for ids in placement)
                assert spread([len(ids) for ids in placement]) <= 1
                trained = [len(set(ids) & set(trained_L[layer])) for ids in placement]
                if not contiguous:
                    assert spread(trained) <= 1
                    held = [a + b for a, b in zip(held, trained)]
        assert spread(held) <= 1  # over all layers together


def test_contiguous_is_blocks_in_order():
    assert place_contiguous(8, 4) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert place_contiguous(7, 3) == ((0, 1), (2, 3), (4, 5, 6))
    assert place_layers({1: 8}, {1: [5]}, 4, contiguous=True) == {1: place_contiguous(8, 4)}


def test_by_hand():
    load_E = dict(enumerate([8, 1, 1, 1, 4, 1, 1, 1]))
    assert place_by_score(load_E, (), 2) == ((0, 5, 6, 7), (1, 2, 3, 4))  # 4 each, so 11 and 7
    assert place_by_score(load_E, {1, 2}, 2) == ((0, 1, 6, 7), (2, 3, 4, 5))  # the trained ones first, though light
    held = [0, 0]
    for _ in range(2):  # a trained expert in each of two layers goes to either rank
        place_by_score(load_E, {0}, 2, held)
    assert held == [1, 1]


def test_the_same_input_gives_the_same_placement():
    load_LE, trained_L = draw(0, 64, layers=4)
    shuffled_LE = {la: dict(random.Random(1).sample(list(load_E.items()), 64)) for la, load_E in load_LE.items()}
    placements = place_layers(dict.fromkeys(load_LE, 64), trained_L, 8, load_LE)
    assert (
        place_layers(dict.fromkeys(load_LE, 64), {la: ids[::-1] for la, ids in trained_L.items()}, 8, shuffled_LE)
        == placements
    )
    assert place_layers(dict.fromkeys(load_LE, 64), trained_L, 8, draw(1, 64, layers=4)[0]) != placements


@pytest.mark.parametrize("seed", range(5))
def test_load_is_evener_than_in_blocks(seed):
    load_LE, trained_L = draw(seed, 64, layers=10)
    for layer in load_LE:
        load, trained, num_experts = {layer: load_LE[layer]}, {layer: trained_L[layer]}, {layer: 64}
        scored, blocks = (
            imbalance(place_layers(num_experts, trained, 8, load, c), trained, load) for c in (False, True)
        )
        assert 1 <= scored["load"] <= blocks["load"]


def test_without_scores_only_trained_experts_count():
    trained_L = {1: [0, 1, 2], 2: [5], 3: []}
    placements = place_layers(dict.fromkeys(trained_L, 8), trained_L, 4)
    even = {layer: dict.fromkeys(range(8), 1.0) for layer in trained_L}
    assert imbalance(placements, trained_L, even) == {"load": 1, "load_worst": 1, "trained": 1}


def test_imbalance_by_hand():
    placements = {1: ((0, 1), (2, 3)), 2: ((0, 3), (1, 2))}
    load_LE = {1: {0: 3, 1: 3, 2: 1, 3: 1}, 2: {0: 1, 1: 1, 2: 1, 3: 1}}
    found = imbalance(placements, {1: [0, 2], 2: [0, 3]}, load_LE)
    assert found == {"load": 1.25, "load_worst": 1.5, "trained": 1.5}  # 6 of 8 / 2, 2 of 4 / 2; 3 of 4 / 2
    nothing = {layer: dict.fromkeys(range(4), 0) for layer in (1, 2)}
    assert imbalance(placements, {}, nothing) == {"load": 1, "load_worst": 1, "trained": 1}


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"ep_size=9: layer 2 has 8 experts\. Lower ep_size"):
        place_layers({1: 64, 2: 8}, {}, 9)
    even = dict.fromkeys(range(8), 0.125)
    for wrong in ({}, {2: even}, {1: {0: 1.0}}, {1: {**even, 8: 0.1}}, {1: dict.fromkeys(range(1, 9), 0.125)}):
        for contiguous in (False, True):
            with pytest.raises(ValueError, match=r"have no, or other, experts of layer 1.*another model"):
                place_layers({1: 8}, {}, 2, wrong, contiguous)


def test_released_scores(official):
    load_LE = esft.ExpertScores.load(official / "intent" / "expert_scores")["token"]
    trained_L = esft.ExpertConfig.load(official / "intent" / "expert_config.json").experts
    num_experts_L = {layer: len(load_E) for layer, load_E in load_LE.items()}
    assert set(num_experts_L.values()) == {64}
    scored, blocks = (
        imbalance(place_layers(num_experts_L, trained_L, 8, load_LE, contiguous), trained_L, load_LE)
        for contiguous in (False, True)
    )
    assert scored["load"] <= scored["load_worst"] <= 1.03 and scored["trained"] <= 1.04
    assert blocks["load"] >= 1.39 and blocks["load_worst"] > 1.5 and blocks["trained"] > 1.2
