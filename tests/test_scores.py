"""Test routing counts against the router's logits, published scores and configs, and every refusal."""

import json
import math
import random
import shutil

import pytest
import torch
from transformers import Qwen3MoeConfig

from deepseek.routing import RouterCounts, read_logs
from esft import ExpertConfig, ExpertScores, RouterCapture, select_experts
from scripts.expert import generate_expert_config
from tests.helpers import FAMILIES, make_model, refused, scores_of


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def count(model, prob=False, mask=None, **inputs) -> RouterCounts:
    with RouterCapture(model, prob) as capture:
        capture.token_mask = mask
        model(**inputs)
    return capture.counts()


def equal(a: RouterCounts, b: RouterCounts) -> bool:
    same = all(torch.equal(a.sums[kind], b.sums[kind]) for kind in a.sums | b.sums)
    return same and (a.top_k, a.tokens, a.layers) == (b.top_k, b.tokens, b.layers)


# ------------------------------------------------------------------------------------------------------- counting


@torch.no_grad()
def test_counts_are_the_top_k_of_the_router_logits():
    model, ids = make_model("qwen3_moe"), tokens()
    logits_L = model(input_ids=ids, output_router_logits=True).router_logits
    counts = count(model, prob=True, input_ids=ids)
    assert (counts.tokens, counts.top_k) == (24, 3)
    assert isinstance(model.config, Qwen3MoeConfig) and not model.config.norm_topk_prob
    for layer, logits_TE in enumerate(logits_L):
        probs_TE = logits_TE.float()
        if not torch.allclose(probs_TE.sum(-1), torch.ones(24)):
            probs_TE = probs_TE.softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(3)
        gates_E = torch.zeros(8).scatter_add(0, ids_TK.flatten(), weights_TK.flatten())
        assert torch.equal(counts.sums["slots"][layer], ids_TK.flatten().bincount(minlength=8))
        torch.testing.assert_close(counts.sums["gates"][layer] / RouterCounts.UNIT, gates_E)
        torch.testing.assert_close(counts.sums["probs"][layer] / RouterCounts.UNIT, probs_TE.sum(0))

    router = model.model.layers[1].mlp.gate
    router.weight.copy_(router.weight.flip(0))
    before, after = counts.sums["slots"], count(model, input_ids=ids).sums["slots"]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1].flip(0)) and not torch.equal(after[1], before[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_counted_without_its_head(family):
    model, ids = make_model(family), tokens()
    whole, decoder = count(model, input_ids=ids), count(model.base_model, input_ids=ids)
    assert model.base_model is not model and equal(whole, decoder)
    assert (whole.sums["slots"].sum(1) == 24 * 3).all()
    ExpertScores.from_counts(whole)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_counted(tiny_model, left):
    short, long = tokens(1, 7, seed=1), tokens(1, 12, seed=2)
    apart = count(tiny_model, input_ids=short) + count(tiny_model, input_ids=long)
    gap = torch.full((1, 5), 2)
    row = torch.cat([gap, short] if left else [short, gap], 1)
    ids, mask = torch.cat([row, long]), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = mask[0, :5] * (not left)
    mask[0, 7:] = mask[0, 7:] * left
    padded = count(tiny_model, input_ids=ids, attention_mask=mask)
    assert padded.tokens == apart.tokens and torch.equal(padded.sums["slots"], apart.sums["slots"])
    torch.testing.assert_close(padded.sums["gates"].double(), apart.sums["gates"].double(), rtol=1e-4, atol=0)
    assert count(tiny_model, input_ids=ids).tokens == 24
    with RouterCapture(tiny_model) as capture, torch.no_grad():
        tiny_model(ids, mask)  # by position
    assert equal(capture.counts(), padded)


def test_token_mask_counts_exactly_what_it_names(tiny_model):
    ids, mask = tokens(), torch.zeros(2, 12, dtype=torch.bool)
    mask[0, 3] = mask[1, 5:9] = True
    assert count(tiny_model, mask=mask, input_ids=ids).tokens == 5
    halves = [count(tiny_model, mask=half, input_ids=ids) for half in (mask, ~mask)]
    assert equal(halves[0] + halves[1], count(tiny_model, input_ids=ids))
    with pytest.raises(RuntimeError, match=r"size of tensor a \(12\) must match the size of tensor b \(24\)"):
        count(tiny_model, mask=mask[0], input_ids=ids)


def test_a_layer_that_never_fires_and_nan_weights_are_errors(tiny_model):
    tiny_model.model.layers[2].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"layer 2: .* saw 0 of 24 tokens"):
        count(tiny_model, input_ids=tokens())
    model = make_model()
    model.model.layers[2].mlp.gate.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 2.*not finite"):
        count(model, input_ids=tokens())


def test_hooks_leave_nothing_behind(tiny_model):
    count(tiny_model, input_ids=tokens())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_model.modules())


def test_counts_add_exactly_in_any_order(tiny_model):
    parts = [count(tiny_model, prob=True, input_ids=tokens(1, 20, seed)) for seed in range(5)]

    def total(order: list[int]) -> RouterCounts:
        result = parts[order[0]]
        for i in order[1:]:
            result += parts[i]
        return result

    assert equal(total([0, 1, 2, 3, 4]), total([3, 0, 4, 2, 1]))
    assert total([0, 1, 2, 3, 4]).tokens == 100
    other = count(make_model(num_experts_per_tok=2), input_ids=tokens())
    with pytest.raises(AssertionError, match="different models"):
        parts[0] + other


# ------------------------------------------------------------------------------------------------------ selection


def test_cumulative_is_the_shortest_prefix_that_reaches_top_p():
    rng = random.Random(0)
    for _ in range(100):
        E, top_p = rng.randint(1, 80), rng.choice([0.05, 0.2, 0.5, rng.random() + 1e-9])
        raw = [rng.random() ** 3 for _ in range(E)]
        row = [x / sum(raw) for x in raw]
        ids = select_experts(scores_of([row]), top_p=top_p).experts[0]
        assert list(ids) == sorted(range(E), key=lambda e: (-row[e], e))[: len(ids)]
        taken = [row[e] for e in ids]
        assert math.fsum(taken) >= min(top_p, 1) - 1e-9 and math.fsum(taken[:-1]) < top_p


def test_ties_go_to_the_lower_id_and_the_sum_is_tested_before():
    scores = scores_of([[0.125, 0.25, 0.125, 0.25, 0.25]])
    assert select_experts(scores, top_p=0.5).experts == {0: (1, 3)}
    assert select_experts(scores, top_p=0.51).experts == {0: (1, 3, 4)}
    assert select_experts(scores, top_p=1.0).experts == {0: (1, 3, 4, 0, 2)}


def test_other_strategies():
    rng = random.Random(1)
    rows = [[x / 10 for x in rng.sample([1, 2, 3, 4] + [0] * 21, 25)] for _ in range(4)]
    scores = scores_of(rows)
    cumulative = select_experts(scores, top_p=0.6).experts
    control = select_experts(scores, strategy="random", top_p=0.6, seed=1)
    assert {layer: len(ids) for layer, ids in control.experts.items()} == {la: len(i) for la, i in cumulative.items()}
    assert control.experts != cumulative and control == select_experts(scores, strategy="random", top_p=0.6, seed=1)
    assert control != select_experts(scores, strategy="random", top_p=0.6, seed=2)
    topk = select_experts(scores, strategy="topk", top_k=2).experts
    assert all(ids == cumulative[layer][:2] for layer, ids in topk.items())
    for fraction, expected in ((0.28, 7), (0.281, 8), (0.01, 1), (1.0, 25)):  # 0.28 * 25 is 7.000000000000001
        chosen = select_experts(scores, strategy="fraction", fraction=fraction).experts
        assert {len(ids) for ids in chosen.values()} == {expected}
    for wrong in ({"top_p": float("nan")}, {"top_p": 0}, {"strategy": "topk", "top_k": 26}, {"strategy": "best"}):
        with pytest.raises(ValueError):
            select_experts(scores, **wrong)


# --------------------------------------------------------------------------------------------------- published data


def generate(scores_dir, output_path, *flags) -> dict:
    argv = ["--expert_scores_dir", str(scores_dir), "--output_path", str(output_path), *flags]
    generate_expert_config.main(argv)
    return json.loads(output_path.read_text())


def test_published_summary_gives_the_published_config(official, tmp_path):
    released = json.loads((official / "intent/expert_config.json").read_text())
    assert generate(official / "intent/expert_scores", tmp_path / "c.json") == released
    assert generate(official / "intent/expert_scores/summary.json", tmp_path / "c.json") == released
    assert len(released["experts"]) == 26 and ExpertConfig.load(tmp_path / "c.json").to_dict() == released


def test_published_logs_give_the_published_scores_and_config(official, tmp_path):
    source = official / "intent/expert_scores"
    released = json.loads((official / "intent/expert_config.json").read_text())["experts"]
    summary = ExpertScores.load(source)
    flat, ranks = tmp_path / "flat", tmp_path / "ranks"
    flat.mkdir()
    for path in source.glob("expert_weights_*.txt"):
        shutil.copy(path, flat)
        lines = path.read_text().splitlines(keepends=True)
        for rank in (0, 1):
            (ranks / f"rank_{rank}").mkdir(parents=True, exist_ok=True)
            (ranks / f"rank_{rank}" / path.name).write_text("".join(lines[rank::2]))
    for folder in (flat, ranks):
        scores = ExpertScores.load(folder)
        assert scores.meta["top_k"] == 6
        for function in ("token", "gate"):
            assert scores[function] == {layer: summary[function][layer] for layer in (1, 17, 26)}
    assert generate(ranks, tmp_path / "c.json")["experts"] == {layer: released[layer] for layer in ("1", "17", "26")}

    path = flat / "expert_weights_17.txt"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3].replace("\t", " ", 1), *lines[4:]]))
    with pytest.raises(ValueError, match=r"expert_weights_17\.txt:4: "):
        read_logs(flat)
    ids = lines[3].split("\t")
    path.write_text("".join([*lines[:3], "\t".join([ids[1], *ids[1:]]), *lines[4:]]))  # one token, one expert twice
    with pytest.raises(ValueError, match=r"expert_weights_17\.txt:4: .*twice"):
        read_logs(flat)


# --------------------------------------------------------------------------------------------- refusals, by command


LOG = "0\t1\t1\t2\t\t0.5\t0.2\t0.4\t0.3\n2\t0\t\t0.3\t0.2\n"  # three tokens, top-2 of three experts


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ["no summary.json", "expert_weights"]),
        ({"summary.json": ""}, ["summary.json", "not valid JSON"]),
        ({"summary.json": '{"token_scores": {"1": {"0": 0.5'}, ["summary.json", "not valid JSON"]),
        ({"summary.json": "[1]"}, ["summary.json", "an object is expected"]),
        ({"summary.json": {}}, ["summary.json", "no layer has scores"]),
        ({"summary.json": {"token_scores": {}}}, ["summary.json", "no layer has scores"]),
        ({"summary.json": {"token_scores": {"1": {"0": math.nan, "1": 1}}}}, ["layer 1, expert 0: found nan"]),
        ({"summary.json": {"token_scores": {"1": {"0": -0.5, "1": 1.5}}}}, ["layer 1, expert 0", "-0.5"]),
        ({"summary.json": {"token_scores": {"1": {"0": "a", "1": 1}}}}, ["layer 1, expert 0"]),
        ({"summary.json": {"token_scores": {"1": {"0": 0.5, "2": 0.5}}}}, ["layer 1, expert 1: found nothing"]),
        ({"summary.json": {"token_scores": {"1": {"0": 1, "-1": 0}}}}, ["layer 1", "expert -1"]),
        ({"summary.json": {"token_scores": {"1": {"0": 0.5, "1": 0.2}}}}, ["layer 1", "sum to 0.7"]),
        (
            {"summary.json": {"token_scores": {"1": {"0": 1}, "2": {"0": 1}}, "gate_scores": {"1": {"0": 1}}}},
            ["gate", "layer 2"],
        ),
        ({"summary.json": {"layer_1_expert_0": 1, "layer_1_expert_1": math.inf}}, ["layer 1, expert 1: found inf"]),
        ({"summary.json": {"layer_1_expert_0": 1, "layer_1_expert_1": -1e-9}}, ["layer 1, expert 1: found -1e-09"]),
        ({"summary.json": {"layer_1_expert_0": 0, "layer_1_expert_1": 0}}, ["layer 1", "sum to 0"]),
        ({"summary.json": {"layer_1_expert_0": "1"}}, ["summary.json", "not a summary"]),
        ({"summary.json": {"layer_1": 1}}, ["unknown key 'layer_1'"]),
        ({"expert_scores.json": {"layer_1_expert_1": 1}}, ["expert_scores.json", "layer 1, expert 0: found nothing"]),
        ({"expert_weights_1.txt": ""}, ["or line in any expert_weights"]),
        ({"expert_weights_1.txt": LOG, "expert_weights_2.txt": ""}, ["layers 1 and 2", "2 and 0 lines"]),
        ({"expert_weights_1.txt": LOG[:-8]}, ["expert_weights_1.txt:2", "truncated"]),
        ({"expert_weights_1.txt": LOG.replace("0.4", "nan")}, ["expert_weights_1.txt:1", "from 0"]),
        ({"expert_weights_1.txt": LOG.replace("0.4", "-1")}, ["expert_weights_1.txt:1", "from 0"]),
        ({"expert_weights_1.txt": LOG.replace("0", "-1", 1)}, ["expert_weights_1.txt:1", "from 0"]),
        (
            {"expert_weights_1.txt": LOG, "expert_weights_2.txt": LOG + "0\t1\t\t1\t1\n"},
            ["layers 1 and 2", "2 and 3 lines"],
        ),
        ({"rank_0/expert_weights_1.txt": LOG, "rank_1/expert_weights_2.txt": LOG}, ["layers 1 and 2"]),
    ],
)
def test_bad_scores_are_refused_by_name_and_nothing_is_written(files, words, tmp_path, capsys):
    folder = tmp_path / "scores"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    argv = ["--expert_scores_dir", folder, "--output_path", tmp_path / "out/c.json"]
    refused(capsys, generate_expert_config.main, argv, *words)
    assert not (tmp_path / "out").exists()


def test_a_folder_may_hold_flat_scores(tmp_path):
    """They count before raw logs, and summary.json before them."""
    (tmp_path / "expert_weights_1.txt").write_text(LOG)
    flat = {"layer_1_expert_0": 1234.5, "layer_1_expert_1": 4938.0, "layer_2_expert_0": 0, "layer_2_expert_1": 2}
    (tmp_path / "expert_scores.json").write_text(json.dumps(flat))
    assert ExpertScores.load(tmp_path).by_function == {"token": {1: {0: 0.2, 1: 0.8}, 2: {0: 0, 1: 1}}}
    assert generate(tmp_path, tmp_path / "c.json")["experts"] == {"1": [1], "2": [1]}
    (tmp_path / "summary.json").write_text(json.dumps({"token_scores": {"1": {"0": 1}}}))
    assert ExpertScores.load(tmp_path)["token"] == {1: {0: 1}}


def test_the_sound_log_of_the_refusals_is_read(tmp_path):
    (tmp_path / "expert_weights_1.txt").write_text(LOG)
    scores = ExpertScores.load(tmp_path)
    assert scores["token"] == {1: {0: 0.3333, 1: 0.3333, 2: 0.3333}}
    assert scores["gate"] == {1: {0: 0.2333, 1: 0.2, 2: 0.2}}


def test_selection_flags(tmp_path, capsys, tiny_model_dir):
    (tmp_path / "flat.json").write_text(
        json.dumps({f"layer_{la}_expert_{e}": 1 + e for la in (1, 2) for e in range(8)})
    )
    base = ["--expert_scores_dir", tmp_path / "flat.json", "--output_path", tmp_path / "c.json"]
    for flags, words in (
        (["--strategy", "topk"], ["cannot select by topk: it needs top_k. Give it."]),
        (["--strategy", "topk", "--top_k", 9], ["top_k is 9", "8"]),
        (["--strategy", "layers", "--upper_layers", 3], ["upper_layers is 3", "up to 2"]),
        (
            ["--strategy", "fraction", "--fraction", 0.5, "--top_p", 0.2],
            ["by fraction: it takes fraction, and not top_p. Leave that out."],
        ),
        (["--top_p", "nan"], ["top_p is nan"]),
        (["--score_function", "gate"], ["score 'gate'", "there is token"]),
        (["--score_function", "prob"], ["score 'prob'", "there is token", "--scores=prob"]),
        (["--model", tmp_path / "nowhere"], ["nowhere", "no such folder"]),
    ):
        refused(capsys, generate_expert_config.main, [*base, *flags], *words)
    assert not (tmp_path / "c.json").exists()

    flags = ["--model", tiny_model_dir, "--train_shared_experts", "--top_p", 0.3, "--eval_dataset", "law"]
    generate_expert_config.main([str(x) for x in [*base, *flags]])
    expected = {"experts": {"1": [7, 6], "2": [7, 6]}, "shared_experts": True, "non_expert_modules": False}
    assert json.loads((tmp_path / "c.json").read_text()) == expected
    output = capsys.readouterr().out
    assert "4 of 16 routed experts (25.0%) in 2 layers" in output and "shared experts" in output
    expert = 3 * 32 * 16  # one expert has as many parameters, the two shared ones of a layer together twice that
    assert f"{4 * expert + 2 * 2 * expert:,} of" in output

    (tmp_path / "flat.json").write_text(json.dumps({f"layer_1_expert_{e}": 1 + e for e in range(9)}))
    refused(capsys, generate_expert_config.main, [*base, "--model", tiny_model_dir], "model")


def test_low_sums_are_noted(tmp_path, capsys):
    row = {"0": 0.05, "1": 0.02}
    (tmp_path / "summary.json").write_text(json.dumps({"gate_scores": {"1": row}, "meta": {"dataset": "law"}}))
    generate(tmp_path, tmp_path / "c.json", "--score_function", "gate", "--eval_dataset", "intent")
    notes = capsys.readouterr().err
    assert "layer 1: 0.0700" in notes and "'law', not on 'intent'" in notes


def test_a_folder_of_scores_gives_a_folder_of_configs(tmp_path, capsys):
    """As in the released repository: <scores>/<task> -> <configs>/<task>.json, each as its own command makes it."""
    for task, best in (("law", 0), ("intent", 2)):
        (tmp_path / "scores" / task).mkdir(parents=True)
        row = {str(e): 0.8 if e == best else 0.1 for e in range(3)}
        (tmp_path / "scores" / task / "summary.json").write_text(json.dumps({"token_scores": {"1": row}}))
    flags = ["--eval_datasets=law,intent", f"--expert_scores_dir={tmp_path / 'scores'}", "--score_function=token"]
    configs = generate_expert_config.main([*flags, f"--output_dir={tmp_path / 'configs'}", "--top_p=0.2"])
    assert [config.experts for config in configs] == [{1: (0,)}, {1: (2,)}]
    for task in ("law", "intent"):
        alone = generate(tmp_path / "scores" / task, tmp_path / "alone.json", "--top_p=0.2")
        assert json.loads((tmp_path / "configs" / f"{task}.json").read_text()) == alone
        one = [f"--eval_dataset={task}", f"--expert_scores_dir={tmp_path / 'scores' / task}", "--top_p=0.2"]
        generate_expert_config.main([*one, f"--output_dir={tmp_path / task}"])
        assert json.loads((tmp_path / task / f"{task}.json").read_text()) == alone
    assert "'law'" not in capsys.readouterr().err

    out = ["--output_dir", tmp_path / "out"]
    refused(capsys, generate_expert_config.main, [*flags[1:], *out], "Give --eval_dataset")
    refused(capsys, generate_expert_config.main, ["--eval_datasets=law,law", *flags[1:], *out], "distinct names")
    refused(capsys, generate_expert_config.main, ["--eval_datasets=law,summary", *flags[1:], *out], "scores/summary")
    refused(capsys, generate_expert_config.main, [*flags, *out, "--output_path", "c.json"], "not allowed with")
    refused(capsys, generate_expert_config.main, flags, "--output_path --output_dir is required")
    assert not (tmp_path / "out").exists()
