"""Runs with expert_compute=fp8: they learn, resume, and share experts out; and what is refused."""

import pytest

import train
from deepseek.fp8 import EMULATE
from tests.helpers import arguments, config_of, fails, losses, run_ranks

KEYS = {"expert_compute": "fp8", "dtype": "bfloat16"}


def test_a_run_learns_nearly_as_in_bf16_and_goes_on_bit_for_bit(start, monkeypatch, killed_and_repeated):
    monkeypatch.setenv(EMULATE, "1")
    keys = {**KEYS, "save_opt_states": True, "verify_frozen": True}
    whole, _ = killed_and_repeated(**keys)
    assert whole["frozen_verified"]
    start("bf16", dtype="bfloat16")
    found, plain = losses(start.folder / "whole"), losses(start.folder / "bf16")
    assert found["loss", 1] == pytest.approx(plain["loss", 1], rel=0.03) and found["loss", 1] != plain["loss", 1]
    assert found["eval_loss", 6] == pytest.approx(plain["eval_loss", 6], rel=0.05)
    assert found["eval_loss", 6] < found["eval_loss", 2]


def run_one(_rank: int, config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EMULATE, "1")
        train.run(config)


@pytest.mark.slow
def test_two_processes_that_share_the_experts_have_the_losses_of_one(files, tmp_path, monkeypatch):
    monkeypatch.setenv(EMULATE, "1")
    keys = {**KEYS, "max_steps": 2, "eval_steps": 2, "save_steps": None, "batch_size": 1}
    run_ranks(2, run_one, config_of(files, tmp_path / "two", **keys, ep_size=2, accumulation_steps=1))
    train.run(config_of(files, tmp_path / "one", **keys, accumulation_steps=2))
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found.keys() == wanted.keys()
    assert all(found[key] == pytest.approx(wanted[key], rel=0.02) for key in wanted if key[0] != "grad_norm")


REFUSED = [
    ({}, False, "it needs a GPU of compute capability 9"),
    ({"method": "lora", "expert_config": None}, True, "expert_compute is for methods esft, dpo, random and lora with"),
    ({"frozen_dtype": "int8"}, True, "copies of its own. Leave out frozen_dtype and offload_frozen"),
    ({"reselect_steps": 2}, True, "of experts frozen again. Leave out reselect_steps"),
    ({"dtype": "float32"}, True, "the weights are torch.float32. Set dtype=bfloat16"),
]


@pytest.mark.parametrize("changes, emulated, words", REFUSED, ids=[words for *_, words in REFUSED])
def test_what_cannot_run_in_fp8_is_refused_at_the_start(files, tmp_path, capsys, monkeypatch, changes, emulated, words):
    if emulated:
        monkeypatch.setenv(EMULATE, "1")
    assert words in fails(arguments(files, tmp_path / "out", **{**KEYS, **changes}), capsys)
    assert not (tmp_path / "out").exists()
