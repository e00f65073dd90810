"""A run that was broken off goes on bit for bit, and a finished one is left alone."""

import os
import signal

import pytest
import torch

from tests.helpers import Killed, arguments, at_step, config_of, fails, kill, same, tensors_of
from training.checkpoints import find_damage
from training.run_folder import run_note
from training.trainer import ESFTTrainer

METHODS = {
    "esft fp32": {},
    "esft bf16, all modules": {"base_model_path": "m16", "expert_config": "all.json"},
    "full": {"method": "full"},
    "lora": {"method": "lora"},
    "random": {"method": "random"},
    "adafactor": {"optim": "adafactor"},  # its states have other shapes than the weights
}


def test_paths_of_a_run_work_from_anywhere(files, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    near = {"base_model_path": "m32", "expert_config": "experts.json", "train_dataset": "law"}
    config = run_note(config_of(files, tmp_path / "out", **near), 4)["config"]
    assert config["base_model_path"] == str(files / "m32") and config["train_dataset"] == "law"
    assert config["expert_config"] == str(files / "experts.json")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_broken_off_goes_on_bit_for_bit(files, start, monkeypatch, name):
    changes = {key: value if key in ("method", "optim") else files / value for key, value in METHODS[name].items()}
    changes |= {"save_opt_states": True, "max_steps": 7, "save_steps": 3, "logging_steps": 2}
    whole = start("whole", **changes)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**changes)
    staging = start.folder / "out" / ".staging" / "checkpoint-6"  # killed while it wrote
    staging.mkdir(parents=True)
    (staging / "trainer_state.json").write_text("{")
    assert not list((start.folder / "out").glob("*.safetensors"))
    result = start(**changes)
    assert same(start.folder / "whole", start.folder / "out")
    for key in ("steps", "train_loss", "eval_loss"):
        assert result[key] == whole[key]
    assert not (start.folder / "out" / ".staging").exists()


def test_a_run_killed_after_its_last_step_takes_no_other(start, monkeypatch):
    keys = {"save_opt_states": True, "max_steps": 7, "logging_steps": 500}  # in the middle of an epoch
    whole = start("whole", **keys)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ESFTTrainer, "save_state", kill)
        start(**keys)
    result = start(**keys)
    assert (result["steps"], result["train_loss"]) == (7, whole["train_loss"])
    assert same(start.folder / "whole", start.folder / "out")


@pytest.mark.parametrize("how", ["no state", "adapter cut", "states flipped", "no manifest", "manifest cut"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(start, whole, monkeypatch, how):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(save_opt_states=True)
    last = start.folder / "out" / "checkpoint-4"
    names = {"state": "trainer_state.json", "adapter": "adapter.safetensors", "states": "states/rank-0.safetensors"}
    path = last / next((file for name, file in names.items() if name in how.split()), "manifest.json")
    content = path.read_bytes()
    if how.startswith("no"):
        path.unlink()
    elif how.endswith("cut"):
        path.write_bytes(content[:-100])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    assert find_damage(last)
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        start(save_opt_states=True)
    assert same(whole, start.folder / "out")
    assert find_damage(last) is None


def test_a_finished_run_is_left_alone_and_another_is_refused(files, start, capsys):
    first = start()
    out = start.folder / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert start() == first
    assert "nothing to do" in capsys.readouterr().out
    assert "differs in learning_rate, weight_decay)" in fails(
        arguments(files, out, learning_rate=5e-3, weight_decay=0.1), capsys
    )
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    fails(arguments(files, out, overwrite=True, train_dataset="no.jsonl"), capsys)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}  # nothing goes before all is checked
    again = start(overwrite=True, method="full", max_steps=2)
    assert again["steps"] == 2
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors"}  # nothing of the adapter


def test_without_optimizer_states_a_run_starts_over(start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start()
    kept = start.folder / "out" / "checkpoint-4" / "adapter.safetensors"
    with pytest.raises(ValueError, match=r"cannot go on, .*checkpoint-4 is a loadable adapter"):
        start()
    assert kept.is_file()
    (start.folder / "out" / "checkpoint-5").mkdir()
    start(overwrite=True)
    assert same(whole, start.folder / "out")
    assert {path.name for path in (start.folder / "out").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (2, 4, 6)}


def test_a_run_broken_off_before_its_first_checkpoint_starts_over(start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 1, kill)
        start()
    with pytest.warns(UserWarning, match="starts over"):
        start()
    assert same(whole, start.folder / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits(start, whole, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        at_step(patch, 3, lambda _: os.kill(os.getpid(), number))
        start(save_opt_states=True, save_steps=4)
    assert stop.value.code == 128 + number and f"{number.name} after step 3" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert [path.name for path in (start.folder / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    start(save_opt_states=True, save_steps=4)
    assert same(whole, start.folder / "out")


def test_ctrl_c_twice_stops_at_once(start, monkeypatch):
    def twice(_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_step(patch, 3, twice)
        start(save_opt_states=True, save_steps=4)
    assert not list((start.folder / "out").glob("checkpoint-*"))


def test_a_run_that_moved_is_still_that_run(files, start, whole, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(save_opt_states=True)
    (start.folder / "out").rename(start.folder / "moved")
    same_model = f"{files}/m32/../m32"
    start("moved", save_opt_states=True, logging_steps=3, base_model_path=same_model)
    left, right = tensors_of(whole), tensors_of(start.folder / "moved")
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_runs_on_stored_experts_resume_and_bring_the_best_back(dtype, killed_and_repeated):
    keys = {"frozen_dtype": "int8", "save_opt_states": True, "load_best_model_at_end": True, "verify_frozen": True}
    keys["dtype"] = dtype
    whole, _ = killed_and_repeated(**keys)
    assert whole["frozen_verified"] and whole["best_step"]
