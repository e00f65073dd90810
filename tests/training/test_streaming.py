"""A stream reads no more than is taken, and gives the same rows whenever it is asked."""

import gzip
import itertools
import json

import pytest

import datasets
from evaluation.expert_scoring import SampleSettings, sample_packs
from training import data
from training.config import read_config
from training.data import sources, stream_rows
from training.data.sources import take_rows

COUNT = 300


@pytest.fixture
def folder(tmp_path):
    """Three files of COUNT rows each. The last line of each is not JSON."""
    for name in "abc":
        rows = [json.dumps({"prompt": f"{name}{i}", "completion": f"answer {i}"}) for i in range(COUNT)]
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join([*rows, "{broken"]).encode()))
    return tmp_path


def prompts(rows) -> list[str]:
    return [row["prompt"] for _, row in rows]


def test_a_stream_reads_no_further_than_rows_are_taken(folder, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 50)
    rows = take_rows(str(folder), 100)
    assert len(set(prompts(rows))) == len(rows) == 100  # and no line that is broken was reached
    for where, row in rows:
        path, _, line = where.rpartition(":")
        assert path == str(folder / f"{row['prompt'][0]}.jsonl.gz") and int(line) == int(row["prompt"][1:]) + 1
    with pytest.raises(ValueError, match=rf"\.jsonl\.gz:{COUNT + 1}: not valid JSON"):
        take_rows(str(folder), 3 * COUNT)


def test_a_stream_is_read_once_however_its_path_is_written(folder, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 50)
    first = list(take_rows(str(folder), 50))
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sources, "stream_rows", lambda *_: pytest.fail("the stream is read again"))
    assert list(take_rows(folder.name, 50)) == first
    with pytest.raises(BaseException, match="read again"):
        take_rows(folder.name, 51)


def test_the_seed_draws_the_order(folder, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 50)
    first, again, other = (prompts(take_rows(str(folder), 60, seed=seed)) for seed in (1, 1, 2))
    assert first == again == prompts(itertools.islice(stream_rows(str(folder), seed=1), 60))
    assert first != other and first != sorted(first)


def test_sets_of_a_stream_take_turns_by_weight(tmp_path):
    for name in "ab":
        lines = [json.dumps({"prompt": name, "completion": "x"}) for _ in range(1000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    names = prompts(take_rows(f"{tmp_path / 'a.jsonl'}:0.8,{tmp_path / 'b.jsonl'}:0.2", 500))
    assert 360 < names.count("a") < 440 and len(names) == 500


def test_a_short_stream_says_that_all_is_taken(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "q", "completion": "a"}] * 3))
    assert len(take_rows(str(tmp_path / "a.json"), 10)) == 3
    assert "has 3 samples, fewer than 10" in capsys.readouterr().err


def test_a_set_of_the_hub_is_streamed(monkeypatch):
    asked = {}

    def load_dataset(*names, **options):
        asked.update(names=names, **options)
        return datasets.Dataset.from_list([{"prompt": f"{i}", "completion": "a", "x": None} for i in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    where, row = next(stream_rows("org/name:part@v1[test]"))
    assert asked == {"names": ("org/name", "part"), "revision": "v1", "split": "test", "streaming": True}
    assert where == f"org/name: row {int(row['prompt']) + 1}" and row.keys() == {"prompt", "completion"}


def test_training_and_scoring_take_a_part_of_a_stream(folder, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(sources, "WINDOW", 50)
    words = [
        "base_model_path=results/models/tiny",
        "output_dir=y",
        f"train_dataset={folder}",
        "streaming=true",
        "seq_length=64",
    ]
    with pytest.raises(ValueError, match="Give n_train_samples"):
        read_config(words)
    config = read_config([*words, "n_train_samples=40", "template=released", "validation_fraction=0.25"])
    train, validation = data._load(tiny_tokenizer, config)
    samples = [sorted(n for pack in packs for n in pack.samples) for packs in (train, validation)]
    assert sorted(itertools.chain(*samples)) == list(range(1, 41)) and len(samples[1]) == 10
    taken, _ = data.sample_rows(str(folder), 40, config.seed, streaming=True)
    packs = sample_packs(
        SampleSettings(str(folder), 200, 64, streaming=True, template=data.template_settings(config)), tiny_tokenizer
    )
    assert 200 <= sum(map(len, packs)) < 264
    first = data.Template(tiny_tokenizer, data.template_settings(config))
    expected = first.encode([data.read_messages(row, where) for where, row in taken])[0][0]
    assert any(expected.input_ids == document.pack.input_ids for pack in packs for document in pack.documents())
