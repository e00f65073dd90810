"""distill_from=base: the loss by hand, in chunks, however the batch is cut, interrupted, or shared out."""

import functools
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

import esft
import train
from deepseek.files import write_jsonl
from deepseek.process_groups import Ranks
from tests.helpers import (
    EXPERTS,
    arguments,
    assert_near,
    config_of,
    fails,
    make_model,
    run_ranks,
    tensors_of,
    trainer_of,
)
from training import data
from training.distillation import SoftTerms
from training.loss import TokenLosses, label_positions

PLAIN = {"optim": "sgd", "learning_rate": 30, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
KEYS = {"validation_fraction": 0, "eval_steps": None, "save_steps": None, "max_steps": 3, "replay_share": 0.4}
HEAD_TOO = {**EXPERTS, "shared_experts": True, "non_expert_modules": True}
SMALL, LARGE = 7 * 128, 10**9  # logits of seven rows at once; of all of them


@pytest.fixture
def replayed(tmp_path) -> dict:
    """Keys of a run that is held to the base on a set of 20 rows."""
    rows = [data.conversation(f"what is {i}?", " ".join(["no"] * (1 + i % 3))) for i in range(20)]
    write_jsonl(tmp_path / "general.jsonl", rows)
    write_jsonl(tmp_path / "task.jsonl", [data.conversation(f"is it {i}?", "yes " * (1 + i % 3)) for i in range(8)])
    return {
        **KEYS,
        "train_dataset": tmp_path / "task.jsonl",
        "replay_dataset": tmp_path / "general.jsonl",
        "distill_from": "base",
    }


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def by_hand(packs, weight: float, everywhere: bool, smoothing: float = 0.0, config=EXPERTS) -> list[dict]:
    """Three steps of SGD on all documents, each alone, with a whole second model as the base."""
    policy, base = esft.to_esft(make_model(), config), make_model()
    optimizer = torch.optim.SGD([param for param in policy.parameters() if param.requires_grad], lr=30)
    documents = [document for pack in packs for document in pack.documents()]
    found = []
    for _ in range(3):
        terms, divergences = [], []
        for document in documents:
            labels = torch.tensor(document.labels[1:])
            kept, ids = labels != -100, torch.tensor([document.input_ids])
            log_q = policy(ids, use_cache=False).logits[0, :-1][kept].log_softmax(-1)
            with torch.no_grad():
                log_p = base(ids, use_cache=False).logits[0, :-1][kept].log_softmax(-1)
            ce = cross_entropy(log_q, labels[kept], reduction="none", label_smoothing=smoothing)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            soft = everywhere or document.replayed
            terms.append(max(0, 1 - weight) * ce + weight * kl if soft else ce)
            divergences += [kl.detach()] if soft else []
        loss = torch.cat(terms).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({"loss": loss.item(), "distill_loss": torch.cat(divergences).mean().item()})
    return found


@pytest.mark.parametrize(
    ("changes", "weight", "everywhere"),
    [
        ({}, 1.0, False),
        ({"distill_weight": 3, "expert_config": "all.json"}, 3.0, False),
        ({"distill_on": "all", "replay_dataset": None, "replay_share": None}, 0.5, True),
        pytest.param(
            {"distill_on": "all", "distill_weight": 0.3, "label_smoothing_factor": 0.1},
            0.3,
            True,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_loss_is_that_by_hand_however_the_batch_is_cut(
    files, start, replayed, tiny_tokenizer, monkeypatch, changes, weight, everywhere
):
    if "expert_config" in changes:
        changes = {**changes, "expert_config": files / "all.json"}
    keys = {**replayed, **PLAIN, **changes, "seq_length": 80}
    packs, _ = data.load_data(tiny_tokenizer, config_of(files, start.folder / "x", **keys), Ranks())
    smoothing = changes.get("label_smoothing_factor", 0.0)
    config = HEAD_TOO if "expert_config" in changes else EXPERTS
    wanted = by_hand(packs, weight, everywhere, smoothing, config)
    assert wanted[0]["distill_loss"] == 0 < wanted[1]["distill_loss"] and len(packs) > 1
    for name, batch, accumulation in ("cut", 1, len(packs)), ("chunks", len(packs), 1):
        if name == "chunks":
            monkeypatch.setattr("training.trainer.TokenLosses", functools.partial(TokenLosses, chunk=SMALL))
        start(name, **{**keys, "batch_size": batch, "accumulation_steps": accumulation})
        found = history(start.folder / name)[:3]
        assert found[0]["distill_loss"] == 0  # exactly: the base saw the same batch
        for one, other in zip(found, wanted, strict=True):
            assert {key: one[key] for key in other} == pytest.approx(other, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("config", [EXPERTS, HEAD_TOO], ids=["experts", "head, too"])
def test_losses_and_gradients_in_chunks_are_those_of_all_logits(config):
    torch.manual_seed(3)
    ids = torch.randint(3, 128, (2, 21))
    labels = ids.clone()
    labels[0, :9] = labels[1, 12:] = labels[:, 5] = -100
    labels_BM, kept = label_positions(labels)
    taken = {"input_ids": ids, "use_cache": False, "logits_to_keep": kept}
    soft = (labels_BM != -100) & torch.tensor([[True], [False]])
    found = {}
    for chunk in (SMALL, LARGE):
        model = esft.to_esft(make_model(), config)
        with torch.no_grad():
            for param in model.parameters():
                if param.requires_grad:
                    param.add_(0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(1)))
        losses_of = TokenLosses(model.get_output_embeddings(), chunk)
        losses_of.try_head(model)
        base = losses_of.logits(esft.ReferenceModel(model), taken, labels_BM)
        terms = SoftTerms(labels_BM.flatten(), 0.0, soft.flatten(), 0.7, base)
        losses = losses_of(model, taken, labels_BM, terms=terms)
        (losses * torch.linspace(-1, 2, losses.numel()).view_as(losses)).sum().backward()
        grads = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
        found[chunk] = losses.detach(), grads, terms.divergence_M
    (losses, grads, divergence), (plain, wanted, its_divergence) = found[SMALL], found[LARGE]
    reference = make_model()(ids, use_cache=False).logits[:, kept].log_softmax(-1)
    logs = model(ids, use_cache=False).logits[:, kept].log_softmax(-1)
    kl = kl_div(logs, reference, reduction="none", log_target=True).sum(-1).detach() * soft
    assert_near("the divergence by hand", divergence.view_as(kl), kl, 1e-4)
    assert_near("the divergence", divergence, its_divergence, 1e-5)
    assert_near("the losses", losses, plain, 1e-5)
    assert grads.keys() == wanted.keys() and len(grads) > 1
    for name, grad in grads.items():
        assert_near(name, grad, wanted[name], 1e-4)


def test_a_batch_without_replay_does_without_the_base(files, start, replayed, monkeypatch):
    keys = {**replayed, "batch_size": 1, "max_steps": None, "num_train_epochs": 1, "seq_length": 48}
    calls = []
    original = esft.ReferenceModel.__call__
    monkeypatch.setattr(
        esft.ReferenceModel, "__call__", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    packs = trainer_of(config_of(files, start.folder / "x", **keys), monkeypatch).train_dataset
    start(**keys)
    replayed_packs = [pack for pack in packs if pack.replayed]
    assert len(calls) == len(replayed_packs) and 0 < len(replayed_packs) < len(packs)
    logged = [entry for entry in history(start.folder / "out") if "loss" in entry]
    assert sum("distill_loss" in entry for entry in logged) == len(replayed_packs)


def test_the_validation_loss_is_the_cross_entropy_of_the_task(start, replayed):
    keys = {"learning_rate": 0, "max_steps": 2, "validation_fraction": 0.3, "eval_steps": 1}
    held = start("held", **{**replayed, **keys})
    plain = start("plain", **{**replayed, **keys, "distill_from": None, "replay_dataset": None, "replay_share": None})
    assert held["eval_loss"] == plain["eval_loss"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"method": "lora", "lora_experts": "selected"}, marks=pytest.mark.slow),
    ],
)
def test_a_run_broken_off_goes_on_bit_for_bit(start, replayed, changes, killed_and_repeated):
    keys = {**replayed, "save_opt_states": True, "max_steps": 7, "save_steps": 3, "logging_steps": 2, "batch_size": 1}
    keys |= {"validation_fraction": 0.2, "eval_steps": 2, "verify_frozen": True, **changes}
    killed_and_repeated(**keys)
    values = [[entry.get("distill_loss") for entry in history(start.folder / name)] for name in ("out", "whole")]
    assert values[0] == values[1] and any(values[0])


def train_on_ranks(_rank: int, files: Path, keys: dict, runs: dict) -> None:
    for out, layout in runs.items():
        train.run(config_of(files, out, **{**keys, **layout}))


LAYOUTS = {"expert": {"ep_size": 2}, "data": {}, "dense": {"ep_size": 2, "shard_dense": True}}


@pytest.mark.parametrize(
    ("names", "experts"),
    [
        (["expert"], "experts.json"),
        pytest.param(["data", "dense"], "experts.json", marks=pytest.mark.slow),
        pytest.param(["data", "dense"], "all.json", marks=pytest.mark.slow),
    ],
)
def test_several_processes_have_the_losses_of_one(files, replayed, tmp_path, start, names, experts):
    keys = {**replayed, "batch_size": 1, "seq_length": 48, "max_steps": 5, "learning_rate": 2e-3}
    keys["expert_config"] = files / experts
    start("one", **{**keys, "accumulation_steps": 2})
    layouts = {name: LAYOUTS[name] for name in names}
    run_ranks(2, train_on_ranks, files, keys, {tmp_path / name: layout for name, layout in layouts.items()})
    for name in layouts:
        for one, other in zip(history(tmp_path / name), history(tmp_path / "one"), strict=True):
            wanted = {key: other[key] for key in ("loss", "grad_norm", "distill_loss") if key in other}
            assert {key: one[key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)
        found = tensors_of(tmp_path / name)
        for key, tensor in tensors_of(tmp_path / "one").items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill_from": None, "distill_weight": 1}, "distill_weight=1.0 needs distill_from"),
        ({"distill_from": None, "distill_on": "all"}, "distill_on=all needs distill_from"),
        ({"distill_weight": 0}, "distill_weight=0.0 is not above 0"),
        ({"replay_dataset": None, "replay_share": None}, "needs some. Give replay_dataset, or distill_on=all"),
        ({"method": "dpo", "replay_dataset": None, "replay_share": None}, "distill_from is not for method dpo"),
        ({"method": "full"}, "distill_from=base is for methods esft and random"),
        ({"method": "lora"}, "distill_from=base is for methods esft and random"),
        ({"distill_from": "nowhere"}, "cannot distil from nowhere: it is neither base nor a folder"),
    ],
)
def test_what_cannot_be_distilled_is_refused(files, replayed, tmp_path, capsys, changes, words):
    assert words in fails(arguments(files, tmp_path / "out", **{**replayed, **changes}), capsys)
    assert not (tmp_path / "out").exists()
