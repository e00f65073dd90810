"""Tokens that the tokenizer has and the model lacks: refused before weights are read, and only where they occur."""

import copy
import json
from pathlib import Path

import pytest

import eval_multigpu
import train
from deepseek.files import write_json, write_jsonl
from deepseek.loading import load_tokenizer, vocab_size
from esft import ExpertConfig
from scripts import show_data
from scripts.expert import get_expert_scores, routing_drift
from tests.helpers import EXPERTS, make_model, noisy_adapter, refused
from training.data import Template, encode_rows, open_rows

EXTRA = "<extra>"  # a token that was added without a row for it


def row(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]}


@pytest.fixture(scope="module")
def short(tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with a model that lacks a row for EXTRA, an adapter of it, and data with the token and without."""
    folder, tokenizer = tmp_path_factory.mktemp("short"), copy.deepcopy(tiny_tokenizer)
    model = make_model(vocab_size=len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.add_tokens([EXTRA])
    tokenizer.save_pretrained(folder / "model")
    noisy_adapter(model, ExpertConfig({1: (5, 2), 2: (7,)}), folder / "adapter")
    write_jsonl(folder / "with.jsonl", [row("is it?"), row(f"is it {EXTRA}?"), row("is it?")])
    write_jsonl(folder / "without.jsonl", [row("is it?")] * 3)
    write_json(folder / "experts.json", EXPERTS)
    return folder


@pytest.fixture
def unloaded(monkeypatch):
    """Fail where weights are read."""

    def load(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("esft.load_base_model", load)


def commands(folder: Path, data: Path, out: Path) -> dict:
    base = f"--base_model_path={folder / 'model'}"
    sampled = [base, f"--eval_dataset={data}", f"--output_dir={out}", "--seq_length=64", "--device=cpu"]
    keys = [f"--train_dataset={data}", f"--expert_config={folder / 'experts.json'}", f"--output_dir={out}"]
    return {
        train: [base, *keys, "max_steps=1", "validation_fraction=0", "device=cpu"],
        get_expert_scores: sampled,
        routing_drift: [*sampled, f"--adapter_dir={folder / 'adapter'}"],
        show_data: [str(data), base],
    }


@pytest.mark.parametrize("command", [train, get_expert_scores, routing_drift, show_data], ids=lambda m: m.__name__)
def test_a_token_that_the_model_lacks_is_refused_before_weights_are_read(short, unloaded, tmp_path, capsys, command):
    told = ("with.jsonl:2", f"'{EXTRA}' has id", "the model knows")
    refused(capsys, command.main, commands(short, short / "with.jsonl", tmp_path / "out")[command], *told)
    assert not (tmp_path / "out").exists()
    argv = commands(short, short / "without.jsonl", tmp_path / "out")[command]
    if command is show_data:
        command.main(argv)
    else:  # the tokens that do occur are all known
        with pytest.raises(AssertionError, match="weights were read"):
            command.main(argv)


def questions(path: Path, *texts: str) -> Path:
    write_jsonl(path, [{"prompt": text, "answers": ["yes"]} for text in texts])
    return path


def evaluate(short: Path, path: Path) -> list:
    flags = [f"--eval_dataset={path}", f"--output_path={path.with_name('out.jsonl')}", "--max_new_tokens=2"]
    return [f"--base_model_path={short / 'model'}", *flags, "--device=cpu"]


def test_an_evaluation_leaves_out_the_question_alone(short, tmp_path):
    eval_multigpu.main(evaluate(short, questions(tmp_path / "q.jsonl", f"{EXTRA}?", "is it?", "is it yes or no?")))
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [True, False, False]
    assert EXTRA in answers[0]["error"] and "the model knows" in answers[0]["error"]


def test_an_evaluation_of_nothing_else_is_refused_before_weights_are_read(short, unloaded, tmp_path, capsys):
    argv = evaluate(short, questions(tmp_path / "q.jsonl", f"{EXTRA}?", f"is it {EXTRA}?"))
    refused(capsys, eval_multigpu.main, argv, EXTRA, "the model knows")
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]


def test_a_template_whose_tokens_the_model_lacks_is_refused(short, unloaded, tmp_path, capsys):
    """As where tokenizer_config.json is lost and special tokens become new ones."""
    argv = commands(short, short / "without.jsonl", tmp_path / "out")[train]
    base, folder = argv[0], tmp_path / "model"
    folder.mkdir()
    for file in (short / "model").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").unlink()
    template = (short / "model" / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("User: ", EXTRA))
    refused(capsys, train.main, [f"--base_model_path={folder}", *argv[1:]], "without.jsonl:1", EXTRA)
    with pytest.raises(AssertionError, match="weights were read"):
        train.main([base, *argv[1:]])


def test_tokens_made_for_a_larger_model_are_checked_again(short):
    tokenizer, rows = load_tokenizer(short / "model"), open_rows(short / "with.jsonl")
    known = vocab_size(short / "model")
    assert len(tokenizer) == known + 1
    for enough in (None, known + 1, known + 64):  # an embedding may be padded
        assert len(encode_rows(rows, Template(tokenizer, vocab_size=enough))) == 3
    with pytest.raises(ValueError, match=EXTRA):
        encode_rows(rows, Template(tokenizer, vocab_size=known))


def test_a_padding_token_that_the_model_lacks_changes_nothing(short, tmp_path):
    """It is added to a tokenizer often, and its embedding is never of use."""
    tokenizer, folder = load_tokenizer(short / "model"), tmp_path / "model"
    tokenizer.pad_token = EXTRA
    tokenizer.save_pretrained(folder)
    for file in (short / "model").iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)
    argv = commands(short, short / "without.jsonl", tmp_path / "out")[train]
    train.main([f"--base_model_path={folder}", *argv[1:], "batch_size=3", "seq_length=16", "disable_tqdm=true"])
    texts = ("is it?", "is it yes or no?")
    for model, name in ((short / "model", "a"), (folder, "b")):
        argv = evaluate(short, questions(tmp_path / name / "q.jsonl", *texts))
        eval_multigpu.main([f"--base_model_path={model}", *argv[1:]])
    answers = [(tmp_path / name / "out.jsonl").read_text() for name in ("a", "b")]
    assert answers[0] == answers[1]
