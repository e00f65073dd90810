"""A teacher's answers on disk, and a student that learns them: exact, resumable, and refused where they do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import esft
import train
from deepseek.files import write_jsonl
from deepseek.process_groups import Ranks
from scripts import teacher_logits
from tests.data_helpers import load_samples
from tests.helpers import EXPERTS, arguments, config_of, fails, make_model, run_ranks
from training import data
from training.distillation import SoftTerms
from training.teacher import Teacher, top_and_rest

PLAIN = {"optim": "sgd", "learning_rate": 30, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
KEYS = {"validation_fraction": 0.2, "save_steps": None, "eval_steps": None, "max_steps": 3}
LARGER = {"hidden_size": 48, "seed": 5}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tiny_tokenizer) -> Path:
    """The folder of a wider model with the tokenizer of the student."""
    folder = tmp_path_factory.mktemp("teacher") / "larger"
    make_model(**LARGER).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def ask(teacher: Path, files: Path, out: Path, **changes) -> dict:
    flags = {"model": teacher, "tokenizer": files / "m32", "dataset": files / "data.jsonl", "output_dir": out}
    flags |= {"seq_length": 48, "top_k": 8, "packs_per_part": 4, "device": "cpu", **changes}
    return teacher_logits.main([f"--{key}={value}" for key, value in flags.items()])


@pytest.fixture(scope="module")
def answers(teacher, files, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "logits"
    ask(teacher, files, out)
    return out


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def exact(model, document) -> torch.Tensor:
    """The log-probabilities at the labels of a document that is alone."""
    kept = torch.tensor(document.labels[1:]) != -100
    with torch.no_grad():
        return model(torch.tensor([document.input_ids]), use_cache=False).logits[0, :-1][kept].log_softmax(-1)


@pytest.mark.parametrize("changes", [{}, {"batch_size": 3, "packs_per_part": 64}, {"seq_length": 4096, "top_k": 3}])
def test_every_document_has_the_top_tokens_of_the_teacher_and_the_rest(
    teacher, files, tmp_path, tiny_tokenizer, changes
):
    manifest = ask(teacher, files, tmp_path / "logits", **changes)
    found, model, k = Teacher(tmp_path / "logits"), make_model(**LARGER), changes.get("top_k", 8)
    packs, held_out = data.load_data(tiny_tokenizer, config_of(files, tmp_path / "x"), Ranks())
    documents = [document for one in (packs, held_out) for pack in one for document in pack.documents()]
    masses = []
    for document in documents:
        log_p = exact(model, document)
        ids, log_probs = found.read(document)
        assert ids.shape == (len(log_p), k) and log_probs.shape == (len(log_p), k + 1)
        assert torch.equal(ids.long(), log_p[:, :79].topk(k).indices)  # of the tokens that the tokenizer has
        torch.testing.assert_close(log_probs.float(), top_and_rest(log_p, ids.long()), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(log_probs.float().exp().sum(-1), torch.ones(len(ids)), rtol=0, atol=2e-3)
        masses += (1 - log_probs[:, -1].float().exp()).tolist()
    assert manifest["labels"] == len(masses) and manifest["mass"] == pytest.approx(sum(masses) / len(masses))
    assert len(documents) == 30 and manifest["top_k"] == k


def test_the_divergence_keeps_the_mass_of_the_rest():
    torch.manual_seed(0)
    z_p, z_q = torch.randn(5, 40) * 3, torch.randn(5, 40, requires_grad=True)
    log_p, log_q = z_p.log_softmax(-1), z_q.log_softmax(-1)
    whole = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    for k, rest in ((4, 1.0), (39, 0.0)):
        ids = log_p.topk(k).indices
        labels, soft = torch.zeros(5, dtype=torch.long), torch.ones(5)
        terms = SoftTerms(labels, 0.0, soft, 1.0, top_and_rest(log_p, ids).__getitem__, ids)  # KL alone
        found = terms.losses(z_q, slice(None))
        p, q = log_p.exp(), log_q.exp()
        p_rest, q_rest = 1 - p.gather(1, ids).sum(-1), 1 - q.gather(1, ids).sum(-1)
        by_hand = (p * (log_p - log_q)).gather(1, ids).sum(-1) + p_rest * (p_rest / q_rest).log()
        torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-4)
        assert (found <= whole + 1e-5).all()
        (grad,) = torch.autograd.grad(found.sum(), z_q)
        target = (p_rest / q_rest)[:, None] * q  # the student's own shares of the rest
        target = target.scatter(1, ids, p.gather(1, ids))
        torch.testing.assert_close(grad, (q - target).detach(), rtol=1e-3, atol=1e-5)
        if not rest:  # one token is left, so nothing is lost
            torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, pytest.param({"distill_weight": 1}, marks=pytest.mark.slow)])
def test_the_loss_is_that_by_hand(files, start, answers, tiny_tokenizer, changes):
    keys = {**KEYS, **PLAIN, **changes, "distill_from": answers, "batch_size": 50}
    packs, _ = data.load_data(tiny_tokenizer, config_of(files, start.folder / "x", **keys), Ranks())
    student, said, weight = esft.to_esft(make_model(), EXPERTS), Teacher(answers), changes.get("distill_weight", 0.5)
    optimizer = torch.optim.SGD([param for param in student.parameters() if param.requires_grad], lr=30)
    wanted = []
    for _ in range(3):
        terms, divergences = [], []
        for document in (document for pack in packs for document in pack.documents()):
            labels = torch.tensor(document.labels[1:])
            logits = student(torch.tensor([document.input_ids]), use_cache=False).logits[0, :-1][labels != -100]
            ids, log_p = said.read(document)
            log_q = top_and_rest(logits.log_softmax(-1), ids.long())
            kl = kl_div(log_q, log_p.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
            terms.append((1 - weight) * cross_entropy(logits, labels[labels != -100], reduction="none") + weight * kl)
            divergences.append(kl.detach())
        loss = torch.cat(terms).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted.append({"loss": loss.item(), "distill_loss": torch.cat(divergences).mean().item()})
    start(**keys)
    for one, other in zip(history(start.folder / "out")[:3], wanted, strict=True):
        assert {key: one[key] for key in other} == pytest.approx(other, rel=1e-4)


def train_on_ranks(_rank: int, files: Path, keys: dict, runs: dict) -> None:
    for out, layout in runs.items():
        train.run(config_of(files, out, **{**keys, **layout}))


RUN = {"save_opt_states": True, "save_steps": 3, "batch_size": 1, "n_train_samples": 20, "seq_length": 96}


def test_a_run_broken_off_goes_on_bit_for_bit(answers, killed_and_repeated):
    keys = {**KEYS, **RUN, "distill_from": answers, "max_steps": 7}  # other packs than the teacher saw
    killed_and_repeated(**keys)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(files, start, answers, tmp_path):
    keys = {**KEYS, **RUN, "distill_from": answers, "max_steps": 5}
    start("whole", **keys, accumulation_steps=2)
    run_ranks(2, train_on_ranks, files, keys, {tmp_path / "expert": {"ep_size": 2}})
    for one, other in zip(history(tmp_path / "expert"), history(tmp_path / "whole"), strict=True):
        wanted = {key: other[key] for key in ("loss", "grad_norm", "distill_loss", "eval_loss") if key in other}
        assert {key: one[key] for key in wanted} == pytest.approx(wanted, rel=1e-4)


def test_replayed_documents_alone_need_a_teacher(files, start, teacher, tmp_path, capsys):
    write_jsonl(tmp_path / "general.jsonl", [data.conversation(f"what is {i}?", "no " * 3) for i in range(9)])
    ask(teacher, files, tmp_path / "logits", dataset=tmp_path / "general.jsonl")
    keys = {**KEYS, "replay_dataset": tmp_path / "general.jsonl", "distill_from": tmp_path / "logits"}
    start(**keys, distill_on="replay", method="full")
    assert all(entry["distill_loss"] > 0 for entry in history(start.folder / "out") if "distill_loss" in entry)
    error = fails(arguments(files, tmp_path / "x", **keys), capsys)
    assert "it lacks 24 of 3" in error and "scripts/teacher_logits.py on the same data" in error


def test_a_command_that_was_stopped_goes_on(teacher, files, answers, tmp_path, monkeypatch):
    out, asked = tmp_path / "logits", []
    original = teacher_logits.ask

    def stopping(*args):
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(teacher_logits, "ask", stopping)
    with pytest.raises(KeyboardInterrupt):
        ask(teacher, files, out)
    assert [path.name for path in out.iterdir()] == ["logits-00001.safetensors"]
    ask(teacher, files, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in answers.iterdir()
    }
    assert len(asked) == 1 + len(list(answers.glob("*.safetensors")))
    ask(teacher, files, out)
    assert len(asked) == 1 + len(list(answers.glob("*.safetensors")))
    with pytest.raises(ValueError, match=r"logits-00001.safetensors is of other settings"):
        ask(teacher, files, out, top_k=4)


def other_tokens(folder: Path, student: Path) -> Path:
    """The student with another tokenizer: two of its tokens have changed places."""
    shutil.copytree(student, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_what_does_not_fit_is_refused_before_the_model_is_read(files, teacher, answers, tmp_path, capsys, monkeypatch):
    other, out = other_tokens(tmp_path / "other", files / "m32"), tmp_path / "out"
    monkeypatch.setattr(train, "load_model", None)
    rows = load_samples(files / "data.jsonl")[:1] + [data.conversation(f"what is {i}?", "no") for i in range(3)]
    write_jsonl(tmp_path / "others.jsonl", rows)
    keys = {**KEYS, "distill_from": answers}
    for changes, words in (
        ({"base_model_path": other}, "its teacher has other tokens than this model"),
        ({"template": "released"}, "its documents were made otherwise (template, the text of the chat template)"),
        ({"loss_on": "last"}, "its documents were made otherwise (loss_on)"),
        ({"train_dataset": tmp_path / "others.jsonl"}, "it lacks 2 of 3 documents"),
    ):
        assert words in fails(arguments(files, out, **{**keys, **changes}), capsys)
        assert not out.exists()
    with pytest.raises(ValueError, match="their tokens differ"):
        ask(teacher, files, out, tokenizer=other)
    with pytest.raises(ValueError, match=r"cannot write .*other: it holds other files. Give another path\."):
        ask(teacher, files, other)
    with pytest.raises(ValueError, match="cannot keep top_k=79 of 79 tokens"):
        ask(teacher, files, out, top_k=79)
    part = tmp_path / "damaged"
    shutil.copytree(answers, part)
    next(part.glob("*.safetensors")).write_bytes(b"x")
    assert "damaged" in fails(arguments(files, out, **{**keys, "distill_from": part}), capsys)
