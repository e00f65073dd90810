"""Runs of transformers' Trainer and of TRL's that go on from a checkpoint are those that were never broken off."""

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments, set_seed

import datasets
import esft
from tests.helpers import make_model

pytestmark = pytest.mark.clients
CONFIG = {"experts": {"1": [5, 2], "2": [7]}, "shared_experts": True}
IDS = torch.randint(3, 128, (12, 9), generator=torch.Generator().manual_seed(0)).tolist()
ROWS = [{"input_ids": ids, "labels": ids} for ids in IDS]


def fresh(dtype) -> torch.nn.Module:
    set_seed(0)
    return esft.to_esft(make_model(dtype=dtype), CONFIG)


def trainer_of(kind: str, model, folder, tokenizer, steps: int, callbacks=None, **changes):
    settings = {"output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {"logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "save_steps": 3, "seed": 0}
    settings |= {"disable_tqdm": True, "lr_scheduler_type": "linear", "warmup_steps": 1} | changes
    callbacks = [esft.ESFTCallback()] if callbacks is None else callbacks
    if kind == "trl":
        trl = pytest.importorskip("trl")
        rows = datasets.Dataset.from_list([{"input_ids": ids} for ids in IDS])
        args = trl.SFTConfig(**settings, max_length=32, gradient_checkpointing=False)
        data = {"train_dataset": rows, "eval_dataset": rows.select(range(4))}
        return trl.SFTTrainer(model=model, args=args, processing_class=tokenizer, callbacks=callbacks, **data)
    args = TrainingArguments(**settings)
    return Trainer(model=model, args=args, train_dataset=ROWS, eval_dataset=ROWS[:4], callbacks=callbacks)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


KINDS = ["transformers", pytest.param("trl", marks=[] if importlib.util.find_spec("trl") else pytest.mark.skip)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_unbroken_one(kind, dtype, tmp_path, tiny_tokenizer):
    whole = trainer_of(kind, fresh(dtype), tmp_path / "whole", tiny_tokenizer, 6)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    model = fresh(dtype)
    resumed = trainer_of(kind, model, tmp_path / "resumed", tiny_tokenizer, 6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    found, wanted = esft.adapter_tensors(model), esft.adapter_tensors(whole.model)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    held = load_file(checkpoint / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    assert held.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    loaded = esft.add_adapter(make_model(dtype=dtype), checkpoint / "adapter")
    assert esft.trained_config(loaded) == esft.ExpertConfig.from_dict(CONFIG)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_is_loaded_at_the_end(kind, dtype, tmp_path, tiny_tokenizer):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, **best}
    trainer = trainer_of(kind, fresh(dtype), tmp_path / "best", tiny_tokenizer, 4, **keys)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert max(evaluated) > min(evaluated)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-6)


def test_without_the_callback_resuming_is_refused(tmp_path, tiny_tokenizer):
    trainer_of("transformers", fresh(torch.float32), tmp_path / "out", tiny_tokenizer, 3, callbacks=[]).train()
    again = trainer_of("transformers", fresh(torch.float32), tmp_path / "out", tiny_tokenizer, 6, callbacks=[])
    with pytest.raises(ValueError, match=r"cannot load the trained experts: .*esft\.ESFTCallback"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_other_experts_is_refused(kind, tmp_path, tiny_tokenizer):
    """The shapes are those of the experts in training, so Trainer would load them."""
    trainer_of(kind, fresh(torch.float32), tmp_path / "out", tiny_tokenizer, 3).train()
    for experts, fits in (({"1": [4, 2], "2": [7]}, False), ({"1": [2, 5], "2": [7]}, True)):
        model = esft.to_esft(make_model(), CONFIG | {"experts": experts})
        again = trainer_of(kind, model, tmp_path / "again", tiny_tokenizer, 4)
        expected = (
            contextlib.nullcontext()
            if fits
            else pytest.raises(ValueError, match=r"cannot resume: .* trained other experts")
        )
        with expected:
            again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        assert len(losses(again)) == 3 + fits  # those of the checkpoint


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_base_is_refused(kind, tmp_path, tiny_tokenizer):
    """It holds what was trained alone, so the rest would be the other base's."""
    trainer_of(kind, fresh(torch.float32), tmp_path / "out", tiny_tokenizer, 3).train()
    other = esft.to_esft(make_model(seed=1), CONFIG)
    again = trainer_of(kind, other, tmp_path / "again", tiny_tokenizer, 4)
    with pytest.raises(ValueError, match=r"cannot resume: .* of another base model: the routers' weights differ"):
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))


def test_a_model_without_experts_in_training_is_refused_before_the_first_step(tmp_path, tiny_tokenizer):
    trainer = trainer_of("transformers", make_model(), tmp_path / "out", tiny_tokenizer, 3)
    with pytest.raises(ValueError, match="cannot find what was trained: the model has no adapter"):
        trainer.train()
    assert losses(trainer) == []


def test_a_write_that_fails_leaves_the_files_of_trainer(tmp_path, monkeypatch):
    written = {"model-00001-of-00002.safetensors": "a", "model.safetensors.index.json": "b"}
    (tmp_path / "checkpoint-1").mkdir()
    for name, text in written.items():
        (tmp_path / "checkpoint-1" / name).write_text(text)
    model = esft.to_esft(make_model(), CONFIG)

    def save():
        args = SimpleNamespace(output_dir=tmp_path, should_save=True)
        esft.ESFTCallback().on_save(args, SimpleNamespace(global_step=1), None, model=model)
        return {path.name for path in (tmp_path / "checkpoint-1").iterdir()}

    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(esft, "save_file", full)
        save()
    assert {path.name: path.read_text() for path in (tmp_path / "checkpoint-1").iterdir()} == written
    assert save() == {"model.safetensors", "adapter"}


def test_a_changing_selection_is_refused(tmp_path, tiny_tokenizer):
    model = fresh(torch.float32)
    trainer = trainer_of("transformers", model, tmp_path, tiny_tokenizer, 3)
    trainer.create_optimizer()
    esft.Reselection(model, trainer.optimizer)
    with pytest.raises(ValueError, match=r"cannot save this checkpoint: a Reselection changes the trained experts"):
        trainer.train()
