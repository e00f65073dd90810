"""Metrics: the published scores are met, no prediction crashes, what cannot be computed is no zero."""

import json
import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks import EVALUATORS, TextEvaluator, get_evaluator, load_rows
from evaluation import code_runner
from evaluation.generation import Completion, score
from evaluation.metrics import bleu, final_number, json_exact_match, number_match, slot_f1
from evaluation.results import summarize

GOLD = '{"intent": "Alarm-Update", "slots": {"date": "周一", "notes": ["跑步", "吃饭"]}}'


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_intent_gives_the_published_score_of_every_released_answer(official):
    released = read(official / "intent" / "completions.jsonl")
    rows = load_rows(str(official / "intent" / "eval.jsonl"))
    assert len(released) == len(rows) == 60 and len({line["score"] for line in released}) == 2
    for row, line in zip(rows, released):
        ours = score(row, Completion(line["example"]["raw_prediction"], 1, False), get_evaluator("intent"))
        assert ours["example"] == line["example"]
        assert ours["score"] == line["score"], line["example"]["raw_prediction"]
        assert (ours["metrics"]["slot_f1"] == 100) == (line["score"] == 1)  # here, no answer fails on the intent alone


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (GOLD, 100),
        (f" \n{GOLD}。\n\n", 100),
        (GOLD + ".", 100),
        ('{"slots": {"notes": ["跑步", "吃饭"], "date": "周一"}, "intent": "Alarm-Update"}', 100),
        (GOLD.replace('["跑步", "吃饭"]', '["吃饭", "跑步"]'), 100),  # as in three of the published answers
        (GOLD.replace('["跑步", "吃饭"]', '["吃饭", "跑步", "跑步"]'), 0),
        (GOLD.replace('["跑步", "吃饭"]', '["跑步"]'), 0),
        (GOLD.replace('["跑步", "吃饭"]', '"跑步, 吃饭"'), 0),
        (GOLD.replace('["跑步", "吃饭"]', '[["吃饭"], {"a": 1}, 3]'), 0),
        (GOLD.replace('"slots"', '"others"'), 0),
        (GOLD.replace("Alarm-Update", "Alarm-Query"), 0),
        (GOLD + "。。", 0),
        ("答案：" + GOLD, 0),
        (GOLD[:-1], 0),
        ("", 0),
    ],
)
def test_intent_compares_values_not_texts(prediction, expected):
    assert EVALUATORS["intent"].metrics(prediction, [GOLD])["exact_match"] == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ('{"slots": {"a": [{"x": [1, 2]}, 3]}}', '{"slots": {"a": [3, {"x": [1, 2]}]}}', 100),
        ('{"slots": {"a": [{"x": [1, 2]}]}}', '{"slots": {"a": [{"x": [2, 1]}]}}', 0),  # a list within a value
        ('{"slots": {"a": [true, 2]}}', '{"slots": {"a": [2, 1]}}', 0),
        ('{"slots": ["a", "b"]}', '{"slots": ["b", "a"]}', 0),  # not a slot's list
        ('["a", "b"]', '["b", "a"]', 0),
    ],
)
def test_only_the_list_of_a_slot_may_come_in_any_order(prediction, answer, expected):
    assert json_exact_match(prediction, answer) == expected


def test_the_best_of_several_gold_answers_counts():
    other = '{"intent": "Calendar-Query", "slots": {}}'
    assert EVALUATORS["intent"].metrics(other, [GOLD, other]) == {"exact_match": 100, "slot_f1": 100}
    assert EVALUATORS["general"].metrics(" 42\n", ["forty-two", "42"]) == {"exact_match": 100}
    assert EVALUATORS["general"].metrics("4 2", ["42"]) == {"exact_match": 0}


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        (GOLD, GOLD, 100),
        ('{"slots": {"date": "周一"}}', GOLD, 50),  # precision 1, recall 1/3
        ('{"slots": {"notes": ["吃饭", "跑步"], "date": "周二"}}', GOLD, 200 / 3),
        ('{"slots": {"date": ["周一", "周一", "周一"]}}', GOLD, 100 / 3),  # a repeated value counts once
        ('{"slots": ["date"]}', GOLD, 0),
        ("{", GOLD, 0),
        ('{"intent": "x"}', '{"intent": "x", "slots": {}}', 100),
        ('{"slots": {"date": 1}}', '{"slots": {}}', 0),
        ("no", '{"slots": {}}', 0),
        (GOLD, "not JSON", None),
    ],
)
def test_slot_f1(prediction, answer, expected):
    assert slot_f1(prediction, answer) == (None if expected is None else pytest.approx(expected))


def test_text_metrics_read_chinese_and_order():
    law = EVALUATORS["law"].metrics
    assert law("判处有期徒刑三年", ["判处有期徒刑三年。"])["rouge_l"] == 100
    assert law("判处有期徒刑五年", ["判处有期徒刑三年"])["rouge_l"] == pytest.approx(700 / 8)
    assert law("the Cat sat", ["The cat sat!"])["rouge_l"] == 100
    assert law("sat cat the", ["the cat sat"])["rouge_l"] == pytest.approx(100 / 3)
    translation = EVALUATORS["translation"].metrics
    assert translation("a small house", ["a small house"])["chrf"] == pytest.approx(100)
    assert 0 < translation("a small mouse", ["a small house"])["chrf"] < 100
    assert translation("", ["a small house"]) == {"chrf": 0, "bleu": 0, "rouge_l": 0}


def test_bleu_counts_the_n_grams_that_there_are_and_reads_chinese():
    assert bleu("a small house", "a small house") == pytest.approx(100)  # no four-gram in it, and none missed
    words = bleu("the cat sat on the red mat", "the cat sat on the mat")
    assert words == pytest.approx(100 * (6 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25)
    assert bleu("判处有期徒刑三年", "判处有期徒刑三年") == pytest.approx(100)
    assert 50 < bleu("判处有期徒刑五年", "判处有期徒刑三年") < 100  # one word to a tokenizer of spaces: 0
    assert bleu("これはペンです", "これはペンだ") > 50 and bleu("", "这是") == 0 and bleu("x", " ") is None
    assert list(EVALUATORS["law"].metrics("a", ["a"])) == ["rouge_l", "chrf", "bleu"]
    primaries = {"intent": "exact_match", "summary": "rouge_l", "law": "rouge_l", "translation": "chrf"}
    assert {name: EVALUATORS[name].primary for name in primaries} == primaries


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 4 = 7, so\n#### 7", "7"), ("#### 1,234,567.50 dollars", "1234567.5"), ("first 5, then 6.", "6"),
        ("#### 7\n\nThat took 3 steps.", "7"), ("#### ", None), ("7 apples ####", "7"), ("it costs $18", "18"),
        ("-5", "-5"), ("-$5", "-5"), ("−3 °C", "-3"), ("10-5", "5"), ("- 5 apples", "5"), ("50%", "50"),
        ("€2.50", "2.5"), ("3/4 cup", "3/4"), ("1 1/2", "3/2"), ("1½ hours", "3/2"), ("½", "1/2"), ("12 m²", "12"),
        (r"\boxed{\frac{3}{4}} in 2 steps", "3/4"), (r"\boxed{12}", "12"), (r"1{,}000", "1000"), ("**8**.", "8"),
        ("１２元", "12"), ("答案是42。", "42"), (".5", "1/2"), ("1e3", "1000"), ("007", "7"), ("12,34", "34"),
        ("none", None), ("", None), ("1/0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_the_final_number(text, number):
    assert final_number(text) == (None if number is None else Fraction(number))


def test_math_compares_numbers_and_not_texts():
    assert (
        number_match("So she has 0.5 of it", "half\n#### 1/2") == 100 and number_match("18 eggs", "#### 18.00") == 100
    )
    assert number_match("17", "#### 18") == 0 and number_match("no idea", "#### 18") == 0
    assert number_match("18", "eighteen") is None
    for hostile in ("1,000" + ",000" * 9999, "1e" * 99999, "1 " * 99999, "\\frac{" * 9999, "#### " * 9999, "-" * 99999):
        assert number_match(hostile, "#### 18") == 0


def test_a_row_may_ask_for_its_evaluator():
    number, text = ({"prompt": "q", "raw_answers": [gold]} for gold in ("#### 4", "blue"))
    assert get_evaluator("gsm8k") is get_evaluator("x", "math") is EVALUATORS["math"]
    same = [{**number, "evaluator": "math"}] * 2
    assert get_evaluator("general", None, same) is EVALUATORS["math"]
    assert get_evaluator("general", "intent", same) is EVALUATORS["intent"]
    mixed = [same[0], text]
    evaluator = get_evaluator("general", None, mixed)
    lines = [score(row, Completion(a, 1, False), evaluator) for row, a in zip([*mixed, text], ["so 4", "blue", "red"])]
    assert [line["score"] for line in lines] == [1, 1, 0] and evaluator.primary == "score"
    assert lines[0]["metrics"] == {"score": 100, "final_number": 100, "exact_match": 0}
    assert lines[1]["metrics"] == {"score": 100, "exact_match": 100}
    summary = summarize(lines)
    assert summary["metrics"]["final_number"] == 100 and summary["missing"]["final_number"] == 0
    assert summary["mean"] == summary["metrics"]["score"] == pytest.approx(200 / 3, abs=1e-3)
    for wrong in ("maths", "", 3, ["math"]):
        with pytest.raises(ValueError, match=r"cannot score general: the evaluator .* is none of"):
            get_evaluator("general", None, [text, {**text, "evaluator": wrong}])


def predictions() -> list[str]:
    """Texts of every JSON type, whole and cut, and texts that are no JSON at all."""
    rng = random.Random(0)

    def value(depth: int) -> object:
        kind = rng.randrange(9 if depth else 6)
        if kind < 6:
            return [
                None,
                True,
                rng.randrange(-9, 9),
                rng.random() * 1e300,
                rng.choice(["", "周一", "。", "\ud800"]),
                "",
            ][kind]
        if kind == 6:
            return [value(depth - 1) for _ in range(rng.randrange(4))]
        keys = rng.choices(["intent", "slots", "date", ""], k=rng.randrange(4))
        return {key: value(depth - 1) for key in keys}

    texts = [json.dumps(value(4), ensure_ascii=rng.random() < 0.5) for _ in range(400)]
    texts += [text[: rng.randrange(len(text) + 1)] for text in texts]
    texts += [f'{{"slots": {json.dumps(value(3))}}}。' for _ in range(200)]
    texts += [
        "",
        " ",
        "。",
        ".",
        "\x00",
        "NaN",
        "-Infinity",
        "1e999",
        "9" * 5000,
        "[" * 20_000,
        '{"slots":{"a":' * 2000,
    ]
    texts += ['{"slots": {"a": %s}}' % ("[" * depth + "]" * depth) for depth in (10, 300, 900, 990, 5000)]
    return texts


TEST = {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f"}


@pytest.mark.parametrize("name", EVALUATORS)
def test_no_prediction_crashes_an_evaluator(name, monkeypatch):
    evaluator, texts = EVALUATORS[name], predictions()
    if name == "code":  # some are run, the others only made into programs
        for text in (texts[0], *texts[-16:-4]):
            assert evaluator.metrics(text, [""], TEST) in ({"pass@1": 0}, {"pass@1": 100}), text[:100]
        monkeypatch.setattr(code_runner, "run", lambda programs, limits: "" if all(programs) else "empty")
    names = evaluator.metrics("x", ["y"], TEST).keys()
    for prediction in texts:
        for answers in ([GOLD], ["plain text"], ["", "[1, 2]"]):
            found = evaluator.metrics(prediction, answers, TEST)
            assert found.keys() == names and evaluator.primary in found
            assert all(v is None or 0 <= v <= 100.001 for v in found.values()), (prediction, answers)
    assert name == "code" or all(v is None for v in evaluator.metrics("x", []).values())


def test_what_cannot_be_computed_is_counted_and_left_out_of_the_means():
    row = {"prompt": "q", "raw_answers": ["!"]}
    result = score(row, Completion("an answer", 2, False), EVALUATORS["summary"])
    assert result["score"] is None and result["metrics"]["rouge_l"] is None and result["metrics"]["chrf"] is not None
    summary = summarize([result, {**result, "score": 0.5, "metrics": {**result["metrics"], "rouge_l": 50}}])
    found = summary["n"], summary["mean"], summary["metrics"]["rouge_l"], summary["missing"]["rouge_l"]
    assert found == (2, 50, 50, 1)


def test_what_failed_has_no_score_and_is_counted():
    row = {"prompt": "q", "raw_answers": ["a"], "skill": "copy"}
    evaluator = TextEvaluator("ratio", {"ratio": lambda prediction, answer: 100 / len(prediction)})
    good, bug, none = (score(row, c, evaluator) for c in (Completion("a", 1, False), Completion("", 1, True), "why"))
    assert good["score"] == 1 and "error" not in good
    assert (bug["score"], bug["metrics"], bug["example"]["raw_prediction"]) == (None, {}, "")
    assert bug["error"] == "ZeroDivisionError: division by zero" and bug["truncated"]
    assert none["error"] == "why" and none["example"]["raw_prediction"] is None and none["tokens"] == 0
    summary = summarize([none, bug, good])
    assert (summary["n"], summary["failed"], summary["mean"], summary["missing"]) == (3, 2, 100, {"ratio": 0})
    assert summary["groups"] == {"copy": {"n": 1, "mean": 100}}


def test_evaluator_is_that_of_the_name_or_the_one_asked_for():
    assert get_evaluator("translation") is EVALUATORS["translation"]
    assert get_evaluator("my_task").primary == "rouge_l"
    assert get_evaluator("my_task", "general") is EVALUATORS["general"]
    with pytest.raises(ValueError, match="did you mean 'intent'"):
        get_evaluator("my_task", "intnet")


@pytest.mark.parametrize("module", ["sacrebleu", "rouge_score.rouge_scorer"])
def test_a_missing_library_is_one_sentence(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    get_evaluator("intent")
    with pytest.raises(ValueError, match=rf"cannot import {module}: .*pip install"):
        get_evaluator("law")


def test_rows_are_checked_and_drawn_in_order(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"idx": i, "prompt": f"q{i}", "answers": [str(i)]} for i in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [row["raw_answers"] for row in load_rows(str(path))] == [[str(i)] for i in range(20)]
    drawn = [row["idx"] for row in load_rows(str(path), 5, seed=3)]
    assert (
        len(set(drawn)) == 5 and drawn == sorted(drawn) and drawn == [r["idx"] for r in load_rows(str(path), 5, seed=3)]
    )
    for bad in (
        {"answers": ["x"]},
        {"prompt": "q"},
        {"prompt": "q", "answers": []},
        {"prompt": "q", "raw_answers": [1]},
        {"messages": []},
        {"prompt": "q", "completion": "a"},
    ):
        path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(bad))
        with pytest.raises(ValueError, match=r"mine\.jsonl:2.*prompt.*raw_answers.*answers") as error:
            load_rows(str(path))
        assert ("training data" in str(error.value)) == ("messages" in bad or "completion" in bad)
    path.write_text("")
    with pytest.raises(ValueError, match="no row"):
        load_rows(str(path))


def test_json_is_compared_as_json_and_not_as_python():
    assert json_exact_match('{"a": true}', '{"a": true}') == 100
    assert json_exact_match('{"a": 1}', '{"a": true}') == 0
    assert json_exact_match('{"b": 2, "a": [1]}', '{"a": [1], "b": 2}。') == 100
    assert json_exact_match("no JSON", '{"a": true}') == 0
