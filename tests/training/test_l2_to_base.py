"""`l2_to_base` pulls what is trained towards the base after every step, and nothing else changes."""

import dataclasses

import pytest
import torch

from deepseek.loading import empty_model
from esft import ExpertConfig, adapter_tensors, to_esft
from tests.helpers import arguments, config_of, fails, make_model, tensors_of, trainer_of
from training.memory import Estimator, MemorySettings

ONE = {"max_steps": 1, "eval_steps": None, "save_steps": None, "lr_scheduler_type": "constant"}


def changes(folder) -> dict[str, torch.Tensor]:
    """Tuned - base of every tensor of a run's adapter."""
    base = adapter_tensors(to_esft(make_model(), ExpertConfig.load(folder)))
    return {name: tensor - base[name] for name, tensor in tensors_of(folder).items()}


def test_a_step_ends_that_share_nearer_to_the_base(files, start):
    """p <- p - lr l (p - base): of one step's change, 1 - lr l is left, in experts and in all else."""
    for name, pull in {"plain": 0.0, "pulled": 30.0}.items():
        start(name, expert_config=files / "all.json", learning_rate=1e-2, l2_to_base=pull, **ONE)
    plain, pulled = (changes(start.folder / name) for name in ("plain", "pulled"))
    assert plain.keys() == pulled.keys()
    for name, change in plain.items():
        assert change.norm() > 0, name
        assert (pulled[name] - 0.7 * change).norm() < 1e-5 * change.norm(), name


def test_what_is_trained_stays_within_about_one_step(start):
    keys = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "eval_steps": None,
        "warmup_steps": 1,
    }
    start("plain", **keys)
    start("pulled", l2_to_base=90.0, **keys)
    plain, pulled = (changes(start.folder / name) for name in ("plain", "pulled"))
    assert max(change.abs().max() for change in plain.values()) > 1.5e-2
    # each AdamW step moves a weight by about the rate at most, of which a tenth is left
    assert max(change.abs().max() for change in pulled.values()) < 1.2e-3


def test_a_run_broken_off_goes_on_bit_for_bit(files, killed_and_repeated):
    keys = {"base_model_path": files / "m16", "expert_config": files / "all.json", "l2_to_base": 20.0}
    keys |= {"save_opt_states": True, "verify_frozen": True, "max_steps": 4, "eval_steps": None}
    assert killed_and_repeated(at=4, **keys)[0]["frozen_verified"]


def test_in_bf16_the_base_is_the_one_that_is_stored(files, start, monkeypatch):
    """A pull by all of lr l = 1 - 1e-6 leaves the base itself, bit for bit."""
    keys = {"base_model_path": files / "m16", "expert_config": files / "all.json", "learning_rate": 1e-2, **ONE}
    trainer = trainer_of(config_of(files, start.folder / "none", **keys), monkeypatch)
    before = adapter_tensors(trainer.model)
    start(l2_to_base=99.9999, **keys)
    after = tensors_of(start.folder / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"l2_to_base": -1}, "l2_to_base=-1.0 is below 0"),
        ({"l2_to_base": 100, "learning_rate": 1e-2}, "past the base"),
        (
            {"l2_to_base": 1, "optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
            "l2_to_base is not for optim=",
        ),
        ({"l2_to_base": 1, "method": "full"}, "l2_to_base is for methods esft, dpo and random"),
        ({"l2_to_base": 1, "method": "lora"}, "weight_decay"),
        ({"l2_to_base": 1, "method": "lora", "lora_experts": "selected"}, "weight_decay"),
    ],
)
def test_what_makes_no_sense_is_refused(files, tmp_path, capsys, keys, words):
    assert words in fails(arguments(files, tmp_path / "out", **keys), capsys)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_estimate_counts_the_base_s_rows_once_more(files, device):
    empty, config = empty_model(files / "m16"), ExpertConfig({1: (3, 5), 2: (0,)}, shared_experts=True)
    asked = MemorySettings(seq_length=64, device=device)
    estimator = Estimator(empty, "esft", config)
    plain, kept = (estimator.estimate(dataclasses.replace(asked, keep_base=value)) for value in (False, True))
    rows = 2 * (3 * 3 * 32 * 16 + 2 * 3 * 32 * 32)  # of bf16: three experts, and the shared ones of two layers
    assert kept.host - plain.host == (rows if device == "cuda" else 0)
    assert kept.experts - plain.experts == (0 if device == "cuda" else rows)
