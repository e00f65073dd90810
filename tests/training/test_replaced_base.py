"""A run goes on with the base that it began with, and is told where its experts were chosen on another one."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from deepseek.files import write_json
from deepseek.fingerprint import base_note
from deepseek.loading import empty_model
from tests.helpers import EXPERTS, Killed, arguments, at_step, fails, kill, same, tensors_of


def other_weights(base):
    """Change all but the routers."""
    path = base / "model.safetensors"
    tensors = {key: t if ".mlp.gate." in key else t * 1.1 for key, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})


def one_expert(base):
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.2.mlp.experts.3.down_proj.weight"].add_(0.01)
    save_file(tensors, path, {"format": "pt"})


def in_bf16(base):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)


def in_shards(base):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, max_shard_size="50KB")
    (base / "model.safetensors").unlink()


@pytest.fixture
def begun(files, start, monkeypatch):
    """(arguments, base) of a run that was killed after its second checkpoint."""
    base = shutil.copytree(files / "m32", start.folder / "base")
    keys = {"base_model_path": base, "save_opt_states": True}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        start(**keys)
    return keys, base


CHANGES = {
    other_weights: "the weights differ",
    one_expert: "the weights differ",
    in_bf16: "it is stored in another dtype",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_does_not_go_on_with_another_base(change, begun, files, start, capsys):
    keys, base = begun
    change(base)
    before = {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}
    message = fails(arguments(files, start.folder / "out", **keys), capsys)
    assert f"it holds another run (it differs in base_model_path: {CHANGES[change]}" in message
    assert before == {path: path.stat().st_mtime_ns for path in (start.folder / "out").rglob("*")}


@pytest.mark.long
def test_a_run_goes_on_with_the_same_weights_in_other_files(begun, start, whole):
    keys, base = begun
    in_shards(base)
    start(**keys)
    assert same(whole, start.folder / "out")


def test_a_run_without_a_note_of_its_base_goes_on(begun, start, whole):
    keys, _ = begun
    note = json.loads((start.folder / "out" / "run.json").read_text())
    assert note.pop("base")["weights"]
    write_json(start.folder / "out" / "run.json", note)
    for path in start.folder.glob("out/checkpoint-*"):  # as they were before
        config = json.loads((path / "expert_cfg.json").read_text())
        config["base"] = {key: config["base"][key] for key in ("model_type", "layers", "num_experts", "router")}
        write_json(path / "expert_cfg.json", config)
        (path / "manifest.json").write_text("{}")
    start(**keys)
    assert tensors_of(start.folder / "out").keys() == tensors_of(whole).keys()


def test_a_finished_run_of_another_base_is_another_run(files, start, capsys):
    base = shutil.copytree(files / "m32", start.folder / "base")
    start(base_model_path=base)
    other_weights(base)
    assert "base_model_path: the weights differ" in fails(
        arguments(files, start.folder / "out", base_model_path=base), capsys
    )


@pytest.mark.parametrize("replaced", [True, False])
def test_experts_that_were_chosen_on_another_base_are_told(replaced, files, start, recwarn):
    base = shutil.copytree(files / "m32", start.folder / "base")
    write_json(start.folder / "experts.json", {**EXPERTS, "base": base_note(empty_model(base))})
    if replaced:
        one_expert(base)
    start(base_model_path=base, expert_config=start.folder / "experts.json", max_steps=1)
    told = [str(warning.message) for warning in recwarn if "were chosen on another base model" in str(warning.message)]
    assert len(told) == replaced and all("experts.json" in text and "weights differ" in text for text in told)
