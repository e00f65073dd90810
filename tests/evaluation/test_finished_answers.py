"""Answers that are there are taken: those of a curve that was interrupted, and those of the base."""

import json
import shutil
from pathlib import Path

import pytest

import eval_multigpu
from evaluation.lm_eval_harness import SuiteAnswers
from tests.helpers import contents, refused, run_eval, stop_after, untimed, write_rows

CURVE = "--strength=0.5,1"


@pytest.fixture
def asked(model_dir, adapter_dir, tmp_path, watched):
    """Run an evaluation of the adapter on two data sets, and return how often each was answered."""
    files = [write_rows(tmp_path / f"{name}.jsonl", [name] * 6) for name in ("task", "general")]

    def run(out: str, *more: str, adapter: str = adapter_dir) -> dict[str, int]:
        flags = [f"--adapter_dir={adapter}"] if adapter else []
        run_eval(model_dir, ",".join(files), tmp_path / out / "out.jsonl", *flags, *more)
        scored = watched.scored()
        return {name: scored.count(name) for name in ("task", "general")}

    return run


def written(folder: Path) -> dict[str, object]:
    """What an evaluation wrote, without times and folders."""
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("out*/*/*.jsonl")}
    found |= {str(path.relative_to(folder)): untimed(json.loads(path.read_text()))
              for path in folder.rglob("*.summary.json")}  # fmt: skip
    curve = json.loads((folder / "out" / "curve.json").read_text())
    return found | {"points": curve["points"]}


def test_a_curve_that_was_interrupted_asks_what_is_missing(asked, adapter_dir, tmp_path, monkeypatch, watched, capsys):
    assert asked("whole", CURVE) == {"task": 18, "general": 18}  # the base, and two strengths
    for batches in (8, 6):  # each time in the middle of a strength
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_after(patch, batches)
            asked("broken", CURVE)
        watched.scored()
    assert asked("broken", CURVE) == {"task": 2, "general": 6}
    assert "answers are there from an earlier evaluation" in capsys.readouterr().err
    assert written(tmp_path / "broken") == written(tmp_path / "whole") and not list(tmp_path.rglob(".*"))

    assert asked("whole", CURVE) == {"task": 0, "general": 0}
    assert asked("whole", "--strength=0.5,0.7,1") == {"task": 6, "general": 6}
    other = Path(shutil.copytree(adapter_dir, tmp_path / "other"))
    (other / "README.md").write_text("another folder, and so another adapter")
    assert asked("whole", CURVE, adapter=str(other)) == {"task": 12, "general": 12}
    assert asked("whole", CURVE, "--max_new_tokens=5", adapter=str(other)) == {"task": 18, "general": 18}
    answers = tmp_path / "whole" / "out" / "1" / "task.jsonl"
    answers.write_text(answers.read_text().replace("add 1", "add 2"))  # not as it was written
    assert asked("whole", CURVE, "--max_new_tokens=5", adapter=str(other)) == {"task": 6, "general": 0}


def test_a_single_evaluation_is_asked_anew(asked):
    assert asked("one") == asked("one") == {"task": 6, "general": 6}


@pytest.mark.parametrize("more", [["--with_base"], [CURVE]])
def test_the_base_is_not_asked_for_each_adapter(asked, more, tmp_path, capsys):
    """The earlier evaluation may be any: of the base alone, of an adapter against it, or a curve."""
    adapted = 6 * (len(more[0].split(",")))
    assert asked("base", adapter="") == {"task": 6, "general": 6}
    assert asked("first", *more)["task"] == 6 + adapted
    for number, folder in enumerate(("base", "first/out/0" if more == [CURVE] else "first")):
        out = f"again{number}"
        assert asked(out, *more, f"--base_answers={tmp_path / folder}") == {"task": adapted, "general": adapted}
        assert contents(tmp_path / out, "**/*.jsonl") == contents(tmp_path / "first", "**/*.jsonl")
    capsys.readouterr()
    assert asked("third", *more, f"--base_answers={tmp_path / 'base'}", "--eval_batch_size=3")["task"] == 6 + adapted
    assert "has no answers of this base to task with these settings: it is asked" in capsys.readouterr().err


def test_failed_answers_are_asked_again(model_dir, adapter_dir, tmp_path, watched):
    data = write_rows(tmp_path / "mine.jsonl", ["raise", "b", "c", "d", "e", "f"])
    flags = (f"--adapter_dir={adapter_dir}", CURVE)
    run_eval(model_dir, data, tmp_path / "out.jsonl", *flags)
    watched.scored()
    run_eval(model_dir, data, tmp_path / "out.jsonl", *flags)
    again = watched.scored()
    assert again.count("raise") == 3 and len(again) == 6  # a batch of two at each strength


def test_who_graded_decides_too(model_dir, adapter_dir, tmp_path, server, capsys):
    data = write_rows(tmp_path / "law.jsonl", [f"gold {i}" for i in range(6)])
    judge = ["--judge_model=grader", f"--judge_base_url={server.url}", "--judge_key_env=MY_KEY"]
    judge.append(f"--judge_cache={tmp_path / 'cache'}")
    flags = (model_dir, data, tmp_path / "out.jsonl", f"--adapter_dir={adapter_dir}", CURVE)
    scores = [summary["mean"] for summary in run_eval(*flags, *judge)]
    assert scores == [80] * 3
    capsys.readouterr()
    assert [summary["mean"] for summary in run_eval(*flags, *judge)] == scores
    assert capsys.readouterr().err.count("6 of 6 answers are there") == 3
    summaries = run_eval(*flags)
    assert "answers are there" not in capsys.readouterr().err
    assert {s["primary"] for s in summaries} == {"rouge_l"} and not any("judge" in s["metrics"] for s in summaries)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--base_answers=results", "--adapter_dir={adapter}"], "no base is asked. Give --with_base"),
        (["--base_answers=results"], "--base_answers: it has an effect only with --adapter_dir"),
        (["--base_answers=nowhere", "--adapter_dir={adapter}", "--with_base"], "cannot read nowhere"),
    ],
)
def test_base_answers_that_mean_nothing_are_refused(flags, words, model_dir, adapter_dir, eval_file, tmp_path, capsys):
    base = [f"--model={model_dir}", f"--eval_dataset={eval_file}", f"--output_path={tmp_path / 'o.jsonl'}"]
    refused(capsys, eval_multigpu.main, [*base, *(flag.format(adapter=adapter_dir) for flag in flags)], words)


@pytest.mark.slow
def test_finished_suites_of_a_curve_are_not_asked(model_dir, adapter_dir, suite_dir, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from evaluation import lm_eval_results

    asked, evaluate_suite = [], lm_eval_results.evaluate_suite

    def watched(model, tokenizer, suite, *args) -> SuiteAnswers:
        asked.append(suite.name)
        return evaluate_suite(model, tokenizer, suite, *args)

    monkeypatch.setattr(lm_eval_results, "evaluate_suite", watched)

    def curve(out: str, *more: str) -> int:
        asked.clear()
        flags = [f"--base_model_path={model_dir}", f"--adapter_dir={adapter_dir}", f"--task_dir={suite_dir}"]
        flags += ["--suite=mine_few", "--device=cpu", f"--output_path={tmp_path / out / 'out.jsonl'}"]
        eval_multigpu.main([*flags, CURVE, *more])
        return len(asked)

    assert curve("a") == 3
    shutil.rmtree(tmp_path / "a" / "out" / "0.5")
    assert curve("a") == 1
    assert curve("b", f"--base_answers={tmp_path / 'a' / 'out' / '0'}") == 3
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert curve("a", "--n_samples=2") == 3
