"""eval_multigpu.py at several strengths: the curve, the choice, and the command that merges what was chosen."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import esft
import eval_multigpu
import train
from deepseek.files import read_jsonl, write_jsonl
from evaluation.config import EvalConfig, fill_from_run
from evaluation.strength import choose, point_of
from scripts import merge_adapter
from tests.data_helpers import load_samples
from tests.helpers import arguments, contents, refused, run_eval, write_rows
from training.data import split_samples
from utils import PYTHON


def point(strength: float, task: float, general: float) -> dict:
    return {"strength": strength, "difference": {"law": task, "mid": -99, "general": general}}


def test_the_choice_gains_most_and_keeps_what_it_must():
    points = [point(0, 0, 0), point(0.5, 40, 1), point(0.7, 60, -0.9), point(0.9, 60, -0.5), point(1, 70, -4)]
    assert choose(points, "law", "general", 1) == 0.7  # of equal gains the smaller strength
    assert choose(points, "law", "general", 0.6) == 0.9
    assert choose(points, "law", "general", 4) == 1
    assert choose(points, "law", "general", 0) == 0.5
    assert choose([point(0, 0, 0), point(1, 70, -4)], "law", "general", 3.9) is None
    assert choose([point(0, 0, 0), point(0.5, 0, 0), point(1, -3, 5)], "law", "general", 1) is None  # no gain


@pytest.mark.parametrize(
    ("suite", "base", "tuned"),
    [
        (False, [None, None], [0.5, 1.0]),
        (False, [0.5, 1.0], [None, None]),
        (False, [None, 1.0], [0.5, None]),  # none that both have
        (True, [1.0], [None]),
        (True, [None], [1.0]),
    ],
)
def test_a_strength_without_scores_is_refused(suite, base, tuned, tmp_path):
    """As where a judge gives none."""
    summaries = []
    for name, scores in (("0", base), ("0.5", tuned)):
        write_jsonl(tmp_path / name / "law.jsonl", [{"score": score} for score in scores])
        found = [score for score in scores if score is not None]
        summary = {"dataset": "law", "mean": sum(found) / len(found) if found else None, "arguments": {"seed": 0}}
        summaries.append([summary | ({"unit": "percent"} if suite else {})])
    with pytest.raises(ValueError, match=rf"strength 0\.5 with the base on law: no question .* in {tmp_path}"):
        point_of(0.5, summaries[1], summaries[0], tmp_path)


@pytest.fixture
def asked(model_dir, adapter_dir, eval_file, tmp_path) -> str:
    """A task with the answers of the adapter as gold, and general skills with those of the base."""
    files = []
    for name, flags in (("task", [f"--adapter_dir={adapter_dir}"]), ("general", [])):
        run_eval(model_dir, eval_file, tmp_path / "gold.jsonl", *flags)
        gold = [row["example"]["raw_prediction"] for row in read_jsonl(tmp_path / "gold.jsonl")]
        files.append(write_rows(tmp_path / f"{name}.jsonl", gold))
    return ",".join(files)


@pytest.mark.parametrize(("max_loss", "chosen"), [(100, 1), (99, None)])
def test_each_strength_is_the_merge_of_that_strength(max_loss, chosen, model_dir, adapter_dir, asked, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    flags, exact = [f"--adapter_dir={adapter_dir}", "--strength=0.02,1", "--choose_strength"], "--evaluator=general"
    out, folder = tmp_path / "out.jsonl", tmp_path / "out"
    summaries = run_eval(model_dir, asked, out, *flags, exact, f"--max_loss={max_loss}")
    assert [summary["dataset"] for summary in summaries] == ["task", "general"] * 3
    text = capsys.readouterr().out
    for strength in (0, 0.02, 1):
        merged = tmp_path / f"m{strength}"
        merge = ["--base_model_path", model_dir, "--adapter_dir", adapter_dir, "--output_dir", merged]
        merge_adapter.main([*map(str, merge), f"--strength={strength}"])
        run_eval(str(merged), asked, tmp_path / "alone.jsonl", exact)
        one, alone = contents(folder / f"{strength:g}", "*.jsonl"), contents(tmp_path, "alone.*.jsonl")
        assert all(one[f"{name}.jsonl"] == alone[f"alone.{name}.jsonl"] for name in ("task", "general"))
    curve = json.loads((folder / "curve.json").read_text())
    base, little, whole = curve["points"]
    assert [p["strength"] for p in curve["points"]] == [0, 0.02, 1]
    assert base["mean"] == {"task": 0, "general": 100} and whole["mean"] == {"task": 100, "general": 0}
    assert base["difference"] == {"task": 0, "general": 0} and whole["difference"] == {"task": 100, "general": -100}
    assert little["mean"]["general"] > 0 and curve["chosen"] == chosen
    assert "| strength | task | general |" in text and "| 1 | 100.0 (+100.0" in text
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    if chosen is None:
        assert "no strength gains on task and loses at most 99 points of general" in text
        return
    (line,) = [line for line in text.splitlines() if line.startswith("next: ")]
    python, script, *words = shlex.split(line.removeprefix("next: "))
    args = merge_adapter.parse_args(words)
    assert python == PYTHON and Path(script).name == "merge_adapter.py" and args.strength == 1
    assert [str(path) for path in args.adapter_dir] == [adapter_dir] and str(args.base_model_path) == model_dir


def test_one_strength_is_an_evaluation_as_any_other(model_dir, adapter_dir, eval_file, tmp_path, monkeypatch):
    whole = [f"--adapter_dir={adapter_dir}", "--with_base"]
    (plain,) = run_eval(model_dir, eval_file, tmp_path / "plain.jsonl", *whole)
    (one,) = run_eval(model_dir, eval_file, tmp_path / "one.jsonl", *whole, "--strength=1")
    (base,) = run_eval(model_dir, eval_file, tmp_path / "zero.jsonl", *whole, "--strength=0")
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "plain.jsonl").read_text() and one["n"] == plain["n"]
    assert (tmp_path / "zero.jsonl").read_text() == (tmp_path / "plain.base.jsonl").read_text()
    assert base["against_base"]["difference"] == 0
    answers = [row["example"]["raw_prediction"] for row in read_jsonl(tmp_path / "one.jsonl")]
    assert answers != [row["example"]["raw_prediction"] for row in read_jsonl(tmp_path / "zero.jsonl")]


def test_a_whole_model_has_strengths_against_its_base(files, tmp_path, monkeypatch, capsys):
    """A run of method full knows its base, its held-out samples are the validation set, and 1 is the run itself."""
    folder = tmp_path / "full"
    train.main(arguments(files, folder, method="full", expert_config=None, max_steps=2, save_steps=None))
    monkeypatch.chdir(tmp_path)
    flags = ["--strength=0.5,1", "--choose_strength", "--with_general", "--n_samples=2", "--device=cpu"]
    eval_multigpu.main([f"--model={folder}", *flags, "--max_new_tokens=2"])
    curve = folder / "completions" / "strength"
    assert sorted(path.name for path in curve.iterdir() if path.is_dir()) == ["0", "0.5", "1"]
    assert {path.name for path in (curve / "0.5").glob("*.jsonl")} == {"held_out.jsonl", "general.jsonl"}
    eval_multigpu.main(
        [f"--model={folder}", "--n_samples=2", "--device=cpu", "--max_new_tokens=2", "--output_path=plain.jsonl"]
    )
    assert (tmp_path / "plain.jsonl").read_text() == (curve / "1" / "held_out.jsonl").read_text()
    half = esft.load_esft_model(files / "m32", folder, strength=0.5)[0].state_dict()
    base, tuned = (esft.load_base_model(path)[0].state_dict() for path in (files / "m32", folder))
    moved = [name for name in base if not torch.equal(base[name], tuned[name])]
    assert moved and all(torch.equal(half[n], base[n] + 0.5 * (tuned[n] - base[n])) for n in moved)
    train.main(arguments(files, folder, method="full", expert_config=None, max_steps=1, save_steps=None,
                         overwrite=True))  # fmt: skip  # the curve is a part of the run


def test_a_run_is_asked_what_it_held_out_by_the_metric_of_its_task(files, tmp_path):
    """With an eval file beside the training data, which is kept for the test, the validation set has its name."""
    (tmp_path / "train").mkdir()
    (tmp_path / "eval").mkdir()
    data = shutil.copy(files / "data.jsonl", tmp_path / "train" / "intent.jsonl")
    shutil.copy(files / "data.jsonl", tmp_path / "eval" / "intent.jsonl")
    folder = tmp_path / "run"
    train.main(arguments(files, folder, train_dataset=data, max_steps=1, save_steps=None, eval_steps=None))
    test_set = fill_from_run(EvalConfig(str(folder))).eval_dataset
    validation = fill_from_run(EvalConfig(str(folder), choose_strength=True)).eval_dataset
    assert Path(test_set) == tmp_path / "eval" / "intent.jsonl" and Path(validation) == folder / "held_out/intent.jsonl"
    _, held_out = split_samples(load_samples(data), 0.2, 0)
    assert [row["prompt"] for row in read_jsonl(validation)] == [s["messages"][0]["content"] for s in held_out]
    train.main(arguments(files, folder, train_dataset=data, max_steps=2, save_steps=None, eval_steps=None,
                         overwrite=True))  # fmt: skip  # what an evaluation wrote does not stand in the way


def test_which_strengths_and_samples_are_asked():
    assert EvalConfig("m", strength="0.5,1").strengths == [0.5, 1]
    assert EvalConfig("m").strengths == [1] and EvalConfig("m", choose_strength=True).strengths[0] == 0.5
    assert EvalConfig("m", choose_strength=True, strength="0.9,1").strengths == [0.9, 1]
    assert fill_from_run(EvalConfig("m")).base_model_path == "m"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--strength=x"], "it is not a list of numbers"),
        (["--strength="], "it is not a list of numbers"),
        (["--strength=0.5,3"], "cannot use strength 3.0: it is not from 0 (the base) to 2"),
        (["--strength=nan"], "from 0 (the base) to 2"),
        (["--choose_strength"], "cannot choose a strength: that needs"),
        (["--max_loss=2"], "cannot use --max_loss: it has an effect only with --choose_strength"),
        (["--choose_strength", "--with_general", "--max_loss=-1"], "--max_loss -1.0"),
    ],
)
def test_strengths_that_mean_nothing_are_refused(flags, words, model_dir, adapter_dir, eval_file, tmp_path, capsys):
    base = [f"--model={model_dir}", f"--eval_dataset={eval_file}", f"--output_path={tmp_path / 'o.jsonl'}"]
    refused(capsys, eval_multigpu.main, [*base, f"--adapter_dir={adapter_dir}", *flags], words)
    refused(
        capsys, eval_multigpu.main, [*base, "--strength=0.5"], "--strength: it has an effect only with --adapter_dir"
    )
    assert not list(tmp_path.glob("o*"))
