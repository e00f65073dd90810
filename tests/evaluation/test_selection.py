"""Stability, overlap, controls, previews and drift: against counts by hand, exact chances, and what must not change."""

import itertools
import json
import math
import random
import sys

import pytest
import torch

from deepseek.routing import RouterCounts
from deepseek.selection import rank, spread
from esft import (
    ExpertConfig,
    ExpertScores,
    adapter_views,
    add_adapter,
    load_tokenizer,
    save_adapter,
    select_experts,
    to_esft,
    unload,
)
from evaluation.expert_scoring import SampleSettings, count_routing, sample_packs
from evaluation.selection import (
    PACKS_NAME,
    PackCounts,
    bootstrap_counts,
    bootstrap_selections,
    correlation,
    drift,
    expected_jaccard,
    jaccard,
    moved,
    overlap,
    routed,
    select_cumulative,
    short_name,
    split_draws,
    stability,
    union_of,
)
from scripts.expert import compare_scores, generate_expert_config, get_expert_scores, preview_config, routing_drift
from tests.helpers import make_model, refused, scores_of
from training.memory import Estimator, MemorySettings
from utils import PYTHON

K, L, E = 3, 2, 12


def make_packs(P: int, noise: float, seed: int = 0, length: int = 40) -> PackCounts:
    """P packs whose tokens choose experts by fixed odds, which a pack changes by factors up to exp(noise)."""
    rng = random.Random(seed)
    odds = [[rng.random() ** 3 + 0.01 for _ in range(E)] for _ in range(L)]
    counts = []
    for _ in range(P):
        slots, gates = [], []
        for layer in range(L):
            weights = [w * math.exp(rng.uniform(-noise, noise)) for w in odds[layer]]
            chosen = rng.choices(range(E), weights, k=K * length)
            slots.append([chosen.count(e) for e in range(E)])
            gates.append([round(n * (0.5 + 0.1 * e) * RouterCounts.UNIT / 8) for e, n in enumerate(slots[-1])])
        sums = {"slots": torch.tensor(slots), "gates": torch.tensor(gates)}
        counts.append(RouterCounts(K, length, list(range(1, L + 1)), sums))
    return PackCounts.of(counts)


def call(main, *argv) -> dict:
    return main([str(arg) for arg in argv])


# ---------------------------------------------------------------------------------------------------- counts by pack


def test_pack_counts_add_up_and_survive_the_file(tmp_path):
    packs = make_packs(5, 1.0)
    packs.save(tmp_path / PACKS_NAME)
    scores = ExpertScores.from_counts(packs.total())
    scores.save(tmp_path / "summary.json")
    again = PackCounts.load(tmp_path)
    assert again.layers == [1, 2] and len(again) == 5
    assert all(torch.equal(again.sums[kind], packs.sums[kind]) for kind in packs.sums)
    assert packs.total().sums["slots"][0, 3] == sum(int(packs.sums["slots"][p, 0, 3]) for p in range(5))

    make_packs(5, 1.0, seed=1).save(tmp_path / PACKS_NAME)
    with pytest.raises(ValueError, match="has other scores"):
        PackCounts.load(tmp_path)
    (tmp_path / PACKS_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"cannot read the counts of packs in .*{PACKS_NAME}"):
        PackCounts.load(tmp_path)
    (tmp_path / PACKS_NAME).unlink()
    with pytest.raises(ValueError, match=r"no such file\. Score.*get_expert_scores\.py"):
        PackCounts.load(tmp_path)


def test_released_logs_are_packs(official):
    folder = official / "intent" / "expert_scores"
    packs = PackCounts.load(folder)
    lines = (folder / "expert_weights_17.txt").read_text().splitlines()
    assert len(packs) == len(lines) and packs.layers == [1, 17, 26]
    assert int(packs.sums["slots"][3, 1].sum()) == len(lines[3].split("\t\t")[0].split("\t")) == 6 * packs.tokens_P[3]
    released = ExpertScores.load(folder)
    scores = ExpertScores.from_counts(packs.total())
    assert all(scores[f][layer] == released[f][layer] for f in ("token", "gate") for layer in packs.layers)


# --------------------------------------------------------------------------------------------------------- stability


def test_the_cut_of_many_tables_is_that_of_select_experts():
    rng = random.Random(0)
    for _ in range(60):
        rows = [[rng.randint(0, 6) for _ in range(E)] for _ in range(L)]
        rows = [[round(x / (sum(row) or 1), 4) if sum(row) else 1 / E for x in row] for row in rows]
        top_p = rng.choice([0.05, 0.2, 0.5, 0.9, 1.0])
        config = select_experts(scores_of(rows), top_p=top_p)
        found = select_cumulative(torch.tensor([rows] * 2, dtype=torch.float64), top_p)
        for sets_LE in found:
            assert {la: set(sets_LE[la].nonzero().flatten().tolist()) for la in range(L)} == {
                la: set(ids) for la, ids in config.experts.items()
            }


@pytest.mark.parametrize("function", ["token", "gate"])
def test_a_draw_is_selected_on_as_its_packs_would_be_alone(function):
    packs = make_packs(9, 1.5)
    times_BP = bootstrap_counts(9, 9, 20, seed=1)
    assert (times_BP.sum(1) == 9).all() and times_BP.max() > 1
    found = bootstrap_selections(packs, times_BP, function, 0.3)
    for times_P, sets_LE in zip(times_BP, found):
        chosen = [p for p, n in enumerate(times_P.int().tolist()) for _ in range(n)]
        some = PackCounts(K, packs.layers, packs.tokens_P[chosen], {k: v[chosen] for k, v in packs.sums.items()})
        config = select_experts(ExpertScores.from_counts(some.total()), score_function=function, top_p=0.3)
        assert [sorted(ids) for ids in config.experts.values()] == [row.nonzero().flatten().tolist() for row in sets_LE]


def test_a_draw_rounds_as_the_scores_do():
    slots = torch.tensor([[[10000, 10001, 29999, 50000]]])  # 0.1 and 0.1: a tie, which the lower id wins
    packs = PackCounts(1, [1], torch.tensor([100000]), {"slots": slots, "gates": slots})
    assert bootstrap_selections(packs, torch.ones(1, 1), "token", 0.85)[0].tolist() == [[True, False, True, True]]


def test_equal_packs_are_certain_and_noisy_ones_are_not():
    one = make_packs(1, 0.0)
    same = PackCounts(K, one.layers, one.tokens_P.repeat(16), {k: v.repeat(16, 1, 1) for k, v in one.sums.items()})
    found = stability(same, "token", 0.4, draws=50)
    assert found["jaccard"] == 1 and not found["uncertain"] and found["jaccard_ci95"] == [1, 1]
    assert {x for row in found["frequency"].values() for x in row} == {0.0, 1.0}
    assert [row["jaccard_with_other_packs"] for row in found["growth"]] == [1, 1, 1, 1, None]

    noisy = stability(make_packs(32, 3.0), "token", 0.4, draws=300)
    assert noisy["jaccard"] < 0.95 and noisy["uncertain"] and noisy["jaccard"] > noisy["random_jaccard"]
    unsure = {
        (la, e): share for la, row in noisy["frequency"].items() for e, share in enumerate(row) if 0.05 < share < 0.95
    }
    assert {(la, e): share for la, e, share in noisy["uncertain"]} == unsure
    growth = [row["jaccard_with_all"] for row in noisy["growth"]]
    assert growth[0] < growth[2] < growth[4] and noisy["growth"][-1]["packs"] == 32
    assert stability(make_packs(32, 3.0), "token", 0.4, draws=300) == noisy
    with pytest.raises(ValueError, match="cannot draw packs again"):
        stability(one, "token", 0.4)


def test_two_samples_of_packs_share_none():
    first, second = split_draws(11, 5, 30, seed=0)
    assert ((first + second) <= 1).all() and (first.sum(1) == 5).all() and (second.sum(1) == 5).all()


# ----------------------------------------------------------------------------------------------------------- overlap


def test_the_expected_overlap_is_that_of_all_pairs_of_sets():
    sizes = [(2, 3, 5), (1, 2, 4)]
    layers = [
        [len(set(a) & set(b)) for a in itertools.combinations(range(n), x) for b in itertools.combinations(range(n), y)]
        for x, y, n in sizes
    ]
    values = [(i + j) / (8 - i - j) for i in layers[0] for j in layers[1]]
    mean, low, high = expected_jaccard(sizes)
    values.sort()
    assert mean == pytest.approx(sum(values) / len(values))
    assert (low, high) == (values[int(0.025 * len(values))], values[int(0.975 * len(values))])
    assert expected_jaccard([(3, 3, 3)]) == (1, 1, 1) and expected_jaccard([(2, 0, 5)]) == (0, 0, 0)


def test_overlap_and_correlation_by_hand():
    a, b = ExpertConfig({0: (0, 1), 1: (2,)}), ExpertConfig({0: (1, 2), 1: (2,)})
    pairs = overlap([a, b], {0: 4, 1: 4})
    assert pairs[0][0]["jaccard"] == 1 and pairs[0][1]["shared"] == 2 and pairs[1][0]["jaccard"] == 0.5
    sets = [torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]).bool(), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 0]]).bool()]
    assert jaccard(*sets) == 0.5
    x = {0: {0: 0.1, 1: 0.5, 2: 0.4}, 1: {0: 9.0, 1: 9.4, 2: 9.3}}
    shifted = {la: {e: 5 + 2 * s for e, s in row.items()} for la, row in x.items()}
    mirrored = {la: {e: -s for e, s in row.items()} for la, row in x.items()}
    assert correlation(x, shifted) == pytest.approx(1) and correlation(x, mirrored) == pytest.approx(-1)
    assert math.isnan(correlation(x, {la: dict.fromkeys(row, 0.3) for la, row in x.items()}))


def test_names_of_paths():
    assert short_name("results/expert_scores/law/") == short_name("results/expert_scores/law/summary.json") == "law"
    assert short_name("shared/intent/expert_scores") == "intent" and short_name("a/law.json") == "law"


# --------------------------------------------------------------------------------------------------- the two commands


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, tiny_model_dir):
    """Two folders of scores, of one and of two processes, and the data of the first."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for task, words in (("a", ["what", "is", "it"]), ("b", ["0", "12", "345", "no"])):
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(80)]
        rows = [
            [{"role": "user", "content": x}, {"role": "assistant", "content": y}] for x, y in itertools.pairwise(texts)
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
        flags = ["--n_sample_tokens", 2000, "--seq_length", 128, "--device", "cpu"]
        call(get_expert_scores.main, "--eval_dataset", folder / f"{task}.jsonl", "--model", tiny_model_dir,
             "--output_dir", folder / task, *flags)  # fmt: skip
    return folder


def test_packs_are_written_beside_the_scores(tasks, tiny_model_dir):
    packs, scores = PackCounts.load(tasks / "a"), ExpertScores.load(tasks / "a")
    assert len(packs) == scores.meta["packs"] > 8 and int(packs.tokens_P.sum()) == scores.meta["tokens"]
    assert ExpertScores.from_counts(packs.total()).by_function == scores.by_function


def test_compare_one(tasks, tmp_path, capsys):
    found = call(compare_scores.main, "--expert_scores_dir", tasks / "a", "--n_bootstrap", 50, "--top_p", 0.4)
    text = capsys.readouterr().out
    assert f"Jaccard {found['jaccard']:.3f}" in text and "1/16" in text and "with as many others" in text
    expected = select_experts(ExpertScores.load(tasks / "a"), top_p=0.4).experts
    assert {layer: tuple(ids) for layer, ids in found["selected"].items()} == expected
    call(compare_scores.main, "--expert_scores_dir", tasks / "a", "--n_bootstrap", 50, "--top_p", 0.4, "--json")
    assert json.loads(capsys.readouterr().out)["jaccard"] == found["jaccard"]
    (tmp_path / "summary.json").write_text((tasks / "a/summary.json").read_text())
    for flags, words in (
        ([tmp_path], [PACKS_NAME, "get_expert_scores.py"]),
        ([tmp_path / "nowhere"], ["nowhere"]),
        ([tasks / "a", "--score_function", "prob"], ["score 'prob'"]),
        ([tasks / "a", "--top_p", 2], ["top_p is 2"]),
        ([tasks / "a", "--n_bootstrap", 9, "--output_path", tmp_path / "x.txt"], ["no such kind of picture", ".png"]),
    ):
        refused(capsys, compare_scores.main, ["--expert_scores_dir", *flags], *words)


def test_compare_several(tasks, tmp_path, capsys):
    config = select_experts(ExpertScores.load(tasks / "a"), top_p=0.4)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    argv = ["--expert_scores_dir", tasks / "a", tasks / "b", tmp_path / "c.json", "--top_p", 0.4]
    found = call(compare_scores.main, *argv)
    text = capsys.readouterr().out
    assert found["overlap"][0][2]["jaccard"] == 1 and found["overlap"][0][1]["jaccard"] < 1
    assert found["correlation"][0][0] == pytest.approx(1) and found["correlation"][0][2] is None
    assert -1 < found["correlation"][0][1] < 1
    assert found["correlation"][0][1] == pytest.approx(found["correlation"][1][0])
    assert f"{found['overlap'][0][1]['jaccard']:.3f} ({found['overlap'][0][1]['random_jaccard']:.3f})" in text
    same = ["--expert_scores_dir", tmp_path / "c.json", tmp_path / "c.json"]
    refused(capsys, compare_scores.main, same, "--num_experts")
    assert call(compare_scores.main, *same, "--num_experts", 8)["overlap"][0][1]["jaccard"] == 1
    refused(capsys, compare_scores.main, [*argv, "--num_experts", 9], "a: it is not of a model with 9 experts")
    (tmp_path / "d.json").write_text('{"experts": {"7": [1]}}')
    refused(capsys, compare_scores.main, ["--expert_scores_dir", tasks / "a", tmp_path / "d.json"], "compare", "d.json")
    (tmp_path / "d.json").write_text('{"experts": {"1": [8]}}')
    refused(capsys, compare_scores.main, ["--expert_scores_dir", tasks / "a", tmp_path / "d.json"], "compare", "d.json")


def test_pictures(tasks, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    for name, sources in (("one", [tasks / "a"]), ("two", [tasks / "a", tasks / "b"])):
        argv = ["--expert_scores_dir", *sources, "--n_bootstrap", 20, "--output_path", tmp_path / f"{name}.png"]
        call(compare_scores.main, *argv)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(capsys, compare_scores.main, [*argv[:-1], tmp_path / "no.png"], "matplotlib")
    assert not (tmp_path / "no.png").exists()


# --------------------------------------------------------------------------------------------- unions and controls


def test_a_union_holds_all_by_best_rank_whatever_the_order():
    a, b = ExpertConfig({1: (5, 2, 7), 2: (0,)}), ExpertConfig({1: (2, 9), 2: (3, 0)})
    assert union_of([a, b]).experts == {1: (2, 5, 9, 7), 2: (0, 3)}
    assert union_of([a, b]) == union_of([b, a]) and union_of([a, a]) == a


def test_a_uniform_control_has_as_many_in_all():
    rng = random.Random(0)
    for _ in range(30):
        before = {la: rng.randint(1, E) for la in range(5)}
        counts = spread(before, range(5))
        assert sum(counts.values()) == sum(before.values())
        assert max(counts.values()) - min(counts.values()) <= 1 and max(counts.values()) <= E


def test_unions_and_controls_by_command(tasks, tmp_path, capsys, tiny_model_dir):
    every = [ExpertScores.load(tasks / task) for task in "ab"]

    def generate(*flags) -> dict:
        call(generate_expert_config.main, "--output_path", tmp_path / "c.json", "--top_p", 0.4, *flags)
        return json.loads((tmp_path / "c.json").read_text())

    both = ["--expert_scores_dir", f"{tasks / 'a'},{tasks / 'b'}"]
    data = generate(*both, "--eval_dataset", "a,b", "--model", tiny_model_dir)
    assert "| layer | experts | of | score on a | score on b | ids, best first |" in capsys.readouterr().out
    config = ExpertConfig.load(tmp_path / "c.json")
    assert config == union_of([select_experts(scores, top_p=0.4) for scores in every])
    assert [task["dataset"] for task in data["meta"]["union_of"]] == ["a", "b"] and data["meta"]["top_p"] == 0.4
    sizes = {layer: len(ids) for layer, ids in config.experts.items()}
    assert generate(*both, "--strategy", "random", "--seed", 1)["meta"]["seed"] == 1
    drawn = ExpertConfig.load(tmp_path / "c.json").experts
    assert {layer: len(ids) for layer, ids in drawn.items()} == sizes and drawn != config.experts
    uniform = generate(*both, "--strategy", "uniform")["experts"]
    assert sum(map(len, uniform.values())) == sum(sizes.values())

    one = ["--expert_scores_dir", tasks / "a"]
    assert "meta" not in generate(*one)  # the released form
    generate(*one, "--strategy", "random", "--seed", 3)
    expected = select_experts(every[0], strategy="random", top_p=0.4, seed=3)
    assert ExpertConfig.load(tmp_path / "c.json") == expected
    uniform = generate(*one, "--strategy", "uniform")["experts"]
    ranked = rank(every[0]["token"])
    assert all(ids == ranked[int(layer)][: len(ids)] for layer, ids in uniform.items())

    (tmp_path / "c.json").unlink()
    other = {f"layer_{la}_expert_{e}": 1 for la in (1, 2) for e in range(9)}
    (tmp_path / "other.json").write_text(json.dumps(other))
    out = ["--output_path", tmp_path / "c.json"]
    refused(
        capsys,
        generate_expert_config.main,
        [*both, *out, "--eval_dataset", "a"],
        "--eval_dataset has 1, --expert_scores_dir 2",
    )
    mixed = ["--expert_scores_dir", f"{tasks / 'a'},{tmp_path / 'other.json'}"]
    refused(capsys, generate_expert_config.main, [*mixed, *out], "other layers or experts than")
    assert not (tmp_path / "c.json").exists()


# ----------------------------------------------------------------------------------------------------------- preview


def preview(tasks, model_dir, *flags) -> dict:
    argv = ["--expert_scores_dir", tasks / "a", "--model", model_dir, "--seq_length", 64, "--device", "cpu"]
    return call(preview_config.main, *argv, "--dtype", "float32", *flags)


def test_a_preview_has_the_figures_of_the_config(tasks, tiny_model_dir, capsys):
    result = preview(tasks, tiny_model_dir, "--top_p", 0.3, 0.9)
    assert [(row["score_function"], row["top_p"]) for row in result["rows"]] == [
        (function, p) for function in ("token", "gate") for p in (0.3, 0.9)
    ]
    model, scores = make_model(), ExpertScores.load(tasks / "a")
    for row in result["rows"]:
        config = select_experts(scores, score_function=row["score_function"], top_p=row["top_p"])
        trained = sum(view.numel() for view in adapter_views(model, config).values())
        assert row["trained_parameters"] == trained and row["adapter_bytes"] == 2 * trained
        assert row["share"] == pytest.approx(trained / sum(p.numel() for p in model.parameters()))
        assert (row["gradient_bytes"], row["optimizer_bytes"]) == (4 * trained, 8 * trained)
        settings = MemorySettings(seq_length=64, dtype="float32", device="cpu")
        assert row["peak_bytes"] == Estimator(model, "esft", config).estimate(settings).peak
        assert 0.5 < row["relative_step_time"] < 1
    few, many = result["rows"][:2]
    assert few["relative_step_time"] < many["relative_step_time"] and few["peak_bytes"] < many["peak_bytes"]
    assert few["peak_bytes"] < result["full_peak_bytes"]
    assert "of full" in capsys.readouterr().out


def test_step_time_by_hand(tasks):
    """Two MoE layers above a dense one: the head and layers 1 and 2 are differentiated, layer 0 is not."""
    model, scores = make_model(), ExpertScores.load(tasks / "a")
    config = ExpertConfig({1: (0, 1), 2: (3,)})
    expert, top_k = 3 * 32 * 16, 3
    dense = {la: sum(p.numel() for n, p in model.model.layers[la].named_parameters() if p.ndim == 2) for la in range(3)}
    forward = sum(dense.values()) + model.lm_head.weight.numel() + 2 * top_k * expert
    rows = scores["token"][1][0] + scores["token"][1][1] + scores["token"][2][3]
    saved = 2 * forward - dense[0] + top_k * expert * rows
    assert preview_config.relative_time(model, scores, config, False) == pytest.approx(saved / (3 * forward))
    assert preview_config.relative_time(model, scores, config, True) == pytest.approx((saved + forward) / (4 * forward))
    upper = preview_config.relative_time(model, scores, ExpertConfig({2: (3,)}), False)
    assert upper < preview_config.relative_time(model, scores, config, False)


@pytest.mark.slow
def test_the_budget_is_used_up_and_kept(tasks, tiny_model_dir, capsys, tmp_path):
    rows = preview(tasks, tiny_model_dir, "--top_p", 0.3, 0.9)["rows"]
    budget = (rows[0]["peak_bytes"] + rows[1]["peak_bytes"]) // 2
    result = preview(tasks, tiny_model_dir, "--top_p", 0.3, "--budget_gb", budget / 2**30)
    found = result["budget"]["largest"]["token"]
    assert found["peak_bytes"] <= result["budget"]["bytes"] and 0.3 <= found["top_p"] < 0.9
    more = preview(tasks, tiny_model_dir, "--top_p", found["top_p"] + 0.01)["rows"][0]
    assert more["peak_bytes"] > result["budget"]["bytes"]
    command = result["budget"]["commands"]["token"].split()
    assert command[:2] == [PYTHON, "scripts/expert/generate_expert_config.py"]
    call(generate_expert_config.main, *command[2:], f"--output_path={tmp_path / 'c.json'}")
    written = ExpertConfig.load(tmp_path / "c.json").experts
    assert sum(map(len, written.values())) == found["experts"]
    argv = ["--expert_scores_dir", tasks / "a", "--model", tiny_model_dir, "--device", "cpu"]
    refused(capsys, preview_config.main, [*argv, "--budget_gb", 1e-6, "--top_p", 0.2], "cannot fit any top_p")
    refused(capsys, preview_config.main, [*argv, "--top_p", 0], "top_p is 0")
    make_model(n_routed_experts=9).save_pretrained(tmp_path / "nine")
    nine = [*argv[:2], "--model", tmp_path / "nine"]
    refused(capsys, preview_config.main, nine, "other layers or experts than the base model")


# ------------------------------------------------------------------------------------------------------------- drift


def test_drift_by_hand():
    before = routed(torch.tensor([[0, 1], [0, 2]]), torch.ones(2, 2), 4)
    after = routed(torch.tensor([[1, 0], [0, 3]]), torch.ones(2, 2), 4)  # the order of a token's experts is nothing
    assert drift(moved(before, after), [0, 3]) == {
        "total_variation": 0.25, "changed": 0.25, "trained_before": 0.5, "trained_after": 0.75
    }  # fmt: skip
    swapped = drift(moved(before, before.flip(0)), [0])  # tokens trade places: slots change, the load does not
    assert swapped["total_variation"] == 0 and swapped["changed"] == 0.5
    skipped = routed(torch.tensor([[1, 0], [0, 0]]), torch.tensor([[0.7, 0.0], [0.7, 0.0]]), 4)
    assert skipped.tolist() == [[False, True, False, False], [True, False, False, False]]


@pytest.fixture(scope="module")
def adapter(tasks, tiny_tokenizer, tmp_path_factory):
    """Layer 1's expert that most of the tokens go to, changed; with it, a whole model and a folder without change."""
    folder, model = tmp_path_factory.mktemp("adapters"), make_model()
    scores = ExpertScores.load(tasks / "a")["token"]
    config = ExpertConfig({1: (max(scores[1], key=scores[1].get),), 2: (0,)})
    to_esft(model, config)
    save_adapter(model, folder / "same")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.trained.down_proj.mul_(-4)
    save_adapter(model, folder / "changed")
    unload(model)
    add_adapter(model, folder / "changed").save_pretrained(folder / "whole")
    tiny_tokenizer.save_pretrained(folder / "whole")
    return folder


def drift_of(tasks, model_dir, adapter_dir, output, *flags) -> dict:
    argv = [
        "--model",
        model_dir,
        "--adapter_dir",
        adapter_dir,
        "--eval_dataset",
        tasks / "a.jsonl",
        "--seq_length",
        128,
    ]
    return call(routing_drift.main, *argv, "--output_dir", output, "--device", "cpu", "--n_sample_tokens", 1000, *flags)


def test_routing_drifts_above_what_was_changed_and_nowhere_else(tasks, tiny_model_dir, adapter, tmp_path, capsys):
    result = drift_of(tasks, tiny_model_dir, adapter / "changed", tmp_path)
    first, second = result["layers"][1], result["layers"][2]
    assert first["changed"] == first["total_variation"] == 0 and first["trained_before"] == first["trained_after"]
    assert second["changed"] >= second["total_variation"] > 0.01
    assert json.loads((tmp_path / "drift.json").read_text())["layers"]["2"] == second
    assert result["mean"]["changed"] == pytest.approx(second["changed"] / 2)
    assert f"{second['changed']:.1%}" in capsys.readouterr().out

    settings = SampleSettings(str(tasks / "a.jsonl"), n_sample_tokens=1000, seq_length=128)
    packs, shares = sample_packs(settings, load_tokenizer(tiny_model_dir)), []
    for model in (make_model(), add_adapter(make_model(), adapter / "changed")):  # as scoring counts
        slots_E = PackCounts.of(list(count_routing(model, packs))).total().sums["slots"][1]
        shares.append(float(slots_E[0] / slots_E.sum()))
    assert [second["trained_before"], second["trained_after"]] == pytest.approx(shares) and shares[0] != shares[1]

    same = drift_of(tasks, tiny_model_dir, adapter / "same", tmp_path / "same")
    assert same["mean"]["changed"] == same["mean"]["total_variation"] == 0


def test_a_whole_model_drifts_as_its_adapter(tasks, tiny_model_dir, adapter, tmp_path):
    result = drift_of(tasks, tiny_model_dir, adapter / "changed", tmp_path / "a")
    whole = drift_of(tasks, tiny_model_dir, adapter / "whole", tmp_path / "b")
    assert whole["layers"][2]["changed"] == result["layers"][2]["changed"] and whole["mean"]["trained_after"] is None
    pictures = list(tmp_path.glob("*/drift.png"))
    pytest.importorskip("matplotlib")
    assert len(pictures) == 2


def test_drift_on_evaluation_data_and_its_refusals(tasks, tiny_model_dir, adapter, tmp_path, capsys):
    data = tmp_path / "eval.jsonl"
    data.write_text('{"prompt": "what is it", "answers": ["12"]}\n{"prompt": "no", "raw_answers": ["yes", "x"]}\n')
    flags = ["--eval_dataset", data, "--split", "eval"]
    assert drift_of(tasks, tiny_model_dir, adapter / "changed", tmp_path / "out", *flags)["tokens"] > 10
    base = ["--model", tiny_model_dir, "--output_dir", tmp_path / "no", "--device", "cpu", "--seq_length", 128]
    base += ["--eval_dataset", tasks / "a.jsonl", "--adapter_dir"]
    refused(capsys, routing_drift.main, [*base, tmp_path / "nowhere"], "nowhere")
    refused(capsys, routing_drift.main, [*base, tasks / "a"], "expert scores")
    refused(capsys, routing_drift.main, [*base, adapter / "same", "--split", "eval"], "a.jsonl:1", "prompt")
    make_model(n_routed_experts=9).save_pretrained(tmp_path / "nine")
    refused(capsys, routing_drift.main, [*base, tmp_path / "nine"], "not in both, or has another shape")
    assert not (tmp_path / "no").exists()
