"""What can be refused is refused before a model is loaded, and nothing is left behind."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import esft
from deepseek.adapters import BASE_NAME
from deepseek.files import write_json
from esft import ExpertConfig
from scripts.expert import routing_drift
from tests.helpers import noisy_adapter, refused, run_eval, write_rows
from training.methods import prepare_model


@pytest.fixture
def base(tiny_model_dir, tmp_path):
    return shutil.copytree(tiny_model_dir, tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    noisy_adapter(AutoModelForCausalLM.from_pretrained(base), ExpertConfig({1: (5, 2), 2: (7,)}), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def lora(base, tmp_path):
    pytest.importorskip("peft")
    model = prepare_model(AutoModelForCausalLM.from_pretrained(base), "lora")
    model.save_pretrained(tmp_path / "lora")
    write_json(tmp_path / "lora" / BASE_NAME, model.base_note)  # as train.py does
    return tmp_path / "lora"


def change(folder, edit):
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def truncate(folder):
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])


def of_another_base(folder):
    """The base beside it gets other weights, with the same routers."""
    change(folder.with_name("base"), lambda tensors: tensors["model.embed_tokens.weight"].mul_(2))


DAMAGES = {
    "truncated": truncate,
    "not finite": lambda folder: change(folder, lambda tensors: tensors[min(tensors)].fill_(torch.nan)),
    "a tensor is missing": lambda folder: change(folder, lambda tensors: tensors.pop(min(tensors))),
    "another base": of_another_base,
}


def load_nothing(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(esft, "load_base_model", load)


@pytest.mark.parametrize("how", DAMAGES)
def test_an_adapter_is_checked_before_the_base_answers(how, base, adapter, tmp_path, monkeypatch, capsys):
    questions = write_rows(tmp_path / "rows.jsonl", ["a"] * 6)
    DAMAGES[how](adapter)
    before = sorted(tmp_path.rglob("*"))
    load_nothing(monkeypatch)
    flags = [f"--adapter_dir={adapter}", "--with_base"]
    refused(capsys, lambda _: run_eval(base, questions, tmp_path / "out.jsonl", *flags), [], f"adapter {adapter}: ")
    flags = [f"--adapter_dir={adapter}", "--with_base", "--world_size=2"]
    refused(capsys, lambda _: run_eval(base, questions, tmp_path / "out.jsonl", *flags), [], f"adapter {adapter}: ")
    argv = [f"--base_model_path={base}", f"--adapter_dir={adapter}", "--eval_dataset=law", f"--output_dir={tmp_path}/d"]
    refused(capsys, routing_drift.main, [*argv, "--overlong=truncate"], f"adapter {adapter}: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "not finite"])
def test_a_lora_adapter_is_checked_before_the_base_answers(how, base, lora, tmp_path, monkeypatch, capsys):
    questions = write_rows(tmp_path / "rows.jsonl", ["a"] * 6)
    DAMAGES[how](lora)
    load_nothing(monkeypatch)
    flags = [f"--adapter_dir={lora}", "--with_base"]
    refused(capsys, lambda _: run_eval(base, questions, tmp_path / "out.jsonl", *flags), [], str(lora))
    argv = [f"--base_model_path={base}", f"--adapter_dir={lora}", "--eval_dataset=law", f"--output_dir={tmp_path}/d"]
    refused(capsys, routing_drift.main, [*argv, "--overlong=truncate"], str(lora))


def test_a_sound_adapter_is_loaded(base, adapter, tmp_path):
    questions = write_rows(tmp_path / "rows.jsonl", ["a"] * 6)
    (summary,) = run_eval(base, questions, tmp_path / "out.jsonl", f"--adapter_dir={adapter}", "--with_base")
    assert summary["n"] == summary["against_base"]["n"] == 6
