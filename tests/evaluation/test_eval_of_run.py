"""eval_multigpu.py --model <folder of train.py> finds the base, the adapter and the task by itself."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import eval_multigpu
import train
from deepseek.files import read_jsonl, write_jsonl
from deepseek.process_groups import Ranks
from evaluation import generation
from evaluation.config import EvalConfig, fill_from_run
from tests.data_helpers import load_samples
from tests.helpers import ROOT, Killed, arguments, at_step, config_of, contents, kill, refused
from training.data import (
    Template,
    encode_rows,
    held_out_questions,
    load_data,
    read_messages,
    rows_of_run,
    split_samples,
    unpack,
)


@pytest.fixture(scope="module")
def run_folder(files, tmp_path_factory) -> Path:
    """What train.py leaves behind, with a fifth of its samples held out."""
    folder = tmp_path_factory.mktemp("runs") / "output"
    train.main(arguments(files, folder, max_steps=1, save_steps=None, eval_steps=None))
    return folder


def evaluate(tmp_path, monkeypatch, *flags: str) -> list[dict]:
    monkeypatch.chdir(tmp_path)
    return eval_multigpu.main([*flags, "--device=cpu", "--max_new_tokens=2"])


def test_a_run_without_an_eval_file_is_asked_what_it_held_out(run_folder, files, tmp_path, monkeypatch, capsys):
    (summary,) = evaluate(tmp_path, monkeypatch, f"--model={run_folder}")
    arguments = summary["arguments"]
    assert arguments["adapter_dir"] == str(run_folder) and arguments["base_model_path"] == str(files / "m32")
    rows = read_jsonl(run_folder / "held_out.jsonl")
    training, held_out = split_samples(load_samples(files / "data.jsonl"), 0.2, 0)
    assert [row["prompt"] for row in rows] == [sample["messages"][0]["content"] for sample in held_out]
    assert summary["n"] == len(rows) == 6 and len(training) == 24
    told = capsys.readouterr().err
    assert "evaluating on the samples that training kept for validation (6)\n" in told
    assert "so few samples say little: give --eval_dataset" in told

    flags = [f"--base_model_path={files / 'm32'}", f"--adapter_dir={run_folder}"]
    evaluate(
        tmp_path, monkeypatch, *flags, f"--eval_dataset={run_folder / 'held_out.jsonl'}", "--output_path=long.jsonl"
    )
    short = contents(run_folder / "completions", "*.jsonl")
    assert short == {"held_out.jsonl": (tmp_path / "long.jsonl").read_text()}


def test_a_base_that_moved_away_is_told_with_the_file_that_names_it(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    note = json.loads((tmp_path / "run" / "run.json").read_text())
    note["config"]["base_model_path"] = "some/relative/model"
    (tmp_path / "run" / "run.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match=r"base model some/relative/model, which .*run\.json names.*--adapter_dir"):
        fill_from_run(EvalConfig(base_model_path=str(tmp_path / "run")))


def test_two_runs_with_one_folder_name_keep_their_answers_apart(run_folder, tmp_path, monkeypatch):
    for parent in ("a", "b"):
        shutil.copytree(run_folder, tmp_path / parent / "output")
        evaluate(tmp_path, monkeypatch, f"--model={parent}/output")
        assert (tmp_path / parent / "output" / "completions" / "held_out.summary.json").is_file()
    assert not (tmp_path / "results").exists()


def test_with_base_and_a_data_set_of_one_s_own(run_folder, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "is it 3?", "answers": ["yes 3"]}] * 2)
    flags = [f"--model={run_folder}", "--with_base", f"--eval_dataset={tmp_path / 'mine.jsonl'}"]
    (summary,) = evaluate(tmp_path, monkeypatch, *flags)
    assert summary["dataset"] == "mine" and summary["against_base"]["n"] == 2
    folder = run_folder / "completions"
    assert f"answers in {folder / 'mine.base.jsonl'}, {folder / 'mine.jsonl'}\n" in capsys.readouterr().out


def test_a_full_model_is_its_own_base(run_folder, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(run_folder, folder)
    run = json.loads((folder / "run.json").read_text())
    run["config"] |= {"method": "full", "template": "released", "train_dataset": "law"}
    (folder / "run.json").write_text(json.dumps(run))
    config = fill_from_run(EvalConfig(str(folder)))
    assert config == EvalConfig(str(folder), template="released", eval_dataset="law")


def test_a_run_on_the_tiny_model_is_asked_the_general_skills(run_folder, files, tmp_path, capsys):
    """Its base was taught them. Other bases are asked where that is wanted."""
    run = json.loads((run_folder / "run.json").read_text())
    run["config"] |= {"train_dataset": "law"}

    def asked(base, **flags) -> list[str]:
        run["config"]["base_model_path"] = str(base)
        (tmp_path / "run.json").write_text(json.dumps(run))
        return fill_from_run(EvalConfig(str(tmp_path), **flags)).datasets

    assert asked(ROOT / "results" / "models" / "tiny") == ["law", "general"]
    assert "note: general skills are asked too" in capsys.readouterr().err
    assert asked(ROOT / "results" / "models" / "tiny", eval_dataset="law") == ["law"]
    assert asked(ROOT / "results" / "models" / "tiny", suite="mmlu") == []
    assert asked(files / "m32") == ["law"]
    assert (
        asked(files / "m32", with_general=True)
        == asked(files / "m32", with_general=True, eval_dataset="law")
        == ["law", "general"]
    )
    assert asked(files / "m32", with_general=True, eval_dataset="general") == ["general"]
    assert not capsys.readouterr().err
    assert fill_from_run(EvalConfig(str(files / "m32"), eval_dataset="law", with_general=True)).datasets == [
        "law",
        "general",
    ]


def test_a_folder_that_is_not_of_train_py_stays_a_model(model_dir):
    assert fill_from_run(EvalConfig(model_dir)) == EvalConfig(model_dir)
    with pytest.raises(ValueError, match=r"cannot evaluate .*: it is not a run, .* Give --eval_dataset"):
        eval_multigpu.main([f"--model={model_dir}"])


@pytest.mark.parametrize("flags", [[], ["--eval_dataset=nope.jsonl"], ["--suite=mmlu"]])
def test_a_folder_that_does_not_exist_is_named_before_anything_else(tmp_path, flags):
    with pytest.raises(FileNotFoundError, match=r"nope'?: no such folder"):
        eval_multigpu.main([f"--model={tmp_path / 'nope'}", *flags])


def test_the_eval_file_beside_the_training_data_comes_first(run_folder, tmp_path):
    note = json.loads((run_folder / "run.json").read_text())
    run = note["config"]

    def task_of(changes: dict) -> str:
        (tmp_path / "run.json").write_text(json.dumps({**note, "config": {**run, **changes}}))
        return fill_from_run(EvalConfig(str(tmp_path))).eval_dataset

    for split in ("train", "eval"):
        (tmp_path / split).mkdir()
    path = tmp_path / "train" / "mine.jsonl"
    shutil.copy(run["train_dataset"], path)
    assert task_of({"train_dataset": str(path)}) == str(tmp_path / "held_out.jsonl")
    (tmp_path / "eval" / "mine.jsonl").touch()
    assert task_of({"train_dataset": str(path)}) == str(tmp_path / "eval" / "mine.jsonl")
    assert task_of({"train_dataset": "law"}) == "law"
    for nothing in ({"validation_fraction": 0}, {"train_dataset": str(tmp_path / "long.jsonl")}):
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2
        write_jsonl(tmp_path / "long.jsonl", [{"messages": turns}] * 9)
        with pytest.raises(ValueError, match=r"held out no sample that is one question and one answer\. Give"):
            task_of(nothing)


@pytest.mark.parametrize("below", [".", "checkpoint-2"])
def test_the_template_is_that_of_the_adapters_run(run_folder, tmp_path, capsys, below):
    folder = tmp_path / "run"
    (folder / below).mkdir(parents=True)
    run = json.loads((run_folder / "run.json").read_text())
    flags = {"base_model_path": "base", "adapter_dir": str(folder / below), "eval_dataset": "law"}
    for key, value in (("template", "released"), ("template_kwargs", {"a": 1})):
        (folder / "run.json").write_text(json.dumps({**run, "config": {**run["config"], key: value}}))
        assert getattr(fill_from_run(EvalConfig(**flags)).template_settings, key) == value
        assert f"note: {key}=" in capsys.readouterr().err
    other = fill_from_run(EvalConfig(**flags | {"adapter_dir": str(tmp_path)}))
    assert other.template == "chat" and not capsys.readouterr().err


def test_what_was_held_out_is_asked_after_its_system_message(files, tmp_path, monkeypatch, capsys):
    system, turns = {"role": "system", "content": "be brief"}, read_jsonl(files / "data.jsonl")
    rows = [{"messages": [system, *row["messages"]]} for row in turns[:10]]
    rows += [{"messages": row["messages"] * 2} for row in turns[10:12]]  # two questions
    write_jsonl(tmp_path / "mine.jsonl", rows)
    run = {"train_dataset": str(tmp_path / "mine.jsonl"), "n_train_samples": None, "validation_fraction": 1.0}
    asked, held_out = held_out_questions({**run, "training": {}})
    assert held_out == 11 and len(asked) in (9, 10) and {row["system"] for row in asked} == {"be brief"}
    write_jsonl(tmp_path / "with.jsonl", asked)
    write_jsonl(tmp_path / "without.jsonl", ({**row, "system": ""} for row in asked))
    seen, complete = [], generation.complete
    monkeypatch.setattr(generation, "complete", lambda *a, **k: seen.extend(a[2]) or complete(*a, **k))
    evaluate(tmp_path, monkeypatch, f"--model={files / 'm32'}", "--eval_dataset=with.jsonl,without.jsonl")
    assert set(seen) == {row["prompt"] for row in asked} | {("be brief", row["prompt"]) for row in asked}
    write_jsonl(tmp_path / "with.jsonl", [{**asked[0], "system": ["be brief"]}])
    with pytest.raises(ValueError, match=r'a row needs "prompt" \(and may have "system"\), a text'):
        evaluate(tmp_path, monkeypatch, f"--model={files / 'm32'}", "--eval_dataset=with.jsonl")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"n_train_samples": 20},
        {"n_train_samples": 20, "streaming": True},
        {"train_dataset": "weighted"},
        {"validation_dataset": "weighted"},
        {"validation_dataset": "weighted", "n_train_samples": 20},
    ],
    ids=str,
)
def test_the_rows_of_a_run_are_those_that_training_had(keys, files, tmp_path, tiny_tokenizer):
    """Those that it learned from, and those that it held out, whatever drew them."""
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", ({"prompt": f"{name} {i}?", "completion": "yes"} for i in range(30)))
    weighted = f"{tmp_path}/a.jsonl:0.8,{tmp_path}/b.jsonl:0.2"
    keys = {key: weighted if value == "weighted" else value for key, value in keys.items()}
    config = config_of(files, tmp_path / "out", seed=3, validation_fraction=0.3, **keys)
    run, template = asdict(config), Template(tiny_tokenizer)
    for held_out, packs in enumerate(load_data(tiny_tokenizer, config, Ranks())):
        rows = rows_of_run(run, bool(held_out))
        assert len(packs) and sorted(document.input_ids for document in unpack(packs)) == sorted(
            document.input_ids for document in encode_rows(rows, template)
        )
    asked = [row["prompt"] for row in held_out_questions(run)[0]]
    assert asked == [read_messages(row, where)[0]["content"] for where, row in rows]
    other = rows_of_run(run | {"training": {**run["training"], "seed": 4}}, held_out=True)
    assert list(other) != list(rows)


@pytest.mark.parametrize("method", ["esft", "full"])
def test_a_run_that_did_not_finish_is_told_as_such(method, files, tmp_path, monkeypatch, capsys):
    folder, flags = tmp_path / "out", ([], ["--with_base"], ["--strength=0.5,1"])
    keys = {"method": method, "expert_config": files / "experts.json" if method == "esft" else None}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 2, kill)
        train.main(arguments(files, folder, **keys))
    for more in flags:
        refused(capsys, eval_multigpu.main, [f"--model={folder}", *more], "its run did not finish. Go on with it.")
    (folder / "checkpoint-best").mkdir()  # a copy of the user's
    refused(capsys, eval_multigpu.main, [f"--model={folder}"], "its run did not finish. Go on with it.")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-9").mkdir()
    told = f"Go on with it, or give {'--model' if method == 'full' else '--adapter_dir'}={folder}/checkpoint-10."
    refused(capsys, eval_multigpu.main, [f"--model={folder}"], told)
    named = EvalConfig(str(folder), adapter_dir=str(folder / "checkpoint-10"), eval_dataset="law")
    assert fill_from_run(named).adapter_dir == str(folder / "checkpoint-10")


def test_a_whole_model_is_compared_with_its_base(files, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    keys = {"method": "full", "expert_config": None, "max_steps": 1, "save_steps": None, "eval_steps": None}
    train.main(arguments(files, folder, **keys))
    (both,) = evaluate(tmp_path, monkeypatch, f"--model={folder}", "--with_base", "--output_path=both.jsonl")
    evaluate(tmp_path, monkeypatch, f"--model={folder}", "--output_path=alone.jsonl")
    assert (tmp_path / "both.jsonl").read_text() == (tmp_path / "alone.jsonl").read_text()
    asked = f"--eval_dataset={folder / 'held_out.jsonl'}"
    evaluate(tmp_path, monkeypatch, f"--model={files / 'm32'}", asked, "--output_path=base.jsonl")
    assert (tmp_path / "both.base.jsonl").read_text() == (tmp_path / "base.jsonl").read_text()
    assert both["against_base"]["n"] == both["n"] == 6
