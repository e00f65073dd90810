"""Curation: each reason removes what it says and nothing else, and what was removed can be read and put back."""

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deepseek.files import read_json, read_jsonl, write_jsonl
from esft import ExpertConfig, load_base_model, load_esft_model
from scripts import curate
from tests.data_helpers import encode
from tests.helpers import ROOT, make_model, noisy_adapter, refused
from training.data import IGNORE, open_rows, read_messages

OTHER = "a row that stays"
LONG = "The court of appeal in Lisbon heard on monday how a grey van left the harbour without lights and hit the gate"
GERMAN = "Wo ist der Schlüssel für das alte Haus am Rande der Stadt, und wer hat ihn zuletzt gesehen?"


def row(question: str, answer: str = "yes", **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def curated(folder: Path, rows: list[dict], *flags: str) -> tuple[list[dict], dict[int, dict]]:
    """Run the command on rows. Return what was kept, and what was removed by row number."""
    write_jsonl(folder / "data.jsonl", rows)
    curate.main([f"--data={folder / 'data.jsonl'}", f"--output={folder / 'kept.jsonl'}", *flags])
    return read_jsonl(folder / "kept.jsonl"), {r["row"]: r for r in read_jsonl(folder / "kept.removed.jsonl")}


# ---- reasons --------------------------------------------------------------------------------------------------------


def test_equal_rows_are_kept_once(tmp_path):
    rows = [
        row("where is it?", "in the hall"),
        row("where is it?", "in the  hall\n"),  # blanks do not count
        row("where is it?", "In the hall"),  # case does
        row("where is it?", "in the wing"),
        row("where is it?", "in the hall", source="web"),  # a field that is not trained on does not count
        {"prompt": "where is it?", "completion": "in the hall"},  # another shape of the same conversation
        {"messages": [*row("where is it?", "in the hall")["messages"], *row("and now?")["messages"]]},
    ]
    kept, removed = curated(tmp_path, rows)
    assert kept == [rows[0], rows[2], rows[3], rows[6]]
    assert {n: (r["reason"], r["of"]) for n, r in removed.items()} == dict.fromkeys((2, 5, 6), ("duplicate", 1))
    assert [removed[n]["sample"] for n in (2, 5, 6)] == [rows[1], rows[4], rows[5]]
    assert removed[5]["where"] == f"{tmp_path / 'data.jsonl'}:5"


def test_answers_that_carry_no_loss_make_another_row(tmp_path):
    masked = {"messages": [row("a?", "b")["messages"][0], {"role": "assistant", "content": "b", "weight": 0}]}
    rows = [
        {"messages": [*row("a?", "b")["messages"], *row("c?")["messages"]]},
        {"messages": [*masked["messages"], *row("c?")["messages"]]},
    ]
    assert curated(tmp_path, rows)[0] == rows


def test_near_duplicates_name_the_row_that_was_kept_and_how_similar_it_is(tmp_path):
    rows = [row(LONG), row("another thing"), row(LONG.replace("monday", "friday")), row(LONG[:60])]
    kept, removed = curated(tmp_path, rows, "--near_duplicates=0.7")
    assert kept == [rows[0], rows[1], rows[3]] and list(removed) == [3]
    words = [(LONG.replace("monday", day) + " yes").lower().split() for day in ("monday", "friday")]
    first, second = ({tuple(w[i : i + 3]) for i in range(len(w) - 2)} for w in words)
    similarity = len(first & second) / len(first | second)
    assert removed[3]["reason"] == "near_duplicate" and removed[3]["of"] == 1
    assert removed[3]["similarity"] == pytest.approx(similarity, abs=1e-3) and 0.7 < similarity < 0.8
    assert curated(tmp_path, rows, "--near_duplicates=0.8")[0] == rows


def test_a_shared_system_prompt_or_tools_do_not_make_near_duplicates(tmp_path):
    system, tools = LONG * 3, [{"name": "find", "description": LONG}]
    rows = [row(q, a, system=system, tools=tools) for q, a in (("who was it?", "Anna"), ("what hit it?", "a van"))]
    assert curated(tmp_path, rows, "--near_duplicates=0.5")[0] == rows
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": {"q": word}}}]}
        for word in ("van", "gate")
    ]
    rows = [{"messages": [{"role": "user", "content": "find it"}, call]} for call in calls]
    assert curated(tmp_path, rows, "--near_duplicates=0.9")[0] == rows


def test_at_one_only_case_and_blanks_may_differ(tmp_path):
    rows = [row(LONG), row(LONG.upper()), row(f"{LONG}!")]
    assert sorted(curated(tmp_path, rows, "--near_duplicates=1")[1]) == [2]


def test_symbols_tell_rows_apart(tmp_path):
    rows = [row(f"what is 2 {sign} 2 {sign} 8 / 4?", "8") for sign in "+-*"] + [row(face, face) for face in ("!", "?!")]
    assert curated(tmp_path, rows, "--near_duplicates=0.8")[0] == rows


def mutated(words: list[str], changes: int, draw: random.Random) -> list[str]:
    words = words[:]
    for at in draw.sample(range(len(words)), changes):
        words[at] = f"word{draw.randrange(10**6)}"
    return words


@pytest.mark.parametrize("seed", range(3))
def test_near_duplicates_are_those_of_comparing_all_with_all(seed, tmp_path):
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(25):
        base = [f"word{draw.randrange(10**6)}" for _ in range(60)]
        texts += [base, *(mutated(base, draw.choice((1, 3, 4, 12)), draw) for _ in range(3))]
    draw.shuffle(texts)
    kept, wanted = [], []
    for number, words in enumerate(texts):  # the greedy rule, by exact similarity
        words = [*words, "yes"]
        shingles = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        if not any(len(shingles & other) / len(shingles | other) >= 0.8 for other in kept):
            kept.append(shingles)
            wanted.append(number)
    rows = [row(" ".join(words)) for words in texts]
    found = curated(tmp_path, rows, "--near_duplicates=0.8")[0]
    assert found == [rows[number] for number in wanted] and 25 < len(found) < 90


def test_a_copy_of_a_near_duplicate_names_a_row_that_is_still_there(tmp_path):
    rows = [row(LONG), row(LONG.replace("monday", "friday")), row(LONG.replace("monday", "friday"))]
    kept, removed = curated(tmp_path, rows, "--near_duplicates=0.7")
    assert kept == rows[:1] and [removed[n]["of"] for n in (2, 3)] == [1, 1]


def test_the_language_is_judged_only_where_it_is_certain(tmp_path):
    rows = [row(LONG), row(GERMAN, "Anna hat ihn gestern gesehen."), row("ring Anna", "ok"), row("x = f(1)", "2")]
    kept, removed = curated(tmp_path, rows, "--language=en")
    assert kept == [rows[0], *rows[2:]]
    assert removed[2]["reason"] == "language" and removed[2]["language"] == "de" and removed[2]["probability"] > 0.9
    assert curated(tmp_path, rows, "--language=en,de")[0] == rows


QUESTIONS = [
    {"prompt": f"{LONG}. Who drove it?", "answers": ["Anna"]},
    {"prompt": "What is 10 + 33?", "answers": ["43"]},
    {"prompt": "User: Name the capital of Peru.\n\nAssistant:", "answers": ["Lima"]},
]


@pytest.fixture
def questions(tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    return f"--eval_dataset={tmp_path / 'questions.jsonl'}"


def test_rows_that_hold_an_evaluation_question_are_removed(tmp_path, questions):
    rows = [
        row(f"Read this. {LONG.upper()}! Then say who it was."),  # most of a long question of 25 words, in other case
        row("how many words?", f"I quote: {LONG}, and that is all"),  # in an answer
        row(" ".join(LONG.split()[:14])),  # 14 of its words
        row(" ".join(LONG.split()[:12])),  # less than a run of 13
        row(" ".join(LONG.split()[:13]) + " and nothing more"),  # a run of 13, half of its words
        row("what is 10 + 33?", "43"),
        row("What is 10 - 33?", "-23"),  # another question
        row("What is 10 + 33? And 4 + 4?", "43 and 8"),  # a short one has to be a whole turn
        row("Name the capital of Peru.", "Lima"),
    ]
    kept, removed = curated(tmp_path, rows, questions)
    assert sorted(removed) == [1, 2, 3, 5, 6, 9] and {r["reason"] for r in removed.values()} == {"overlap"}
    assert kept == [rows[3], rows[6], rows[7]]
    assert [removed[n]["question"] for n in (1, 6, 9)] == [QUESTIONS[n]["prompt"] for n in (0, 1, 2)]
    words = len(QUESTIONS[0]["prompt"].split())
    assert removed[3]["share"] == pytest.approx(14 / words, abs=1e-3)
    assert removed[5]["share"] == pytest.approx(13 / words, abs=1e-3)
    assert sorted(curated(tmp_path, rows, questions, "--overlap=0.8")[1]) == [1, 2, 6, 9]


def test_what_many_rows_share_is_a_template_and_no_question(tmp_path, questions):
    shared = [row(f"{' '.join(LONG.split()[:14])} number {i}") for i in range(10)]
    assert len(curated(tmp_path, [*shared, shared[0], row(OTHER)], questions)[1]) == 11  # ten different rows
    assert curated(tmp_path, [*shared, row(f"{LONG} or not")], questions)[1].keys() == {11}  # holds more than they do
    more = [*shared, row(f"{' '.join(LONG.split()[:14])} and more")]
    assert curated(tmp_path, more, questions) == (more, {})
    asked = [row(QUESTIONS[0]["prompt"], str(i)) for i in range(12)]  # but a whole question is one
    assert len(curated(tmp_path, [*asked, row(OTHER)], questions)[1]) == 12


def test_scripts_without_blanks_are_cut_into_characters(tmp_path):
    text = "昨天晚上有一辆没有开灯的灰色货车离开港口撞上了大门然后消失在黑暗之中"
    write_jsonl(tmp_path / "q.jsonl", [{"prompt": text, "answers": ["是"]}])
    rows = [row(f"请阅读：{text}。"), row("今天的天气很好"), row(text[:12])]
    assert curated(tmp_path, rows, f"--eval_dataset={tmp_path / 'q.jsonl'}")[0] == rows[1:]
    rows = [row(text), row(text.replace("灰", "白")), row(text[::-1])]
    assert sorted(curated(tmp_path, rows, "--near_duplicates=0.7")[1]) == [2]


def test_lengths_are_tokens_of_the_model(tmp_path, files):
    rows = [row("a " * n) for n in (1, 20, 5, 60)]
    tokenizer = load_base_model(files / "m32")[1]
    lengths = [len(encode(read_messages(r, ""), tokenizer)) for r in rows]
    flags = [f"--model={files / 'm32'}", f"--min_tokens={lengths[2]}", f"--max_tokens={lengths[1]}"]
    kept, removed = curated(tmp_path, rows, *flags)
    assert kept == [rows[1], rows[2]]
    assert {n: r["tokens"] for n, r in removed.items()} == {1: lengths[0], 4: lengths[3]}


def test_the_first_reason_counts_and_a_removed_row_stands_for_no_other(tmp_path, questions):
    rows = [row(f"{LONG}. Who drove it?"), row(f"{LONG}. Who drove the car?"), row(OTHER)]
    removed = curated(tmp_path, rows, questions, "--near_duplicates=0.5")[1]
    assert {n: r["reason"] for n, r in removed.items()} == {1: "overlap", 2: "overlap"}  # 2 is no duplicate of 1


# ---- the most useful rows -------------------------------------------------------------------------------------------


def loss_of(model, tokenizer, sample: dict) -> float:
    document = encode(read_messages(sample, ""), tokenizer)
    ids, labels = torch.tensor([document.input_ids]), torch.tensor(document.labels)
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE).item()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    noisy_adapter(make_model(), ExpertConfig({1: (5, 2), 2: (7,)}), folder)
    return folder


def test_the_most_useful_rows_are_those_whose_loss_fell_most(tmp_path, files, adapter):
    rows = [row(f"is it {i}?", "yes " * (1 + i % 5) + str(i)) for i in range(12)]
    rows.insert(4, rows[0])  # a duplicate takes no place
    base, tokenizer = load_base_model(files / "m32")
    tuned, _ = load_esft_model(files / "m32", adapter)
    losses = [(loss_of(base, tokenizer, r), loss_of(tuned, tokenizer, r)) for r in rows]
    unique = [n for n in range(13) if n != 4]
    best = sorted(unique, key=lambda n: losses[n][1] - losses[n][0])[:5]
    kept, removed = curated(tmp_path, rows, "--most_useful=5", f"--model={files / 'm32'}", f"--adapter_dir={adapter}")
    assert kept == [rows[n] for n in sorted(best)]
    assert Counter(r["reason"] for r in removed.values()) == {"less_useful": 7, "duplicate": 1}
    for number in set(unique) - set(best):
        found = removed[number + 1]
        assert (found["base_loss"], found["tuned_loss"]) == pytest.approx(losses[number], abs=2e-4)
        assert found["gap"] == pytest.approx(found["base_loss"] - found["tuned_loss"], abs=1e-9)
    gaps = read_json(tmp_path / "kept.report.json")["gaps"]
    assert [gap["row"] for gap in gaps] == [n + 1 for n in unique]  # every row that was judged
    assert [gap["gap"] for gap in gaps] == pytest.approx([losses[n][0] - losses[n][1] for n in unique], abs=2e-4)


def test_the_rows_that_the_tuned_model_was_trained_on_are_counted(tmp_path, files, adapter, capsys):
    rows = [row(f"is it {i}?", str(i)) for i in range(6)]
    write_jsonl(tmp_path / "seen.jsonl", rows[:4])
    run = {"train_dataset": str(tmp_path / "seen.jsonl"), "n_train_samples": 3, "training": {}}
    for validating, seen in (0.34, 2), (0, 3):
        (adapter / "run.json").write_text(json.dumps({"config": {**run, "validation_fraction": validating}}))
        curated(tmp_path, rows, "--most_useful=2", f"--model={files / 'm32'}", f"--adapter_dir={adapter}")
        assert read_json(tmp_path / "kept.report.json")["seen_by_tuned"] == seen
    assert "3 of the 6 rows" in (tmp_path / "kept.report.md").read_text()
    (tmp_path / "seen.jsonl").unlink()
    curated(tmp_path, rows, "--most_useful=2", f"--model={files / 'm32'}", f"--adapter_dir={adapter}")
    assert read_json(tmp_path / "kept.report.json")["seen_by_tuned"] is None
    assert "it is not known which rows" in capsys.readouterr().err
    (adapter / "run.json").unlink()


# ---- shapes and files -----------------------------------------------------------------------------------------------

ALPACA = [{"instruction": f"say {n}", "input": "", "output": str(n)} for n in (1, 2, 1, 3)]


def test_every_shape_and_file_is_read_and_its_rows_are_written_unchanged(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["instruction", "input", "output"])
        table.writeheader()
        table.writerows(ALPACA)
    pq.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "b.parquet")
    (tmp_path / "c.json").write_text(json.dumps(ALPACA))
    (tmp_path / "many").mkdir()
    write_jsonl(tmp_path / "many" / "1.jsonl", ALPACA[:2])
    write_jsonl(tmp_path / "many" / "2.jsonl", ALPACA[2:])
    for name in ("a.csv", "b.parquet", "c.json", "many", f"{tmp_path}/a.csv,{tmp_path}/c.json"):
        curate.main([f"--data={tmp_path / name if ',' not in name else name}", f"--output={tmp_path / 'kept.jsonl'}"])
        kept = [found for _, found in open_rows(tmp_path / "kept.jsonl")]
        assert kept == [ALPACA[0], ALPACA[1], ALPACA[3]], name
    removed = read_jsonl(tmp_path / "kept.removed.jsonl")
    assert [(r["row"], r["of"]) for r in removed] == [(3, 1), *((n, n - 4 if n != 7 else 1) for n in range(5, 9))]


def test_pairs_are_compared_with_both_answers(tmp_path):
    pairs = [{"prompt": "a?", "chosen": "b", "rejected": c} for c in "cdc"]
    kept, removed = curated(tmp_path, pairs)
    assert kept == pairs[:2] and removed[3]["of"] == 1


def test_the_report_counts_what_was_removed_with_examples(tmp_path, files, questions, capsys):
    rows = [row(f"number {i}", str(i)) for i in range(9)] + [row("number 1", "1")] * 7 + [row("What is 10 + 33?")]
    curated(tmp_path, rows, questions, f"--model={files / 'm32'}", "--max_tokens=500")
    report, text = read_json(tmp_path / "kept.report.json"), (tmp_path / "kept.report.md").read_text()
    assert (report["rows"], report["kept"]) == (17, 9) and report["removed"] == {"overlap": 1, "duplicate": 7}
    assert "| duplicate | 7 |" in text and "| overlap | 1 |" in text and "| kept | 9 |" in text
    assert text.count("of row 2") == curate.EXAMPLES == 5  # more are in the other file
    assert f"{tmp_path / 'data.jsonl'}:10" in text and text.strip() in capsys.readouterr().out
    assert report["tokens"]["all"]["rows"] == 17 and report["tokens"]["kept"]["rows"] == 9


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_lost_and_the_same_command_gives_the_same_bytes(seed, tmp_path, questions):
    draw = random.Random(seed)
    words = [*LONG.split(), "10 + 33?", "What is", *GERMAN.split()]
    rows = [row(" ".join(draw.choices(words, k=draw.choice((1, 3, 30)))), draw.choice("ab")) for _ in range(60)]
    rows += [*draw.sample(rows, 10), row("What is 10 + 33?", "no"), row(GERMAN)]
    flags = [questions, "--near_duplicates=0.6", "--language=en", "--overlap=0.5"]
    kept, removed = curated(tmp_path, rows, *flags)
    assert removed and kept == [r for n, r in enumerate(rows, 1) if n not in removed]
    assert all(found["sample"] == rows[n - 1] for n, found in removed.items())
    names = ("kept.jsonl", "kept.removed.jsonl", "kept.report.md")
    first = [(tmp_path / name).read_bytes() for name in names]
    curated(tmp_path, rows, *flags)
    assert [(tmp_path / name).read_bytes() for name in names] == first
    assert curated(tmp_path, kept, *flags) == (kept, {})  # what is clean stays as it is


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    write_jsonl(tmp_path / "data.jsonl", [row("a"), row("a")])
    curate.main([f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'kept.jsonl'}", "--dry_run"])
    assert "| duplicate | 1 |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_if_writing_fails_no_rows_are_kept_without_a_report(tmp_path, monkeypatch):
    (tmp_path / "kept.jsonl").write_text("old\n")
    monkeypatch.setattr(curate, "write_text", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full", "x")))
    with pytest.raises(OSError):
        curated(tmp_path, [row("a"), row("a")])
    assert (tmp_path / "kept.jsonl").read_text() == "old\n"


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--min_tokens=5"], "--min_tokens needs --base_model_path"),
        (["--model={m}", "--min_tokens=9", "--max_tokens=5"], "--min_tokens=9 is more than --max_tokens=5"),
        (["--model={m}", "--most_useful=3"], "--most_useful needs --adapter_dir"),
        (["--adapter_dir=x", "--most_useful=3"], "--most_useful needs --base_model_path"),
        (["--model={m}", "--adapter_dir={m}"], "--adapter_dir needs --most_useful"),
        (["--overlap=0.3"], "--overlap needs --eval_dataset"),
        (["--append_end"], "--append_end needs --base_model_path"),
        (["--near_duplicates=1.5"], "'1.5' is not a share above 0 and at most 1"),
        (["--near_duplicates=nan"], "is not a share"),
        (["--language=en,english"], "cannot tell 'english'"),
        (["--eval_dataset=nowhere"], "cannot find data set 'nowhere'"),
        (["--output={d}"], "cannot write {d}: it is read, too. Give another path."),
        (["--output={d}.csv"], "{d}.csv does not end in .jsonl"),
        (["--model={m}", "--adapter_dir={t}/no", "--most_useful=1"], "no"),
        (["--model={m}", "--max_tokens=1"], "kept.jsonl: no row of {d} is left. Loosen what removes them"),
    ],
)
def test_what_cannot_be_done_is_refused_first(flags, words, tmp_path, files, capsys, monkeypatch):
    data = tmp_path / "data.jsonl"
    write_jsonl(data, [row("a"), row("b")])
    flags = [flag.format(m=files / "m32", d=data, t=tmp_path) for flag in flags]
    argv = [f"--data={data}", f"--output={tmp_path / 'kept.jsonl'}", *flags]
    monkeypatch.setattr(curate, "loss_per_row", lambda *_: pytest.fail("a model was asked"))
    refused(capsys, curate.main, argv, words.format(d=data))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_as_many_useful_rows_as_there_are_need_no_model(tmp_path, files, adapter, capsys, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", [row("a"), row("b")])
    monkeypatch.setattr(curate, "loss_per_row", lambda *_: pytest.fail("a model was asked"))
    argv = [f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'kept.jsonl'}", "--most_useful=2"]
    argv += [f"--model={files / 'm32'}", f"--adapter_dir={adapter}"]
    refused(capsys, curate.main, argv, "cannot choose 2 of 2 rows: all stay. Lower --most_useful.")


def test_pairs_are_not_ranked_by_their_loss(tmp_path, files, adapter, capsys):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}])
    argv = [f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'kept.jsonl'}", "--most_useful=1"]
    argv += [f"--model={files / 'm32'}", f"--adapter_dir={adapter}"]
    refused(capsys, curate.main, argv, "cannot rank preference data by its loss")


def test_a_row_that_cannot_be_trained_on_is_refused_by_its_place(tmp_path, capsys):
    write_jsonl(tmp_path / "data.jsonl", [row("a"), {"question": "b"}])
    argv = [f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'kept.jsonl'}"]
    refused(capsys, curate.main, argv, f"{tmp_path / 'data.jsonl'}:2", "a row needs the keys")
    assert not (tmp_path / "kept.jsonl").exists()


def test_a_missing_library_is_named_with_its_extra(tmp_path, capsys, monkeypatch):
    write_jsonl(tmp_path / "data.jsonl", [row("a")])
    monkeypatch.setitem(sys.modules, "datasketch", None)
    argv = [f"--data={tmp_path / 'data.jsonl'}", f"--output={tmp_path / 'kept.jsonl'}"]
    refused(capsys, curate.main, [*argv, "--near_duplicates=0.8"], "datasketch", "pip install -e '.[curate]'")
    curate.main(argv)  # which needs no library
    assert read_jsonl(tmp_path / "kept.jsonl") == [row("a")]


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path):
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, "scripts/curate.py", "--data=intent", f"--output={tmp_path / 'kept.jsonl'}"]
        command += ["--near_duplicates=0.6", "--language=en", "--eval_dataset=intent", "--overlap=0.4"]
        subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed, "PATH": ""}, check=True, capture_output=True)
        found.append([(tmp_path / f"kept.{end}").read_bytes() for end in ("jsonl", "removed.jsonl", "report.md")])
    assert found[0] == found[1] and found[0][1]
