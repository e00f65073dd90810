"""The commands around the scores: get_expert_scores.py on one and two processes, and the picture."""

import json
import random
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek.files import write_json, write_jsonl
from deepseek.fingerprint import checkpoint_note
from deepseek.process_groups import Ranks
from esft import ExpertConfig, ExpertScores, load_base_model, select_experts
from evaluation import expert_scoring
from evaluation.expert_scoring import SampleSettings
from evaluation.selection import PackCounts
from scripts import merge_adapter
from scripts.expert import (
    compare_scores,
    generate_expert_config,
    get_expert_scores,
    plot_expert_scores,
    preview_config,
)
from tests.helpers import config_of, make_model, noisy_adapter, refused
from training.data import Encoded, Template, TemplateSettings, load_data

WORDS = ["what", "is", "it", "yes", "no", "0", "12", "345"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))

    rows = [{"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]}] * 3
    rows += [
        {"messages": [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]} for _ in "x" * 57
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def score(data, model_dir, output_dir, *flags) -> ExpertScores:
    argv = [
        "--eval_dataset",
        data,
        "--base_model_path",
        model_dir,
        "--output_dir",
        output_dir,
        "--device",
        "cpu",
        *flags,
    ]
    return get_expert_scores.main([str(arg) for arg in argv])


@pytest.mark.long
def test_scores_are_the_same_for_any_number_of_processes(data, tiny_model_dir, tmp_path, capsys):
    flags = ["--n_sample_tokens", 1000, "--seq_length", 128, "--scores", "prob,gradient,reap", "--seed", 3]
    one = score(data, tiny_model_dir, tmp_path / "one", *flags)
    assert list(one.by_function) == ["token", "gate", "prob", "gradient", "reap"] and 1000 <= one.meta["tokens"] < 1128
    output = capsys.readouterr()
    assert "token 0.2" in output.out and "on expert" in output.out
    two = score(data, tiny_model_dir, tmp_path / "two", *flags, "--world_size", 2)
    texts = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")]
    for text in texts:
        del text["meta"]["environment"]["date"]
    assert texts[0] == texts[1] and one.by_function == two.by_function
    assert ExpertScores.load(tmp_path / "two").by_function == two.by_function
    packs = [PackCounts.load(tmp_path / name) for name in ("one", "two")]
    assert len(packs[0]) == one.meta["packs"] > 2 and torch.equal(packs[0].tokens_P, packs[1].tokens_P)
    assert packs[0].sums.keys() == {"slots", "gates", "probs", "squares", "norms"}
    assert all(torch.equal(sums, packs[1].sums[kind]) for kind, sums in packs[0].sums.items())
    assert not torch.equal(packs[0].sums["slots"][0], packs[0].sums["slots"][1])
    other = score(data, tiny_model_dir, tmp_path / "other", *flags[:-1], 4)
    assert other.by_function != one.by_function


def test_scores_with_an_adapter_are_those_of_the_merged_model_and_for_the_base(data, tiny_model_dir, tmp_path):
    """Routers that were trained send tokens elsewhere. An expert config of their scores is for the base."""
    model, _ = load_base_model(tiny_model_dir)
    noisy_adapter(model, ExpertConfig({}, routers="full"), tmp_path / "adapter")
    merge_adapter.main([f"--base_model_path={tiny_model_dir}", f"--adapter_dir={tmp_path / 'adapter'}",
                        f"--output_dir={tmp_path / 'merged'}"])  # fmt: skip
    flags = ["--n_sample_tokens", 500, "--seq_length", 128]
    plain = score(data, tiny_model_dir, tmp_path / "plain", *flags)
    tuned = score(data, tiny_model_dir, tmp_path / "tuned", *flags, "--adapter_dir", tmp_path / "adapter")
    merged = score(data, tmp_path / "merged", tmp_path / "of merged", *flags)
    assert tuned.by_function == merged.by_function != plain.by_function
    assert tuned.meta["base"] == plain.meta["base"] != merged.meta["base"]
    assert tuned.meta["adapter"] == str(tmp_path / "adapter") and "adapter" not in plain.meta


def test_what_reads_scores_reads_gradient_and_reap(data, tiny_model_dir, tmp_path, capsys):
    """The selection, its certainty, its price and its picture."""
    pytest.importorskip("matplotlib")
    flags = ["--n_sample_tokens", 1000, "--seq_length", 64, "--scores=reap,gradient"]
    scores = score(data, tiny_model_dir, tmp_path / "s", *flags)
    for function in ("gradient", "reap"):
        chosen = [f"--expert_scores_dir={tmp_path / 's'}", f"--score_function={function}"]
        out, picture = f"--output_path={tmp_path / 'c.json'}", f"--output_path={tmp_path / function}.png"
        (config,) = generate_expert_config.main([*chosen, out, "--strategy=global", "--budget=0.25"])
        flat = {(la, e): s for la, score_E in scores[function].items() for e, s in score_E.items()}
        best = sorted(flat, key=flat.get)[-4:]
        assert {(la, e) for la, ids in config.experts.items() for e in ids} == set(best)
        found = compare_scores.main([*chosen, "--n_bootstrap=50"])
        cumulative = select_experts(scores, score_function=function, top_p=0.2)
        assert found["selected"] == {la: list(ids) for la, ids in cumulative.experts.items()}
        assert found["growth"][-1]["jaccard_with_all"] > found["growth"][0]["jaccard_with_all"] - 0.1
        assert 0 < found["jaccard"] <= 1
        plot_expert_scores.main([*chosen, picture])
        assert (tmp_path / f"{function}.png").read_bytes().startswith(b"\x89PNG")
    rows = preview_config.main([*chosen[:1], f"--base_model_path={tiny_model_dir}", "--top_p", "0.2"])["rows"]
    assert [row["score_function"] for row in rows] == ["token", "gate", "gradient", "reap"]
    assert rows[2]["experts"] == sum(map(len, select_experts(scores, score_function="gradient").experts.values()))
    plain = score(data, tiny_model_dir, tmp_path / "t", *flags[:-1], "--scores=")
    assert plain.by_function.keys() == {"token", "gate"} and plain["token"] == scores["token"]
    argv = [f"--expert_scores_dir={tmp_path / 't'}", "--score_function=gradient", out]
    refused(
        capsys, generate_expert_config.main, argv, "there is token and gate; get_expert_scores.py --scores=gradient"
    )


def test_scores_do_not_depend_on_the_packs(data, tiny_tokenizer, tmp_path):
    """Not even in gpt_oss, for which transformers builds no mask between packed documents."""
    make_model("gpt_oss").save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--n_sample_tokens", 10**6, "--skip_template_tokens", "--scores=gradient", "--seq_length"]
    long, short = (score(data, tmp_path / "model", tmp_path / str(n), *flags, n) for n in (512, 128))
    assert long.meta["packs"] < short.meta["packs"]
    assert long.by_function["token"] == short.by_function["token"]
    for layer, score_E in long["gradient"].items():
        assert all(short["gradient"][layer][e] == pytest.approx(s, rel=1e-3, abs=1e-7) for e, s in score_E.items())
    assert len(PackCounts.load(tmp_path / "512")) == long.meta["packs"] < long.meta["documents"]


@pytest.mark.long
def test_a_failing_rank_reaches_the_user_as_its_sentence(data, tiny_model_dir, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, broken / "model.safetensors")
    flags = ["--eval_dataset", data, "--model", broken, "--output_dir", tmp_path / "out", "--seq_length", 64]
    for world_size, rank in ((1, ""), (2, "rank ")):
        more = ["--device", "cpu", "--world_size", world_size]
        refused(capsys, get_expert_scores.main, [*flags, *more], rank, "cannot load model")
    assert not (tmp_path / "out").exists()


def test_scoring_refusals(data, tiny_model_dir, tmp_path, capsys, monkeypatch):
    base = ["--eval_dataset", data, "--model", tiny_model_dir, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(capsys, get_expert_scores.main, [*base, "--device", "cuda"], "--device cuda", "there are 0")
    refused(capsys, get_expert_scores.main, [*base, "--seq_length", 10], "sample", "overlong=truncate")
    refused(capsys, get_expert_scores.main, [*base, "--eval_dataset", tmp_path / "no.jsonl"], "no.jsonl")
    refused(capsys, get_expert_scores.main, [*base, "--model", tmp_path / "no"], "no such folder")
    refused(capsys, get_expert_scores.main, [*base, "--scores=gradients"], "did you mean 'gradient'", "prob, gradient")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    flags = ["--world_size", 2, "--gpus_per_rank", 2]
    refused(capsys, get_expert_scores.main, [*base, *flags], "needs 4 GPUs", "3")
    assert not (tmp_path / "out").exists()


def test_template_tokens_can_be_left_out(data, tiny_model_dir, tiny_tokenizer, tmp_path, capsys):
    messages = [{"role": "user", "content": "User: 12 no"}, {"role": "assistant", "content": " yes"}]
    for name in ("chat", "released"):
        template = Template(tiny_tokenizer, TemplateSettings(name))
        (document,) = template.encode([messages])[0]
        (mask,) = expert_scoring.content_masks(messages, [document], template)
        kept = tiny_tokenizer.decode([t for t, keep in zip(document.input_ids, mask) if keep])
        assert kept.split() == ["User:", "12", "no", "yes"]
        assert not mask[0] and not mask[-1]
    with pytest.raises(ValueError, match="--skip_template_tokens"):
        cut = Encoded(document.input_ids[:-3], document.labels[:-3])
        expert_scoring.content_masks(messages, [cut], template)

    some = score(data, tiny_model_dir, tmp_path / "some", "--skip_template_tokens")
    everything = score(data, tiny_model_dir, tmp_path / "all")
    assert some.meta["tokens"] < everything.meta["tokens"] and some.by_function != everything.by_function
    notes = capsys.readouterr().err
    assert "fewer than the 131072 to sample" in notes
    assert "replaces" not in notes


def test_scores_that_others_replace_are_noted(data, tiny_model_dir, tmp_path, capsys):
    flags = ["--seq_length", 128, "--n_sample_tokens", 300]
    score(data, tiny_model_dir, tmp_path, *flags)
    score(data, tiny_model_dir, tmp_path, *flags)
    assert "replaces" not in capsys.readouterr().err  # the same again
    score(data, tiny_model_dir, tmp_path, *flags, "--seed", 1)
    note = f"summary.json: this run replaces the scores of {data} on {tiny_model_dir} (another seed)"
    assert note in capsys.readouterr().err
    score(data, tiny_model_dir, tmp_path, *flags, "--seed", 1, "--scores", "reap,prob")
    score(data, tiny_model_dir, tmp_path, *flags, "--seed", 1, "--scores", "reap")
    assert "summary.json: this run removes the scores prob, as --scores does not name them" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text('{"token_scores": {"1": {"0": 1.0}}}')
    score(data, tiny_model_dir, tmp_path, *flags)
    assert "replaces the scores of an unknown data set on an unknown model" in capsys.readouterr().err


def test_truncated_documents_keep_their_mask(data, tiny_model_dir, tmp_path):
    with pytest.warns(UserWarning, match="longer than seq_length"):
        short = score(data, tiny_model_dir, tmp_path, "--seq_length", 40, "--overlong", "truncate")
    assert short.meta["seq_length"] == 40


@pytest.mark.parametrize("command", [generate_expert_config, compare_scores], ids=lambda module: module.__name__)
def test_a_list_of_nothing_is_refused(command, tmp_path, capsys):
    output = f"--output_path={tmp_path / 'out.png'}"
    refused(capsys, command.main, ["--expert_scores_dir=,", output], "cannot read ',': it names nothing")
    assert not list(tmp_path.iterdir())


def test_compare_adapters(tmp_path, capsys):
    """LoRA on selected experts is one of them. LoRA on all layers selects none."""
    experts = {"esft": {1: (5, 2), 2: (7,)}, "lora": {1: (5, 2), 2: (7,)}, "other": {1: (5,), 2: (0,)}}
    for name, chosen in experts.items():
        rank = {"lora_rank": 2} if name != "esft" else {}
        noisy_adapter(make_model(), ExpertConfig(chosen), tmp_path / name, **rank)
    found = compare_scores.main(["--expert_scores_dir", *(str(tmp_path / name) for name in experts)])
    assert found["num_experts"] == 8 and found["sizes"] == [3, 3, 2] and found["names"] == list(experts)
    assert [cell["jaccard"] for cell in found["overlap"][0]] == [1, 1, 1 / 4]
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    refused(capsys, compare_scores.main, ["--expert_scores_dir", tmp_path / "esft", tmp_path / "lora"], "holds a LoRA")


@pytest.mark.parametrize("text", ["-1", "9" * 30, "1e3", "nan", "", "9" * 9999])
def test_a_seed_that_no_generator_takes_is_refused(text, tmp_path, capsys):
    argv = [f"--expert_scores_dir={tmp_path}", f"--seed={text}"]
    refused(capsys, compare_scores.main, argv, "--seed", "is not a whole number from 0 and below 2**32")


# ------------------------------------------------------------------------------------------------------ the picture


def test_plot(official, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    source = official / "intent"
    argv = ["--expert_scores_dir", source / "expert_scores", "--output_path", tmp_path / "p.png"]
    plot_expert_scores.main([str(x) for x in [*argv, "--expert_config", source / "expert_config.json"]])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "c.json").write_text('{"experts": {"1": [64]}}')
    refused(capsys, plot_expert_scores.main, [*argv, "--expert_config", tmp_path / "c.json"], "layer 1", "same model")
    refused(capsys, plot_expert_scores.main, [*argv, "--output_path", tmp_path / "p.txt"], "no such kind of picture")


def test_a_plot_has_no_cut_that_did_not_select_the_experts(official, tmp_path, monkeypatch):
    drawn, source = [], official / "intent"
    scores = ExpertScores.load(source / "expert_scores")
    monkeypatch.setattr(plot_expert_scores, "draw_experts", lambda *given: drawn.append(given[3]))
    monkeypatch.setattr(plot_expert_scores, "save_figure", lambda figure, path: None)
    write_json(tmp_path / "topk.json", select_experts(scores, strategy="topk", top_k=3).to_dict())
    plot = ["--expert_scores_dir", source / "expert_scores", "--output_path", tmp_path / "p.png"]
    for more in (
        [],
        ["--expert_config", tmp_path / "topk.json"],
        ["--expert_config", tmp_path / "topk.json", "--top_p=0.3"],
    ):
        plot_expert_scores.main([str(x) for x in [*plot, *more]])
    assert drawn == [0.2, None, 0.3]


def test_plot_without_matplotlib_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "summary.json").write_text('{"token_scores": {"1": {"0": 1.0}}}')
    refused(capsys, plot_expert_scores.main, ["--expert_scores_dir", tmp_path], "matplotlib")


def test_a_config_notes_the_base_of_its_scores(data, tiny_model_dir, tmp_path, capsys):
    """Scores of two bases make no union, and scores of one no config of the other."""
    other = shutil.copytree(tiny_model_dir, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] += 1  # the routing is the same
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for name, base in (("one", tiny_model_dir), ("two", other), ("three", tiny_model_dir)):
        score(data, base, tmp_path / name, "--n_sample_tokens", 500, "--seed", len(name))
    scores = {name: f"--expert_scores_dir={tmp_path / name}" for name in ("one", "two", "three")}
    output = f"--output_path={tmp_path / 'config.json'}"
    why = "its scores are of another base model: the weights differ"
    refused(
        capsys,
        generate_expert_config.main,
        [f"{scores['one']},{tmp_path / 'two'}", output],
        f"{tmp_path / 'two'}: {why}",
    )
    refused(capsys, generate_expert_config.main, [scores["one"], output, f"--base_model_path={other}"], why)
    refused(capsys, preview_config.main, [scores["one"], f"--base_model_path={other}"], why)
    assert not (tmp_path / "config.json").exists()
    generate_expert_config.main(
        [f"{scores['one']},{tmp_path / 'three'}", output, f"--base_model_path={tiny_model_dir}"]
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base"]["weights"] == checkpoint_note(tiny_model_dir)["weights"] and config["meta"]["union_of"]
    assert ExpertConfig.load(tmp_path / "config.json").experts


def test_several_data_sets_that_were_scored_together_are_one_task(tmp_path, tiny_model_dir):
    for name in "ab":
        rows = [{"prompt": f"what is {name} {i}?", "completion": "yes"} for i in range(9)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    for number, data in enumerate(
        (f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl:2,{tmp_path}/b.jsonl:1")
    ):
        out, path = tmp_path / str(number), tmp_path / f"{number}.json"
        get_expert_scores.main([f"--eval_dataset={data}", f"--base_model_path={tiny_model_dir}", f"--output_dir={out}"])
        words = [f"--expert_scores_dir={out}", f"--output_path={path}"]
        (config,) = generate_expert_config.main([f"--eval_dataset={data}", *words])
        assert any(config.experts.values()) and path.is_file()
    with pytest.raises(ValueError, match="cannot name the tasks: --eval_dataset has 2, --expert_scores_dir 1"):
        generate_expert_config.main(["--eval_dataset=a,b", *words])


@pytest.mark.parametrize("keys", [{}, {"n_train_samples": 20}, {"n_train_samples": 20, "streaming": True}])
def test_the_samples_that_a_run_trains_on_are_scored_alone(keys, data, files, tmp_path, tiny_tokenizer):
    config = config_of(files, tmp_path, train_dataset=data, seq_length=64, validation_fraction=0.25, seed=3, **keys)
    train, held_out = ({n for i in range(len(packs)) for n in packs[i].samples}
                       for packs in load_data(tiny_tokenizer, config, Ranks()))  # fmt: skip
    rule = {"n_sample_tokens": 10**6, "seq_length": 64, "seed": 3, **keys}
    packs = expert_scoring.sample_packs(SampleSettings(str(data), validation_fraction=0.25, **rule), tiny_tokenizer)
    assert {n for one in packs for n in one.pack.samples} == train and held_out
    packs = expert_scoring.sample_packs(SampleSettings(str(data), **rule), tiny_tokenizer)
    assert {n for one in packs for n in one.pack.samples} == train | held_out


def test_packs_are_as_long_as_those_of_training(data, tiny_tokenizer):
    """Beyond the model's context as well: the positions of each document begin at 0."""
    settings = SampleSettings(str(data), seq_length=512)
    assert max(map(len, expert_scoring.sample_packs(settings, tiny_tokenizer))) > 256
