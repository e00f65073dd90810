"""eval_multigpu.py with a judge, and with rows that are scored by their own evaluators."""

import json

import pytest

import benchmarks
import esft
from evaluation import generation
from evaluation.code_runner import Limits
from evaluation.judge import NO_SCORE
from tests.helpers import KEY, PROMPTS, reply, run_eval, write_rows
from utils import run_cli


@pytest.fixture
def judged(tmp_path, server) -> list[str]:
    """The flags to reach the judge, and rows of law and of another task."""
    write_rows(tmp_path / "law.jsonl", [f"gold {i}" for i in range(6)])
    write_rows(tmp_path / "general.jsonl", ["a", "b"], PROMPTS[:2])
    flags = ["--judge_model=grader", f"--judge_base_url={server.url}", "--judge_key_env=MY_KEY"]
    return [*flags, f"--judge_cache={tmp_path / 'cache'}"]


def test_a_judge_grades_its_tasks_and_no_other(model_dir, tmp_path, server, judged, capfd):
    server.answer = lambda number, prompt: reply("Hm." if "gold 3" in prompt else "Score: 7")
    files = f"{tmp_path / 'law.jsonl'},{tmp_path / 'general.jsonl'}"
    law, general = run_eval(model_dir, files, tmp_path / "out.jsonl", *judged)
    assert (law["primary"], law["mean"], law["missing"]["judge"]) == ("judge", 70, 1)
    assert law["metrics"].keys() == {"judge", "rouge_l", "chrf", "bleu"} and law["missing"]["rouge_l"] == 0
    assert law["judge"] == {"model": "grader", "base_url": server.url, "failed": {NO_SCORE: 1}}
    assert general["primary"] == "exact_match" and "judge" not in general
    lines = [json.loads(line) for line in (tmp_path / "out.law.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [0.7, 0.7, 0.7, None, 0.7, 0.7]
    assert len(server.requests) == 7  # one of them to see whether it is there
    run_eval(model_dir, files, tmp_path / "again.jsonl", *judged)
    assert (tmp_path / "again.law.jsonl").read_text() == (tmp_path / "out.law.jsonl").read_text()
    assert len(server.requests) == 7
    printed = capfd.readouterr()
    assert "grades 0 of 2 rows of general" in printed.err and f"1 not graded: {NO_SCORE}" in printed.out
    assert "without judge" not in printed.out and f"are kept in {tmp_path / 'cache'}, too" in printed.err
    texts = [*printed, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert not any(KEY in text for text in texts)
    assert not list(tmp_path.glob(".*"))


def test_what_the_judge_failed_on_is_asked_again_without_new_answers(model_dir, tmp_path, server, judged, monkeypatch):
    command = (model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *judged)
    server.answer = lambda number, prompt: (400, {}, b"no") if "gold 2" in prompt else reply("Score: 4")
    (summary,) = run_eval(*command)
    assert summary["missing"]["judge"] == 1 and summary["judge"]["failed"] == {"Error code: 400": 1}
    server.answer = lambda number, prompt: reply("Score: 10")
    before = len(server.requests)
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
        (summary,) = run_eval(*command)
    assert len(server.requests) == before + 1 and summary["missing"]["judge"] == 0 and summary["mean"] == 50
    assert not list(tmp_path.glob(".*"))


def test_where_the_judge_failed_on_one_of_several_no_model_is_loaded_again(
    model_dir, adapter_dir, tmp_path, server, judged, monkeypatch
):
    files = f"{tmp_path / 'law.jsonl'},{tmp_path / 'general.jsonl'}"
    command = (model_dir, files, tmp_path / "out.jsonl", f"--adapter_dir={adapter_dir}", "--with_base", *judged)
    server.answer = lambda number, prompt: (400, {}, b"no") if "gold 2" in prompt else reply("Score: 4")
    run_eval(*command)
    server.answer = lambda number, prompt: reply("Score: 4")
    with monkeypatch.context() as patch:
        patch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
        law, general = run_eval(*command)
    assert law["mean"] == law["against_base"]["base"] == 40 and general["n"] == 2
    assert not list(tmp_path.glob(".*"))


def test_rows_that_are_not_graded_are_not_called_graded(model_dir, tmp_path, server, judged, capsys):
    rows = [json.loads(line) for line in (tmp_path / "law.jsonl").read_text().splitlines()]
    rows[0]["evaluator"] = "summary"
    (tmp_path / "mine.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (summary,) = run_eval(model_dir, str(tmp_path / "mine.jsonl"), tmp_path / "out.jsonl", *judged)
    assert summary["primary"] == "score" and "grades 1 of 6 rows of mine" in capsys.readouterr().err
    judged_by = [json.loads(line)["metrics"].get("judge") for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert judged_by[0] == 80 and judged_by[1:] == [None] * 5


def test_a_judge_with_base_compares_its_grades(model_dir, adapter_dir, tmp_path, server, judged):
    grades = iter(range(100))
    server.answer = lambda number, prompt: reply(f"Score: {2 if next(grades) < 7 else 9}")
    flags = [*judged, "--judge_parallel=1", f"--adapter_dir={adapter_dir}", "--with_base"]
    (summary,) = run_eval(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
    compared = summary["against_base"]
    assert (compared["base"], compared["adapter"], compared["certain"]) == (20, 90, True)


def test_without_a_key_the_offline_metric_stands_in(model_dir, tmp_path, server, judged, monkeypatch, capsys):
    flags = [flag for flag in judged if not flag.startswith("--judge_base_url")]  # which leaves OpenAI's
    for value in (None, " "):
        monkeypatch.delenv("MY_KEY") if value is None else monkeypatch.setenv("MY_KEY", value)
        (summary,) = run_eval(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *flags)
        printed = capsys.readouterr()
        assert summary["primary"] == "rouge_l" and "judge" not in summary and not server.requests
        said = "no judge graded (MY_KEY is not set); in its place: rouge_l on law"
        assert f"note: {said}" in printed.err and printed.out.endswith(f"\n{said}\n")
    run_eval(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl")
    said = "no judge graded (no --judge_model was given); in its place: rouge_l on law"
    assert capsys.readouterr().out.endswith(f"\n{said}\n")


def test_a_server_of_one_s_own_is_asked_without_a_key(model_dir, tmp_path, server, judged, monkeypatch, capsys):
    monkeypatch.delenv("MY_KEY")
    (summary,) = run_eval(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *judged)
    assert summary["primary"] == "judge" and summary["mean"] == 80
    assert not any("Authorization" in headers for _, headers, _ in server.requests)
    printed = capsys.readouterr()
    assert f"asking grader at {server.url}, without a key" in printed.err and "no judge" not in printed.out


def test_a_judge_that_refuses_ends_the_command_at_once(model_dir, tmp_path, server, judged, monkeypatch, capsys):
    server.answer = lambda number, prompt: (401, {}, f"bad key {KEY}".encode())
    monkeypatch.setattr(esft, "load_base_model", lambda *a, **k: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: run_eval(model_dir, str(tmp_path / "law.jsonl"), tmp_path / "out.jsonl", *judged))
    *_, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "Error code: 401" in error and KEY not in error


def test_math_and_code_from_rows(model_dir, tmp_path, monkeypatch, capsys):
    answers = {"right": "    return 4", "loops": "    while True: pass", "sum": "2 + 2 is 4", "word": "blue"}
    rows = [
        {
            "prompt": f"def {name}():\n",
            "test": "def check(f): assert f() == 4",
            "entry_point": name,
            "evaluator": "code",
        }
        for name in ("right", "loops")
    ]
    rows += [{"prompt": "sum", "answers": ["#### 4"], "evaluator": "math"}, {"prompt": "word", "answers": ["blue"]}]
    path = tmp_path / "general.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    by_prompt = {
        row["prompt"]: generation.Completion(answers[row.get("entry_point", row["prompt"])], 1, False) for row in rows
    }
    monkeypatch.setattr(generation, "complete", lambda model, tokenizer, prompts, **_: [by_prompt[p] for p in prompts])
    monkeypatch.setitem(benchmarks.EVALUATORS, "code", benchmarks.CodeEvaluator(Limits(wall=60, cpu=1)))
    with pytest.raises(ValueError, match="--allow_code_execution"):
        run_eval(model_dir, str(path), tmp_path / "out.jsonl")
    (summary,) = run_eval(model_dir, str(path), tmp_path / "out.jsonl", "--allow_code_execution")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines] == [1, 0, 1, 1]
    assert (summary["primary"], summary["mean"], summary["metrics"]["pass@1"], summary["failed"]) == (
        "score",
        75,
        50,
        0,
    )
    assert "this is not a sandbox" in capsys.readouterr().err
