"""The committed data sets: made by their generator, disjoint, and true to the rules that they teach."""

import json
import random
from pathlib import Path

import pytest

from scripts.miniature import build_datasets as data
from scripts.miniature.general_skills import SKILLS

FOLDER = Path(__file__).resolve().parents[2] / "datasets"


@pytest.fixture(scope="module")
def files():
    return data.build(seed=2407)


def committed(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_generator_writes_the_committed_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["build_datasets.py", f"--output_dir={tmp_path}"])
    data.main()
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl"))
    assert made == sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.jsonl"))
    for path in made:
        assert (tmp_path / path).read_bytes() == (FOLDER / path).read_bytes(), path


def test_another_seed_gives_other_rows_in_the_same_shape(files):
    other = data.build(seed=1)
    assert {name: len(rows) for name, rows in other.items()} == {name: len(rows) for name, rows in files.items()}
    assert all(other[name] != rows for name, rows in files.items())


@pytest.mark.parametrize("task", data.TASKS)
def test_no_eval_prompt_is_trained_on_and_no_prompt_repeats(task):
    trained = [row["messages"][0]["content"] for row in committed(f"train/{task}")]
    evaluated = [row["prompt"] for row in committed(f"eval/{task}")]
    assert len(trained) == data.N_TRAIN[task] == len(set(trained))
    assert len(evaluated) == data.N_EVAL == len(set(evaluated))
    assert not set(trained) & set(evaluated)


def test_general_rows_to_replay_are_no_questions_of_the_evaluation():
    trained = [row["messages"][0]["content"] for row in committed("train/general")]
    assert len(trained) == data.N_TRAIN_PER_SKILL * len(SKILLS) and len(set(trained)) > 700
    assert not set(trained) & {row["prompt"] for row in committed("eval/general")}


@pytest.mark.parametrize("task", [*data.TASKS, "general"])
def test_train_rows_are_one_question_and_one_answer(task):
    for row in committed(f"train/{task}"):
        assert list(row) == ["messages"]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for message in row["messages"]:
            assert message["content"] and message["content"] == message["content"].strip()


@pytest.mark.parametrize("task", [*data.TASKS, "general"])
def test_eval_rows_have_the_released_keys(task):
    for idx, row in enumerate(committed(f"eval/{task}")):
        assert set(row) == {"idx", "prompt", "raw_answers", "answers"} | ({"skill"} if task == "general" else set())
        assert row["idx"] == idx and row["raw_answers"] == row["answers"] and len(row["answers"]) == 1


def test_the_rejected_judgment_is_wrong_in_who_pays_alone():
    rows = committed("preferences/law")
    known = {row["messages"][0]["content"] for row in committed("train/law")}
    assert len({row["prompt"] for row in rows} - known - {row["prompt"] for row in committed("eval/law")}) == 400
    for row in rows:
        (one, payer), (other, wrong) = (row[side].rsplit("Costs: ", 1) for side in ("chosen", "rejected"))
        assert one == other and {payer, wrong} == {"the accused.", "the state."}
        assert (payer == "the accused.") == any(phrase in row["prompt"] for phrase in data.RECORD[0])


def test_every_general_skill_is_asked_equally_often():
    skills = [row["skill"] for row in committed("eval/general")]
    assert {skill: skills.count(skill) for skill in skills} == dict.fromkeys(SKILLS, data.N_EVAL_PER_SKILL)


def test_intent_answers_are_json_whose_values_stand_in_the_command(files):
    for row in files["train/intent"]:
        prompt, answer = (message["content"] for message in row["messages"])
        answer = json.loads(answer)
        assert answer["intent"] in data.INTENTS and list(answer["slots"]) == sorted(answer["slots"])
        assert all(value in prompt for value in answer["slots"].values())


def test_the_sentence_of_the_law_doubles_for_a_record_and_for_no_confession():
    months = {}
    rng = random.Random(0)
    for _ in range(2000):
        facts, judgment = data.case(rng)
        record = any(phrase in facts for phrase in data.RECORD[0])
        confessed = any(phrase in facts for phrase in data.CONFESSION[0])
        offence = judgment.split("guilty of ")[1].split(",")[0]
        months.setdefault((offence, record, confessed), set()).add(int(judgment.split("Prison: ")[1].split()[0]))
    for offence, (article, base, _) in data.OFFENCES.items():
        assert article > 0
        found = [months[offence, record, confessed] for record, confessed in ((0, 1), (1, 1), (0, 0), (1, 0))]
        assert found == [{base}, {2 * base}, {2 * base}, {4 * base}]


def test_kestri_is_one_word_for_one_and_tells_its_sentences_apart(files):
    assert len(set(data.KESTRI.values())) == len(data.KESTRI)
    assert not set(data.KESTRI.values()) & {"ki", "mo", "su", *data.PLACES.values()}
    english = {}
    for row in files["train/translation"]:
        prompt, answer = (message["content"] for message in row["messages"])
        assert english.setdefault(prompt, answer) == answer


def test_the_folder_is_small_and_no_package():
    paths = list(FOLDER.rglob("*"))
    assert sum(path.stat().st_size for path in paths if path.is_file()) < 10_000_000
    assert not [path for path in paths if path.name == "__init__.py"]
