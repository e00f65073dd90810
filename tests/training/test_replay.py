"""Rows of a general data set beside those of the task: how many, which, in packs of their own, and told."""

import shutil

import numpy as np
import pytest

import train
from deepseek.files import write_jsonl
from deepseek.process_groups import Ranks
from tests.data_helpers import load_samples
from tests.helpers import arguments, config_of, fails, losses
from training import data
from training.data.replay import draw


@pytest.fixture
def general(tmp_path) -> dict:
    """Keys of a run that replays a set of 40 short rows."""
    rows = [data.conversation(f"what is {i}?", " ".join(["no"] * (1 + i % 3))) for i in range(40)]
    write_jsonl(tmp_path / "general.jsonl", rows)
    return {"replay_dataset": tmp_path / "general.jsonl", "replay_share": 0.2}


def loaded(files, folder, tokenizer, **keys) -> tuple[data.Packs, data.Packs]:
    return data.load_data(tokenizer, config_of(files, folder / "out", **keys), Ranks())


def texts(packs, tokenizer) -> list[str]:
    return [tokenizer.decode(document.input_ids) for pack in packs for document in pack.documents()]


def label_tokens(packs) -> int:
    return sum(label != -100 for pack in packs for label in pack.labels)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_share_is_that_of_the_tokens_with_loss(files, general, tmp_path, tiny_tokenizer, share):
    packs, _ = loaded(files, tmp_path, tiny_tokenizer, **{**general, "replay_share": share})
    replayed = [pack for pack in packs if pack.replayed]
    longest = 3 + 1 + 1  # label tokens of the longest replayed row
    found, every = label_tokens(replayed), label_tokens(packs)
    assert 0 <= found - share * every < longest and found > 0


def test_the_packs_of_the_task_are_those_of_a_run_without_replay(files, general, tmp_path, tiny_tokenizer):
    alone, held_out = loaded(files, tmp_path, tiny_tokenizer)
    packs, same_held_out = loaded(files, tmp_path, tiny_tokenizer, **general)
    assert [packs[i] for i in range(len(alone))] == list(alone) and len(packs) > len(alone)
    assert list(held_out) == list(same_held_out)
    assert [pack.replayed for pack in packs] == [False] * len(alone) + [True] * (len(packs) - len(alone))
    added = [document for pack in list(packs)[len(alone) :] for document in pack.documents()]
    for document in added:
        (row,) = document.samples
        assert document.replayed and f"User: what is {-row - 1}?" in tiny_tokenizer.decode(document.input_ids)
    assert packs.lengths == [len(pack) for pack in packs] and max(packs.lengths) <= 48
    alone, both = (sum(map(len, one.split().members)) for one in (alone, packs))
    assert both == alone + len(added)


def test_a_row_of_the_validation_set_is_never_replayed(files, tmp_path, tiny_tokenizer, capsys):
    """A copy of the task's own data is replayed, among it the rows that validate."""
    copy = shutil.copy(files / "data.jsonl", tmp_path / "copy.jsonl")
    keys = {"replay_dataset": copy, "replay_share": 0.6}
    packs, held_out = loaded(files, tmp_path, tiny_tokenizer, **keys)
    replayed = texts([pack for pack in packs if pack.replayed], tiny_tokenizer)
    validating = set(texts(held_out, tiny_tokenizer))
    assert len(validating) == 6 and len(set(replayed)) == 24 and not validating & set(replayed)
    told = capsys.readouterr().err
    assert "6 rows of it left out, being in the validation set, too" in told
    write_jsonl(tmp_path / "few.jsonl", load_samples(files / "data.jsonl")[:1])
    keys = {"replay_dataset": tmp_path / "few.jsonl", "validation_dataset": tmp_path / "few.jsonl"}
    assert "every row of it is in the validation set" in fails(arguments(files, tmp_path / "x", **keys), capsys)


def test_rows_repeat_only_where_there_are_too_few_and_evenly():
    labels = np.array([3, 1, 4, 1, 5])
    none = lambda _: False  # noqa: E731
    once = draw(labels, 6, 0, none)
    assert once.max() == 1 and 6 <= (once * labels).sum() < 6 + 5
    assert draw(labels, 14, 0, none).tolist() == [1] * 5
    many = draw(labels, 35, 0, none)
    assert many.min() == 2 and many.max() == 3 and 35 <= (many * labels).sum() < 35 + 5
    assert draw(labels, 6, 1, none).tolist() != once.tolist()
    without = draw(labels, 40, 0, lambda row: row == 2)
    assert without[2] == 0 and 40 <= (without * labels).sum() < 45 and np.delete(without, 2).min() == 4


def test_what_is_replayed_is_told(files, general, tmp_path, tiny_tokenizer, capsys):
    packs, _ = loaded(files, tmp_path, tiny_tokenizer, **general)
    replayed = [pack for pack in packs if pack.replayed]
    told = capsys.readouterr().err
    rows = sum(len(pack.samples) for pack in replayed)
    share = label_tokens(replayed) / label_tokens(packs)
    assert f"replay: {rows} of 40 rows of {general['replay_dataset']}, each once, " in told
    assert f"{sum(map(len, replayed))} tokens, {label_tokens(replayed)} of them with loss ({share:.1%} of all)" in told
    loaded(files, tmp_path, tiny_tokenizer, **{**general, "replay_share": 0.7})
    assert "40 of 40 rows" in (told := capsys.readouterr().err) and "a row up to " in told


def test_the_validation_loss_is_that_of_the_task(start, general):
    keys = {"learning_rate": 0, "max_steps": 2}
    alone, both = start("alone", **keys), start("both", **keys, **general)
    assert alone["eval_loss"] == both["eval_loss"] and alone["train_loss"] != both["train_loss"]


def test_a_run_broken_off_goes_on_bit_for_bit_and_knows_its_replay(files, start, general, capsys, killed_and_repeated):
    keys = {**general, "save_opt_states": True, "logging_steps": 2}
    killed_and_repeated(**keys)
    assert len(losses(start.folder / "out")) > 3
    for changes, words in ({"replay_share": 0.3}, "replay_share"), ({"replay_dataset": None}, "replay_dataset"):
        argv = arguments(files, start.folder / "out", **{**keys, "replay_share": None, **changes})
        assert words in fails(argv, capsys)
    rows = load_samples(general["replay_dataset"])
    write_jsonl(general["replay_dataset"], rows[1:])
    error = fails(arguments(files, start.folder / "out", **keys), capsys)
    assert "differs in the content of replay_dataset)" in error


def test_a_loss_that_is_not_finite_names_replayed_rows(files, start, general, monkeypatch):
    original = train.ESFTTrainer._loss_sum

    def nan_on_replay(self, model, inputs, *args):
        loss = original(self, model, inputs, *args)
        return loss * (float("nan") if min(inputs["rows"], default=0) < 0 else 1)

    monkeypatch.setattr(train.ESFTTrainer, "_loss_sum", nan_on_replay)
    with pytest.raises(ValueError, match=r"on rows replayed \d+(, (replayed )?\d+)* of the training data"):
        start(**{**general, "replay_share": 0.5})


def test_where_documents_of_a_pack_see_each_other_each_is_a_pack(files, general, tmp_path, tiny_tokenizer):
    packs, _ = loaded(files, tmp_path, tiny_tokenizer, **general)
    split = packs.split()
    assert [pack.replayed for pack in split] == [document.replayed for pack in packs for document in pack.documents()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"replay_share": 0}, "replay_share=0.0 is not between 0 and 1"),
        ({"replay_share": 1}, "replay_share=1.0 is not between 0 and 1"),
        ({"replay_dataset": None}, "replay_share=0.2 needs replay_dataset"),
        ({"replay_dataset": "nothing.jsonl"}, "cannot find data set 'nothing.jsonl'"),
        ({"method": "dpo"}, "replay_dataset is not for method dpo"),
        ({"train_dataset": "law", "replay_dataset": "law"}, "replay_dataset=law is the training data itself"),
    ],
)
def test_what_cannot_be_replayed_is_refused(files, general, tmp_path, capsys, changes, words):
    assert words in fails(arguments(files, tmp_path / "out", **{**general, **changes}), capsys)
    assert not (tmp_path / "out").exists()
