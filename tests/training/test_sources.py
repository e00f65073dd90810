"""What a data set's name may stand for, and that its rows come out as they were written."""

import bz2
import gzip
import json
import lzma

import pytest

from training.data import open_rows
from training.data.sources import HubSet, resolve

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "三\u2028 a line separator"}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def rows_of(dataset, **options) -> list[dict]:
    return [row for _, row in open_rows(str(dataset), **options)]


@pytest.mark.parametrize("name, write", [
    ("a.jsonl", lambda path: path.write_text(LINES)),
    ("a.jsonl", lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())),
    ("a.json", lambda path: path.write_text(LINES)),
    ("a.json", lambda path: path.write_text(json.dumps(ROWS, indent=1))),
    ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
    ("a.jsonl.xz", lambda path: path.write_bytes(lzma.compress(LINES.encode()))),
    ("a.json.bz2", lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode()))),
    ("a.csv", lambda path: path.write_text("text\none\nzwei ü\n三\u2028 a line separator\n")),
    ("odd [1] *name:0.5,@x.jsonl", lambda path: path.write_text(LINES)),
])  # fmt: skip
def test_a_file_of_any_format_has_its_rows(tmp_path, name, write):
    write(tmp_path / name)
    assert rows_of(tmp_path / name) == ROWS


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS))
    assert len(rows_of(path)) == 3
    path.write_text(json.dumps(ROWS[:1]))
    assert rows_of(path) == ROWS[:1]


def test_parquet_keeps_what_a_row_has_and_no_more(tmp_path):
    import datasets

    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": "q"}]},
        {"messages": [{"role": "assistant", "tool_calls": [call]}]},
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert rows_of(tmp_path / "a.parquet") == rows


def test_numbers_of_a_csv_stay_text(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\n1.50,007\nNA,x\n")
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "1.50", "completion": "007"}, {"prompt": "NA", "completion": "x"}]


def test_folders_and_patterns_are_all_their_files(tmp_path, capsys):
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps({"text": str(number)}) + "\n\n")
    (tmp_path / "README.md").write_text("not data")
    assert [row["text"] for row in rows_of(tmp_path)] == ["0", "1", "2"]
    assert "not read, as they are not data files: README.md\n" in capsys.readouterr().err
    assert [row["text"] for row in rows_of(tmp_path / "part-[12].jsonl")] == ["1", "2"]
    assert "not read" not in capsys.readouterr().err


def test_files_without_rows_do_not_hide_the_others(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.jsonl").write_text("")
    (tmp_path / "c.csv").write_text("text\n")
    (tmp_path / "d.jsonl").write_text(LINES)
    assert rows_of(tmp_path) == ROWS


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    assert rows_of(tmp_path / "a.jsonl.zst") == ROWS


def test_a_row_is_named_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n\n{"text": "two"}\n')
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    where = [place for place, _ in open_rows(f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.json'}")]
    assert where == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:4",
        *(f"{tmp_path}/b.json: row {i}" for i in (1, 2, 3)),
    ]


def test_weights_are_shares_and_no_sample_is_repeated(tmp_path, capsys):
    for name, count in (("a", 100), ("b", 40)):
        lines = [json.dumps({"text": f"{name}{i}"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    spec = f"{tmp_path / 'a.jsonl'}:0.6,{tmp_path / 'b.jsonl'}:0.4"
    found = [row["text"] for row in rows_of(spec, seed=1)]
    assert len(found) == len(set(found)) == 100 and sum(text[0] == "a" for text in found) == 60
    assert found == [row["text"] for row in rows_of(spec, seed=1)] != [row["text"] for row in rows_of(spec, seed=2)]
    assert "60 of 100, 40 of 40" in capsys.readouterr().err


@pytest.mark.parametrize("name, parts", [
    ("org/name", {}),
    ("org/name:main_config@v1.0[train[:100]]", {"config": "main_config", "revision": "v1.0", "split": "train[:100]"}),
    ("org/name@refs/convert/parquet", {"revision": "refs/convert/parquet"}),
])  # fmt: skip
def test_a_hub_id_has_its_parts(name, parts):
    assert resolve(name) == [(HubSet("org/name", **parts), None)]
    assert resolve(f"{name}:2,law")[0] == (HubSet("org/name", **parts), 2.0)


@pytest.mark.parametrize("content, told", [
    ('{"text": "a"}\n{"text": \n', r":2: not valid JSON"),
    ('{"text": "a"}\n[1]\n', r":2: expected a JSON object"),
    (b'{"text": "a"}\n{"text": "\xff"}\n', r":2: not UTF-8 text .*byte 0xff"),
    ('{"text": "\\ud800"}\n', r":1: not valid JSON .*surrogates"),
    ("", "no rows"),
    ("\n\n", "no rows"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, content, told):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=told):
        rows_of(path)


def test_an_unknown_name_is_told_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'law'"):
        resolve("lav")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read data set .*a\.txt'.*does not end in \.jsonl"):
        resolve(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="did you mean 'law'"):
        resolve("lav:0.5,summary:0.5")
    with pytest.raises(ValueError, match="weight"):
        resolve("law:0,summary:1")
