"""Suites through lm-eval: its figures against sums of our own, base and adapter in pairs, and what is refused."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import esft
import eval_multigpu
from deepseek.files import read_jsonl
from evaluation import lm_eval_harness
from evaluation.config import EvalConfig
from evaluation.lm_eval_harness import Suite, SuiteAnswers, evaluate_suite, load_suites
from evaluation.lm_eval_results import evaluate_suites, summarize_suite
from tests.helpers import ROOT
from utils import locked, run_cli

lm_eval = pytest.importorskip("lm_eval")

TINY = ROOT / "results" / "models" / "tiny"


@pytest.fixture(scope="module")
def base():
    """(model, tokenizer), in fp32."""
    return esft.load_base_model(TINY, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    """Half of the experts of two layers, moved so far that answers change."""
    model, _ = esft.load_base_model(TINY, dtype="float32", device="cpu")
    esft.to_esft(model, esft.ExpertConfig({layer: tuple(range(32)) for layer in (1, 2)}))
    torch.manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param), alpha=3.4 * float(param.std()))
    folder = tmp_path_factory.mktemp("adapter")
    esft.save_adapter(model, folder)
    return str(folder)


def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    ids, start = tokenizer(context + answer)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logits_TV[t - 1, ids[t]]) for t in range(start, len(ids)))


def greedy(model, tokenizer, prompt: str, steps: int) -> str:
    """Up to a line break or the end, without cache or padding."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).split("\n")[0]


def run(model, tokenizer, suite_dir, name: str, path: Path, **flags) -> dict:
    config = EvalConfig(str(TINY), **flags)
    found = load_suites([name], task_dir=suite_dir, allow_code_execution=config.allow_code_execution)[name]
    (summary,) = evaluate_suites(model, tokenizer, found, config, {suite.name: path for suite in found})
    return summary


def load(name: str, suite_dir: Path) -> Suite:
    (suite,) = load_suites([name], task_dir=suite_dir)[name]
    return suite


def lm_eval_results(path: Path) -> dict:
    return json.loads(path.with_suffix(".lm_eval.json").read_text())["results"]


@pytest.mark.parametrize("with_adapter", [False, True])
def test_choices_are_those_of_our_own_sums(base, adapter, suite_dir, tmp_path, with_adapter):
    model, tokenizer = base
    path = tmp_path / "out.jsonl"
    try:
        summary = run(model, tokenizer, suite_dir, "mine_choices", path, adapter_dir=adapter if with_adapter else None)
        rows, acc, norm = read_jsonl(suite_dir / "mine_choices.jsonl"), [], []
        for line, row in zip(read_jsonl(path), rows, strict=True):
            sums = [log_likelihood(model, tokenizer, row["q"], f" {choice}") for choice in row["choices"]]
            acc.append(int(np.argmax(sums)) == row["label"])
            norm.append(int(np.argmax(np.array(sums) / [len(c) for c in row["choices"]])) == row["label"])
            assert line["example"]["raw_prediction"] == row["choices"][int(np.argmax(sums))]
            assert line["example"]["raw_answers"] == [row["choices"][row["label"]]]
            assert (line["score"], line["metrics"]["acc_norm"]) == (acc[-1], 100 * norm[-1])
    finally:
        if with_adapter:
            esft.unload(model)
    assert (summary["primary"], summary["n"], summary["unit"]) == ("acc", 12, "percent")
    assert summary["mean"] == pytest.approx(100 * np.mean(acc), abs=1e-3)
    assert summary["metrics"]["acc_norm"] == pytest.approx(100 * np.mean(norm), abs=1e-3)
    assert 0 < np.mean(acc) < 1  # or any rule would do
    assert summary["ci95"][0] < summary["mean"] < summary["ci95"][1]
    assert lm_eval_results(path)["mine_choices"]["acc,none"] == pytest.approx(summary["mean"] / 100, abs=1e-6)


def test_written_answers_are_those_of_a_loop_of_our_own(base, suite_dir, tmp_path):
    model, tokenizer = base
    path = tmp_path / "out.jsonl"
    kept = model.generation_config
    model.generation_config = type(kept)(**{**kept.to_diff_dict(), "repetition_penalty": 9.0})
    own = model.generation_config
    try:
        summary = run(model, tokenizer, suite_dir, "mine_written", path, apply_chat_template=True, eval_batch_size=5)
        assert model.generation_config is own  # set aside, and given back
    finally:
        model.generation_config = kept
    right = []
    for line, row in zip(read_jsonl(path), read_jsonl(suite_dir / "mine_written.jsonl"), strict=True):
        messages = [{"role": "user", "content": row["q"]}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answer = greedy(model, tokenizer, prompt, 8)
        assert line["example"]["raw_prediction"] == answer
        right.append(answer.strip() == row["a"])
        assert line["score"] == right[-1]
    assert summary["primary"] == "exact_match,bare"
    assert summary["mean"] == pytest.approx(100 * np.mean(right), abs=1e-3) and np.mean(right) > 0.5


def bootstrap(values) -> list[float]:
    """The 95 % interval of a mean from draws with seed 0, with the spread of an unbiased variance."""
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    means = values[draws].mean(axis=1)
    return list(
        np.percentile(values.mean() + (means - values.mean()) * (1 + 1 / (len(values) - 1)) ** 0.5, [2.5, 97.5])
    )


def test_a_task_of_one_sample_leaves_a_suite_without_an_interval(base, suite_dir):
    (suite,) = load_suites(["mine_by_task"], task_dir=suite_dir)["mine_by_task"]
    answers = evaluate_suite(*base, suite, EvalConfig(str(TINY), n_samples=1))
    summary = summarize_suite(suite, answers, answers)
    assert summary["mean"] is not None and summary["ci95"] is None
    assert summary["against_base"]["ci95"] is None and not summary["against_base"]["certain"]


def test_a_pair_is_two_single_runs_and_its_difference(base, adapter, suite_dir, tmp_path):
    model, tokenizer = base
    both, alone = tmp_path / "both.jsonl", tmp_path / "alone.jsonl"
    options = {"apply_chat_template": True}
    summary = run(model, tokenizer, suite_dir, "mine_written", both, adapter_dir=adapter, with_base=True, **options)
    changed = run(model, tokenizer, suite_dir, "mine_written", alone, **options)  # the adapter is on it
    assert alone.read_bytes() == both.read_bytes()
    assert changed["mean"] == summary["mean"] and changed["ci95"] == summary["ci95"]
    assert "against_base" not in changed
    esft.unload(model)
    first = run(model, tokenizer, suite_dir, "mine_written", alone, **options)
    assert alone.read_bytes() == both.with_suffix(".base.jsonl").read_bytes() != both.read_bytes()
    found = summary["against_base"]
    assert (found["base"], found["adapter"], found["n"]) == (first["mean"], changed["mean"], 12)
    assert changed["mean"] < first["mean"]  # noise on the experts costs answers

    a, b = (np.array([line["score"] for line in read_jsonl(p)]) for p in (both.with_suffix(".base.jsonl"), both))
    assert found["difference"] == pytest.approx(100 * (b - a).mean(), abs=1e-3)
    assert found["ci95"] == pytest.approx(bootstrap(100 * (b - a)), abs=1e-3)
    assert found["ci95"][1] < 0 and found["certain"] == (np.count_nonzero(a != b) >= 6)


def test_an_interval_is_that_of_pairs(suite_dir):
    suite = load("mine_choices", suite_dir)
    rng = np.random.default_rng(1)
    before = rng.random(300) < 0.5
    after = before ^ (rng.random(300) < 0.05)  # nearly the same samples are right

    def answers(right) -> SuiteAnswers:
        fixed = {"filter": "none", "metrics": ["acc"]}
        samples = [{**fixed, "doc_id": i, "prompt_hash": str(i), "acc": float(v)} for i, v in enumerate(right)]
        return SuiteAnswers({"samples": {"mine_choices": samples}}, 1.0, [])

    low, high = summarize_suite(suite, answers(after), answers(before))["against_base"]["ci95"]
    assert [low, high] == pytest.approx(bootstrap(100 * (after.astype(float) - before)), abs=1e-3)
    same = summarize_suite(suite, answers(after), answers(after))["against_base"]
    assert (same["difference"], same["ci95"], same["certain"]) == (0.0, [0.0, 0.0], False)
    assert summarize_suite(suite, answers(before | True), answers(before))["against_base"]["certain"]
    single = summarize_suite(suite, answers(after))["ci95"]
    assert high - low < (single[1] - single[0]) / 1.5  # of samples that are not paired it would be wider than this one


@pytest.mark.parametrize("name", ["mine_by_size", "mine_by_task"])
def test_the_mean_of_a_group_is_lm_eval_s(base, suite_dir, tmp_path, name):
    path = tmp_path / "out.jsonl"
    summary = run(*base, suite_dir, name, path)
    scores: dict[str, list[float]] = {}
    for line in read_jsonl(path):
        scores.setdefault(line["skill"], []).append(100 * line["score"])
    means = {task: np.mean(values) for task, values in scores.items()}
    assert means["mine_few"] != means["mine_many"]  # or both kinds of mean are one
    micro, macro = np.mean([value for values in scores.values() for value in values]), np.mean(list(means.values()))
    assert summary["mean"] == pytest.approx(micro if name == "mine_by_size" else macro, abs=1e-3)
    assert lm_eval_results(path)[name]["acc,none"] == pytest.approx(summary["mean"] / 100, abs=1e-6)
    assert summary["groups"] == {t: {"n": len(scores[t]), "mean": pytest.approx(means[t], abs=1e-3)} for t in scores}
    assert list(summary["metrics"]) == ["acc"] and summary["n"] == 12


def test_what_is_no_mean_of_shares_stays_in_its_unit(base, suite_dir, tmp_path):
    path = tmp_path / "out.jsonl"
    summary = run(*base, suite_dir, "mine_likelihood", path)
    rows = read_jsonl(suite_dir / "mine_likelihood.jsonl")
    sums = [log_likelihood(*base, row["q"], f" {row['a']}") for row in rows]
    assert summary["mean"] == pytest.approx(np.exp(-np.mean(sums)), rel=1e-3)
    assert (summary["unit"], summary["higher_is_better"]) == ("as in lm-eval", False)
    assert summary["ci95"][0] < summary["mean"] < summary["ci95"][1]
    assert [line["score"] for line in read_jsonl(path)] == [None] * len(rows)


def test_samples_are_drawn_once_for_both_models(base, adapter, suite_dir, tmp_path):
    path = tmp_path / "out.jsonl"
    summary = run(*base, suite_dir, "mine_by_size", path, n_samples=4, seed=3, adapter_dir=adapter, with_base=True)
    esft.unload(base[0])
    lines, before = read_jsonl(path), read_jsonl(path.with_suffix(".base.jsonl"))
    assert summary["n"] == 7 == len(lines)  # all three of the one, four of the other
    assert [(line["idx"], line["example"]["prompt"]) for line in lines] == [
        (line["idx"], line["example"]["prompt"]) for line in before
    ]
    many = read_jsonl(suite_dir / "mine_many.jsonl")
    drawn = [line for line in lines if line["skill"] == "mine_many"]
    assert [line["idx"] for line in drawn] != [0, 1, 2, 3]
    assert all(line["example"]["prompt"] == many[line["idx"]]["q"] for line in drawn)


def test_what_a_task_does_not_follow_is_told(base, suite_dir, tmp_path, capsys):
    model, tokenizer = base
    config = yaml.safe_load((suite_dir / "mine_written.yaml").read_text())
    fixed = tmp_path / "fixed.yaml"
    fixed.write_text(yaml.safe_dump({**config, "task": "fixed", "num_fewshot": 0}))
    summary = run(model, tokenizer, None, str(fixed), tmp_path / "a.jsonl", num_fewshot=2)
    assert "num_fewshot=2 is ignored" in capsys.readouterr().err and len(summary["notes"]) == 1
    long = tmp_path / "long.yaml"
    long.write_text(yaml.safe_dump({**config, "task": "long", "doc_to_text": "word " * 3000 + "{{q}}"}))
    summary = run(model, tokenizer, None, str(long), tmp_path / "b.jsonl", n_samples=1)
    assert "Left truncation applied" in summary["notes"][0]
    with pytest.raises(ValueError, match=r"cannot run --suite fixed: .*requested max tokens to generate \(4000\)"):
        run(model, tokenizer, None, str(fixed), tmp_path / "c.jsonl", suite_max_new_tokens=4000)
    few = tmp_path / "few.yaml"
    few.write_text(yaml.safe_dump({**config, "task": "few", "fewshot_split": "test"}))
    with pytest.raises(ValueError, match=r"cannot run --suite few: Sample larger than population"):
        run(model, tokenizer, None, str(few), tmp_path / "c.jsonl", num_fewshot=50)
    assert not list(tmp_path.glob("c.*"))
    summary = run(model, tokenizer, None, str(fixed), tmp_path / "d.jsonl", n_samples=1)
    assert summary["notes"] == []


def test_generated_code_runs_only_where_that_is_allowed(base, suite_dir, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    (tmp_path / "runs.py").write_text(
        "import os\nfrom pathlib import Path\nHERE = Path(__file__).parent\n(HERE / 'loaded').touch()\n"
        "def metric(references, predictions, **_):\n"
        "    (HERE / 'ran').write_text(os.environ['HF_ALLOW_CODE_EVAL'])\n    return {'passed': 1.0}\n"
    )
    text = (suite_dir / "mine_written.yaml").read_text().replace("mine_written\n", "mine_code\n")
    text = text.replace("metric: exact_match", "metric: !function runs.metric")
    (tmp_path / "mine_code.yaml").write_text(text + "unsafe_code: true\n")
    (tmp_path / "mine_group.yaml").write_text(yaml.safe_dump({"group": "mine_group", "task": [{"task": "mine_code"}]}))
    options = {"n_samples": 1, "path": tmp_path / "out.jsonl"}
    for name in ("mine_code", "mine_group", str(tmp_path / "mine_code.yaml")):
        with pytest.raises(ValueError, match=r"runs the code that the model writes.*--allow_code_execution"):
            run(*base, tmp_path, name, **options)
    assert not (tmp_path / "loaded").exists() and not (tmp_path / "out.jsonl").exists()
    summary = run(*base, tmp_path, "mine_code", allow_code_execution=True, **options)
    assert (tmp_path / "ran").read_text() == "1" and summary["primary"] == "passed,bare"
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


def command(suite_dir: Path, path: Path, *more: str) -> list[dict]:
    flags = [f"--base_model_path={TINY}", f"--task_dir={suite_dir}", "--dtype=float32", f"--output_path={path}"]
    flags += ["--max_new_tokens=8"] if any(flag.startswith("--eval_dataset") for flag in more) else []
    return eval_multigpu.main([*flags, "--n_samples=4", "--device=cpu", *more])


def test_data_sets_and_suites_in_one_table(adapter, suite_dir, tmp_path, capsys):
    path = tmp_path / "new" / "out.jsonl"
    flags = [f"--adapter_dir={adapter}", "--with_base", "--suite=mine_choices,mine_written", "--apply_chat_template"]
    found = command(suite_dir, path, *flags, "--eval_dataset=intent")
    assert [s["dataset"] for s in found] == ["intent", "mine_choices", "mine_written"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[:4]] == ["dataset", "intent", "mine_choices", "mine_written"]
    for line, summary in zip(shown[1:], found):
        assert f"{summary['against_base']['difference']:+.1f}" in line
    suffixes = (".jsonl", ".summary.json", ".lm_eval.json")
    names = {f"out.mine_{task}{of}{end}" for task in ("choices", "written") for of in ("", ".base") for end in suffixes}
    names |= {f"out.intent{of}{end}" for of in ("", ".base") for end in suffixes[:2]}
    assert {file.name for file in path.parent.iterdir()} == names
    assert json.loads((path.parent / "out.mine_written.summary.json").read_text()) == found[2]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same(adapter, suite_dir, tmp_path):
    (tmp_path / "starts.py").write_text(  # as the metric of humaneval does
        "import multiprocessing\n"
        "def right(queue):\n    queue.put(1.0)\n"
        "def metric(references, predictions, **_):\n"
        "    queue = multiprocessing.Manager().Queue()\n"
        "    process = multiprocessing.Process(target=right, args=(queue,))\n"
        "    process.start(), process.join()\n    return {'passed': queue.get(timeout=9)}\n"
    )
    text = (suite_dir / "mine_written.yaml").read_text().replace("mine_written\n", "mine_starts\n")
    starts = tmp_path / "starts.yaml"
    starts.write_text(text.replace("metric: exact_match", "metric: !function starts.metric"))
    flags = [f"--adapter_dir={adapter}", f"--suite=mine_tag,{starts},mine_choices,mine_written"]
    for world_size in (1, 2):
        (tmp_path / str(world_size)).mkdir()
        found = command(suite_dir, tmp_path / str(world_size) / "out.jsonl", *flags, f"--world_size={world_size}")
        assert [s["dataset"] for s in found][2:] == ["mine_starts", "mine_choices", "mine_written"]
        assert found[2]["mean"] == 100
    one, two = ({p.name: p.read_text() for p in tmp_path.glob(f"{n}/*.jsonl")} for n in (1, 2))
    assert one == two and len(one) == 5


def test_what_is_done_is_shown_where_a_suite_ends_the_rest(suite_dir, tmp_path, capsys):
    config = yaml.safe_load((suite_dir / "mine_written.yaml").read_text())
    few = tmp_path / "few.yaml"
    few.write_text(yaml.safe_dump({**config, "task": "few", "fewshot_split": "test"}))
    with pytest.raises(ValueError, match="cannot run --suite few"):
        command(suite_dir, tmp_path / "o.jsonl", "--eval_dataset=intent", f"--suite={few}", "--num_fewshot=50")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["dataset", "intent"]


def test_one_suite_alone_has_the_name_that_was_given(suite_dir, tmp_path):
    words = (suite_dir, tmp_path / "out.jsonl", f"--suite={suite_dir}/mine_choices.yaml")
    with locked(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="another run is at work there"):
        command(*words)
    (summary,) = command(*words)
    assert (summary["dataset"], summary["n"]) == ("mine_choices", 4) and (tmp_path / "out.jsonl").is_file()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--suite=mine_choices,mine_tag,mine_few"], "cannot write two data sets or suites to"),
        (["--suite=mine_few", "--eval_dataset=TASKS/mine_few.jsonl"], "cannot write two data sets or suites to"),
        (["--suite=gone"], "cannot run --suite gone: neither lm-eval nor --task_dir has a task gone"),
    ],
)
def test_a_wrong_suite_is_one_sentence_before_a_model_is_loaded(
    flags, sentence, suite_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(esft, "load_base_model", lambda *_, **__: pytest.fail("a model was loaded"))
    index = lm_eval_harness._task_manager(suite_dir, False)
    monkeypatch.setattr(lm_eval_harness, "_task_manager", lambda *_: index)  # lm-eval's own take seconds to read
    rows = [{"prompt": "a", "answers": ["b"]}]
    (tmp_path / "mine_few.jsonl").write_text("".join(json.dumps(row) for row in rows))
    flags = [flag.replace("TASKS", str(tmp_path)) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: command(suite_dir, tmp_path / "new" / "out.jsonl", *flags))
    said = capsys.readouterr()
    *bars, error = said.err.splitlines()  # tasks that are read for the first time show their bars
    assert stop.value.code == 2 and error.startswith("error: ") and sentence in error
    assert all("examples/s]" in bar or not bar.strip() for bar in bars)
    assert not said.out and not (tmp_path / "new").exists()


LETTERS = {"question": "Which one is even?", "choices": ["1", "2", "3", "5"], "answer": 1}
REAL = {  # rows of ours in the shape of the data on the hub
    "gsm8k/gsm8k.yaml": {"question": "What is 2 + 3?", "answer": "It is 5.\n#### 5"},
    "hellaswag/hellaswag.yaml": {
        "ctx_a": "A man sits.", "ctx_b": "he", "activity_label": "Chairs", "label": "1",
        "endings": ["flies [x] off.", "stands up.", "is blue.", "melts."],
    },
    "arc/arc_challenge.yaml": {
        "question": "What is wet?", "choices": {"text": ["Sand", "Rain"], "label": ["A", "B"]}, "answerKey": "B",
    },
    "triviaqa/default.yaml": {"question": "What is 1 + 1", "answer": {"aliases": ["2", "two"], "value": "2"}},
    "mmlu/default/mmlu_anatomy.yaml": LETTERS,
    "ceval/ceval-valid_law.yaml": {"question": "哪个是偶数？", "A": "1", "B": "2", "C": "3", "D": "5", "answer": "B"},
}  # fmt: skip


@pytest.mark.parametrize("path", REAL)
def test_the_real_tasks_are_asked_as_lm_eval_defines_them(base, tmp_path, path):
    """Their own files, but for where the data come from."""
    file = Path(lm_eval.__file__).parent / "tasks" / path
    question = "question" if "question" in REAL[path] else "ctx_a"
    rows = [{**REAL[path], question: f"{REAL[path][question]} {i}"} for i in range(5)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = dict.fromkeys(("train", "validation", "test", "val", "dev"), str(tmp_path / "data.jsonl"))
    name = re.search(r'^"?task"?: "?([\w-]+)', file.read_text(), re.MULTILINE)[1]
    source = {"data_files": splits, "cache_dir": str(tmp_path / "cache")}
    own = {"include": str(file), "task": name, "dataset_path": "json", "dataset_kwargs": source}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    options = {"num_fewshot": 2, "suite_max_new_tokens": 4}
    summary = run(*base, None, str(tmp_path / "own.yaml"), tmp_path / "out.jsonl", **options)
    assert (summary["dataset"], summary["n"], summary["notes"]) == (name, 5, [])
    primary = {"gsm8k": "exact_match,strict-match", "triviaqa": "exact_match,remove_whitespace"}
    letters = "acc" if "mmlu" in name or "ceval" in name else "acc_norm"
    assert summary["primary"] == primary.get(name, letters)
    key = summary["primary"] if "," in summary["primary"] else f"{summary['primary']},none"
    assert 100 * lm_eval_results(tmp_path / "out.jsonl")[name][key] == pytest.approx(summary["mean"], abs=1e-3)
    line = read_jsonl(tmp_path / "out.jsonl")[0]
    assert line["example"]["prompt"].count(REAL[path][question]) == 3  # two are few-shot examples
