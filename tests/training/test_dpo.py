"""Method dpo: the loss of pairs, by hand and by TRL, however the pairs are cut, interrupted, or shared out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

import datasets
import esft
import train
from deepseek.files import write_jsonl
from deepseek.process_groups import Ranks
from tests.data_helpers import encode
from tests.helpers import (
    EXPERTS,
    arguments,
    config_of,
    fails,
    make_model,
    run_ranks,
    tensors_of,
)
from training import data
from training.batches import collate
from training.data.preferences import read_pair
from training.dpo import DPOTrainer

ROWS = [
    {
        "prompt": f"is it {i}?",
        "chosen": " ".join([f"yes {i}"] * (1 + i % 3)),
        "rejected": " ".join(["no"] * (1 + i % 4)),
    }
    for i in range(12)
]
KEYS = {"method": "dpo", "validation_fraction": 0, "eval_steps": None, "save_steps": None, "max_steps": 3}
PLAIN = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")]


@pytest.fixture
def prefs(tmp_path) -> dict:
    write_jsonl(tmp_path / "prefs.jsonl", ROWS)
    return {**KEYS, "train_dataset": tmp_path / "prefs.jsonl"}


def history(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def log_probs(model, tokenizer, messages: list[dict]) -> torch.Tensor:
    sample = encode(messages, tokenizer)
    labels = torch.tensor(sample.labels[1:])
    logits = model(torch.tensor([sample.input_ids]), use_cache=False).logits[0, :-1]
    return -torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def dpo_by_hand(tokenizer, rows, beta=0.1, smoothing=0.0, family="deepseek_v2", experts=EXPERTS) -> list[dict]:
    """Three steps of SGD on all pairs, each answer alone, with a whole second model as the reference."""
    policy, reference = esft.to_esft(make_model(family), experts), make_model(family)
    optimizer = torch.optim.SGD([param for param in policy.parameters() if param.requires_grad], lr=0.5)
    pairs, found = [read_pair(row, "f") for row in rows], []
    for _ in range(3):
        rewards = []
        for pair in pairs:
            with torch.no_grad():
                base = torch.stack([log_probs(reference, tokenizer, side) for side in pair])
            rewards.append(beta * (torch.stack([log_probs(policy, tokenizer, side) for side in pair]) - base))
        chosen, rejected = torch.stack(rewards).T
        margin = chosen - rejected
        loss = -(1 - smoothing) * logsigmoid(margin).mean() - smoothing * logsigmoid(-margin).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means = [one.detach().double().mean().item() for one in (loss, chosen, rejected, (margin > 0).double(), margin)]
        found.append(dict(zip(["loss", *REWARDS], means)))
    return found


def assert_near(found: list[dict], wanted: list[dict]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert {key: one[key] for key in other} == pytest.approx(other, rel=1e-5, abs=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"dpo_beta": 0.5, "label_smoothing_factor": 0.2}])
def test_the_loss_is_the_same_however_the_batch_is_cut(start, prefs, tiny_tokenizer, changes):
    wanted = dpo_by_hand(tiny_tokenizer, ROWS, *changes.values())
    assert wanted[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item()) and wanted[2]["loss"] < wanted[0]["loss"]
    cuts = [(2, 6, 80), (1, 1, 4096)] if changes else [(1, 12, 80), (12, 1, 80), (2, 3, 160), (1, 1, 4096)]
    for batch, accumulation, seq_length in cuts:
        cut = {"batch_size": batch, "accumulation_steps": accumulation, "seq_length": seq_length}
        start(name := f"{batch} {accumulation} {seq_length}", **{**prefs, **PLAIN, **cut, **changes})
        assert_near(history(start.folder / name)[:3], wanted)
    first = history(start.folder / name)[0]
    assert not any(first[key] for key in REWARDS)  # exactly: the base saw the same batch


def test_pairs_stay_together_and_both_sides_are_counted(files, prefs, tmp_path, tiny_tokenizer):
    packs, _ = data.load_data(tiny_tokenizer, config_of(files, tmp_path, **{**prefs, "seq_length": 160}), Ranks())
    assert 1 < len(packs) < len(ROWS) and packs.together == 2
    seen = []
    for number, pack in enumerate(packs):
        documents = pack.documents()
        assert len(pack) == packs.lengths[number] <= 160
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
            (sample,) = {*chosen.samples, *rejected.samples}
            texts = [tiny_tokenizer.decode([t for t in one.labels if t != -100]) for one in (chosen, rejected)]
            row = ROWS[sample - 1]
            assert texts == [f" {row['chosen']}<eos>", f" {row['rejected']}<eos>"]
            seen.append(sample)
    assert sorted(seen) == [*range(1, 13)]


def test_an_overlong_pair_is_refused_or_cut_on_both_sides(files, start, prefs, tmp_path, tiny_tokenizer, capsys):
    long = {"prompt": "is it?", "chosen": "j" * 90, "rejected": "no"}
    hopeless = {"prompt": "is it? " * 30, "chosen": "yes", "rejected": "no"}
    write_jsonl(tmp_path / "prefs.jsonl", [*ROWS, long, hopeless])
    keys = {**prefs, "seq_length": 100}
    assert "cannot pack: sample 13 has" in fails(arguments(files, tmp_path / "out", **keys), capsys)
    with pytest.warns(UserWarning, match="2 of 14 samples are longer than seq_length=100: 1 truncated, 1 dropped"):
        packs, _ = data.load_data(tiny_tokenizer, config_of(files, tmp_path, **keys, overlong="truncate"), Ranks())
    sizes = {s: [len(d) for d in pack.documents() if d.samples == [s]] for pack in packs for s in pack.samples}
    assert sizes.keys() == {*range(1, 14)} and sizes[13][0] == 50 and 2 < sizes[13][1] < 50
    assert max(packs.lengths) <= 100


def test_where_documents_of_a_pack_see_each_other_each_answer_is_alone(start, prefs, tmp_path, tiny_tokenizer):
    """gpt_oss, for which transformers builds no mask between packed documents."""
    make_model("gpt_oss").save_pretrained(tmp_path / "gpt_oss")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt_oss")
    with pytest.warns(UserWarning, match="would see each other"):
        start(**{**prefs, **PLAIN, "base_model_path": tmp_path / "gpt_oss", "batch_size": 12, "seq_length": 4096})
    assert_near(history(tmp_path / "out")[:3], dpo_by_hand(tiny_tokenizer, ROWS, family="gpt_oss"))


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"base_model_path": "m16", "expert_config": "all.json"}])
def test_a_run_broken_off_goes_on_bit_for_bit(files, start, prefs, changes, killed_and_repeated):
    keys = {**prefs, "save_opt_states": True, "max_steps": 7, "save_steps": 3, "logging_steps": 2, "batch_size": 1}
    keys |= {"seq_length": 160, "validation_fraction": 0.2, "eval_steps": 2, "activation_checkpointing": True}
    keys |= {key: files / value for key, value in changes.items()}
    whole, result = killed_and_repeated(**keys)
    for one, other in zip(history(start.folder / "out"), history(start.folder / "whole"), strict=True):
        assert [one.get(key) for key in REWARDS] == [other.get(key) for key in REWARDS]
    names = ["eval_loss", *(f"eval_{key}" for key in REWARDS)]
    assert [result[key] for key in names] == [whole[key] for key in names]
    assert result["eval_loss"] != pytest.approx(torch.tensor(2.0).log().item())


def test_validation_is_the_mean_over_its_pairs(files, start, prefs, tiny_tokenizer):
    keys = {**prefs, **PLAIN, "batch_size": 12, "seq_length": 80, "validation_dataset": prefs["train_dataset"]}
    wanted = dpo_by_hand(tiny_tokenizer, ROWS, 0.3)
    for name, size in (("one", 1), ("many", 12)):
        result = start(name, **{**keys, "max_steps": 2, "eval_steps": 1, "eval_batch_size": size, "dpo_beta": 0.3})
        evaluated = [entry for entry in history(start.folder / name) if "eval_loss" in entry]
        for entry, step in zip(evaluated, wanted[1:], strict=True):
            assert {key: entry[f"eval_{key}"] for key in step} == pytest.approx(step, rel=1e-5, abs=2e-6)
        assert result["eval_rewards/margins"] == evaluated[-1]["eval_rewards/margins"]


RUN = {"batch_size": 1, "seq_length": 80, "max_steps": 6, "validation_fraction": 0.3, "eval_steps": 3, "save_steps": 3}


def train_on_ranks(rank: int, files: Path, prefs: dict, runs: dict) -> list[dict]:
    return [train.run(config_of(files, out, **{**prefs, **keys})) for out, keys in runs.items()]


@pytest.mark.long
def test_several_processes_have_the_losses_of_one(files, prefs, tmp_path, start):
    keys = {**prefs, **RUN, "learning_rate": 2e-3, "max_grad_norm": 0.3}
    start("one", **{**keys, "accumulation_steps": 2})
    layouts = {"data": {}, "expert": {"ep_size": 2}, "dense": {"ep_size": 2, "shard_dense": True}}
    run_ranks(2, train_on_ranks, files, keys, {tmp_path / name: layout for name, layout in layouts.items()})
    names = ["loss", "grad_norm", *REWARDS, "eval_loss", *(f"eval_{key}" for key in REWARDS)]
    for name in layouts:
        for one, other in zip(history(tmp_path / name), history(tmp_path / "one"), strict=True):
            wanted = {key: other[key] for key in names if key in other}
            assert {key: one[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-7)
        found = tensors_of(tmp_path / name)
        for key, tensor in tensors_of(tmp_path / "one").items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


def test_a_rank_without_a_batch_has_no_pair():
    pair = data.Pack([5, 6, 7, 5, 6], [-100, 6, 7, -100, 6], [0, 1, 2, 0, 1], [1, 1])
    longer = data.Pack([5] * 9, [-100] * 9, [*range(9)], [2])  # so that the others are padded
    counts = [DPOTrainer._num_terms(None, collate(packs, 2)).item() for packs in ([], [pair], [pair, pair, longer])]
    assert counts == [0, 1, 2]


@pytest.mark.clients
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_rewards_and_weights_are_those_of_trl(start, prefs, files, tmp_path, tiny_tokenizer, dtype):
    trl = pytest.importorskip("trl")
    keys = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "adamw_torch", "max_grad_norm": 0.1}
    name = {"float32": "m32", "bfloat16": "m16"}[dtype]
    start(**{**prefs, **keys, "batch_size": 12, "seq_length": 80, "max_steps": 4, "base_model_path": files / name})
    model = esft.to_esft(make_model(dtype=getattr(torch, dtype)), EXPERTS)
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    rows = [{key: [{"role": role, "content": row[key]}] for key, role in roles.items()} for row in ROWS]
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=4, per_device_train_batch_size=12, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, router_aux_loss_coef=0.0,
        gradient_checkpointing=False, weight_decay=0.0, **keys,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        model, esft.ReferenceModel(model), args, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer,
    )  # fmt: skip
    trainer.train()
    tolerance = 1e-4 if dtype == "float32" else 0.03
    wanted = [{key: entry[key] for key in ["loss", *REWARDS]} for entry in trainer.state.log_history[:4]]
    for one, other in zip(history(tmp_path / "out")[:4], wanted, strict=True):
        assert {key: one[key] for key in other} == pytest.approx(other, abs=tolerance)
    assert wanted[3]["loss"] < 0.6
    if dtype == "float32":
        found = tensors_of(tmp_path / "out")
        for key, tensor in esft.adapter_tensors(model).items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-4)


def test_data_and_keys_of_other_methods_are_refused(files, prefs, tmp_path, capsys, start):
    out = tmp_path / "out"
    assert "are for method=dpo" in fails(arguments(files, out, **{**prefs, "method": "esft"}), capsys)
    error = fails(arguments(files, out, **{**prefs, "train_dataset": files / "data.jsonl"}), capsys)
    assert "needs the keys chosen+rejected" in error and "method=esft" in error
    for key, value, words in (
        ("loss_on", "each", "loss_on=each is not for method dpo"),
        ("dpo_beta", 0, "dpo_beta=0.0 is not above 0"),
        ("validation_dataset", files / "data.jsonl", "needs the keys chosen+rejected"),
    ):
        assert words in fails(arguments(files, out, **{**prefs, key: value}), capsys)
    assert not out.exists()
    config_of(files, out, dpo_beta=0.3)
    assert "note: dpo_beta has no effect: it is for method dpo, and this is esft" in capsys.readouterr().err


def test_held_out_pairs_become_questions_with_the_chosen_answers(files, prefs, tmp_path):
    config = config_of(files, tmp_path / "out", **{**prefs, "validation_fraction": 0.25})
    rows, count = data.held_out_questions(dataclasses.asdict(config))
    assert len(rows) == count == 3
    assert all(row in [{"prompt": r["prompt"], "answers": [r["chosen"]]} for r in ROWS] for row in rows)
