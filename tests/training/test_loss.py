"""The loss: the mean over the label tokens of a whole batch, however the batch is cut."""

import pytest
import torch

from deepseek.files import write_jsonl
from deepseek.process_groups import Ranks
from tests.data_helpers import encode, load_samples
from tests.helpers import arguments, config_of, fails, losses, make_model, tensors_of, trainer_of
from training import data


def loss_by_hand(model, tokenizer, rows: list[dict]) -> tuple[float, float]:
    """(mean over label tokens, mean over samples of their means), each sample alone and from full logits."""
    sums, counts = [], []
    for row in rows:
        sample = encode(row["messages"], tokenizer)
        labels = torch.tensor(sample.labels[1:])
        with torch.no_grad():
            logits = model(torch.tensor([sample.input_ids])).logits[0, :-1]
        sums.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
        counts.append((labels != -100).sum().item())
    return sum(sums) / sum(counts), sum(s / c for s, c in zip(sums, counts)) / len(sums)


def test_first_step_is_the_same_however_the_batch_is_cut(files, start, tiny_tokenizer):
    """SGD with rate 1: the change of the weights is the gradient. All packs of the data are in the batch."""
    rows = load_samples(files / "data.jsonl")[:8]
    write_jsonl(start.folder / "few.jsonl", rows)
    keys = {
        "train_dataset": start.folder / "few.jsonl", "validation_fraction": 0, "eval_steps": None, "save_steps": None,
        "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0, "max_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    packs = data.load_data(tiny_tokenizer, config_of(files, start.folder, **keys), Ranks())[0]
    assert len(packs) == 4 and len({len(pack) for pack in packs}) > 1
    by_hand, mean_of_means = loss_by_hand(make_model(), tiny_tokenizer, rows)
    adapters = []
    for batch, accumulation, seq_length in ((1, 4, 48), (2, 2, 48), (4, 1, 48), (3, 2, 48), (1, 8, 33)):
        name = f"{batch}x{accumulation}x{seq_length}"
        cut = {"batch_size": batch, "accumulation_steps": accumulation, "seq_length": seq_length}
        result = start(name, **cut, **keys)
        assert result["train_loss"] == pytest.approx(by_hand, rel=1e-6)
        assert abs(result["train_loss"] - mean_of_means) > 1e-3
        adapters.append(tensors_of(start.folder / name))
    for adapter in adapters[1:]:
        for key, tensor in adapters[0].items():
            torch.testing.assert_close(adapter[key], tensor, rtol=1e-4, atol=1e-6)


def test_where_documents_of_a_pack_see_each_other_each_is_alone(files, start, tiny_tokenizer):
    """gpt_oss, for which transformers builds no mask between packed documents."""
    folder = start.folder / "gpt_oss"
    model = make_model("gpt_oss")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    with pytest.warns(UserWarning, match="would see each other"):
        start(base_model_path=folder, batch_size=30, validation_fraction=0, eval_steps=0, max_steps=1, save_steps=0)
    total = count = 0
    for sample in load_samples(files / "data.jsonl"):
        encoded = encode(sample["messages"], tiny_tokenizer)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded.input_ids]), use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(encoded.labels[1:]), reduction="sum").item()
        count += sum(label != data.IGNORE for label in encoded.labels[1:])
    assert losses(start.folder / "out")["loss", 1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("eval_batch_size", [1, 3, 8])
def test_validation_loss_is_the_mean_over_its_tokens(files, start, tiny_tokenizer, eval_batch_size):
    result = start(eval_batch_size=eval_batch_size, learning_rate=0, max_steps=2)
    rows = load_samples(files / "data.jsonl")
    packs = data.load_data(tiny_tokenizer, config_of(files, start.folder / "out"), Ranks())[1]
    validation = [rows[number - 1] for pack in packs for number in pack.samples]
    assert len(validation) == 6
    by_hand, mean_of_means = loss_by_hand(make_model(), tiny_tokenizer, validation)
    assert result["eval_loss"] == pytest.approx(by_hand, rel=1e-6)
    assert abs(result["eval_loss"] - mean_of_means) > 1e-3


def test_the_head_runs_on_label_positions_only(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    seen = []
    trainer.model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2].numel()))
    for pack in map(trainer.train_dataset.__getitem__, range(3)):
        inputs = trainer.data_collator([pack])
        labels = (inputs["labels"][:, 1:] != -100).sum().item()
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=labels)
        assert seen.pop() == labels < len(pack)
        ids = {key: inputs[key] for key in ("input_ids", "position_ids")}
        logits = trainer.model(**ids, use_cache=False).logits
        whole = torch.nn.functional.cross_entropy(logits[0, :-1], inputs["labels"][0, 1:])
        torch.testing.assert_close(loss, whole)


def test_a_batch_without_labels_adds_nothing(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    inputs = trainer.data_collator([trainer.train_dataset[0]])
    inputs["labels"].fill_(-100)
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=5)
    loss.backward()
    assert loss.item() == 0


def test_attention_is_what_was_asked_for(files, start, capsys):
    for name, used in ((None, "sdpa"), ("eager", "eager")):
        config = config_of(files, start.folder / "out", attn_implementation=name)
        with pytest.MonkeyPatch.context() as patch:
            assert trainer_of(config, patch).model.config._attn_implementation == used
    assert "cannot load model" in fails(arguments(files, start.folder / "x", attn_implementation="flesh"), capsys)


def test_label_smoothing_is_for_training_only(start):
    plain, smooth = start("a", max_steps=2), start("b", max_steps=2, label_smoothing_factor=0.2, learning_rate=0)
    still = start("c", max_steps=2, learning_rate=0)
    assert smooth["train_loss"] != plain["train_loss"]
    assert smooth["eval_loss"] == still["eval_loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activation_checkpointing_changes_nothing(start, dtype):
    start("a", dtype=dtype, max_steps=3)
    start("b", dtype=dtype, max_steps=3, activation_checkpointing=True)
    assert losses(start.folder / "a") == losses(start.folder / "b")
