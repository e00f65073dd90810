"""The programs of docs/examples run, and give what they promise."""

import ast
import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import ROOT

EXAMPLES = ROOT / "docs" / "examples"
TINY = str(ROOT / "results" / "models" / "tiny")
LAW = str(ROOT / "datasets" / "train" / "law.jsonl")


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_examples_use_the_library_only():
    ours = {path.stem for path in ROOT.glob("*.py")} | {"deepseek", "training", "evaluation", "scripts", "tests"}
    for path in EXAMPLES.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert "esft" in imported and not imported & (ours - {"esft"}), path.name


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("law")
    load_example("score_and_select").main(TINY, LAW, str(folder), num_samples=16)
    return str(folder / "experts.json")


def test_score_and_select_writes_scores_and_experts(experts):
    scores = json.loads((Path(experts).parent / "summary.json").read_text())
    config = json.loads(Path(experts).read_text())
    for layer, ids in config["experts"].items():
        row = scores["token_scores"][layer]
        assert sum(row[str(expert)] for expert in ids) >= 0.2 > sum(row[str(expert)] for expert in ids[:-1])


@pytest.mark.clients
@pytest.mark.parametrize("name", ["train_with_a_plain_loop", "train_with_trainer"])
def test_training_examples_learn_and_save_the_selected_experts(name, experts, tmp_path):
    losses = load_example(name).main(TINY, LAW, experts, str(tmp_path), num_steps=20)
    assert losses[-1] < losses[0]
    config = json.loads(Path(experts).read_text())
    saved = json.loads((tmp_path / "expert_cfg.json").read_text())
    assert saved["experts"] == config["experts"]
    assert len(load_file(tmp_path / "adapter.safetensors")) == 3 * sum(map(len, config["experts"].values()))


@pytest.mark.clients
def test_sft_with_trl_goes_on_where_it_was_broken_off(experts, tmp_path):
    pytest.importorskip("trl")
    sft = load_example("sft_with_trl").main
    whole = sft(TINY, LAW, experts, str(tmp_path / "whole"), num_steps=20)
    sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=10)  # with another schedule: the data go on
    resumed = sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=20)
    assert len(resumed) == len(whole) == 2 and whole[1] < whole[0] and resumed[1] < resumed[0]
    again = sft(TINY, LAW, experts, str(tmp_path / "out"), num_steps=20)
    assert again == resumed  # nothing is left to do
    assert len(load_file(tmp_path / "out" / "adapter.safetensors")) > 0


@pytest.mark.clients
def test_dpo_with_trl_begins_at_the_base_and_learns_the_preference(experts, tmp_path):
    pytest.importorskip("trl")
    losses = load_example("dpo_with_trl").main(TINY, LAW, experts, str(tmp_path), num_steps=6)
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < 0.9 * losses[0]
    adapter = load_file(tmp_path / "adapter.safetensors")
    assert len(adapter) == 3 * sum(map(len, json.loads(Path(experts).read_text())["experts"].values()))


@pytest.mark.clients
def test_lora_beside_esft_learns_and_both_parts_are_found_again(experts, tmp_path):
    for library in ("peft", "trl"):
        pytest.importorskip(library)
    losses = load_example("lora_beside_esft").main(TINY, LAW, experts, str(tmp_path), num_steps=20)
    assert losses[1] < losses[0]
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    adapter = load_file(tmp_path / "experts" / "adapter.safetensors")
    base = AutoModelForCausalLM.from_pretrained(TINY).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    products = {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): lora[name.replace("lora_A", "lora_B")] @ factor
        for name, factor in lora.items()
        if "lora_A" in name
    }
    config = {int(layer): ids for layer, ids in json.loads(Path(experts).read_text())["experts"].items()}
    assert {name.split(".")[-2] for name in products} == {"q_proj", "o_proj"}
    for name, tensor in merged.items():
        if name in products:
            wanted = (base[name].float() + products.pop(name)).to(tensor.dtype)
            torch.testing.assert_close(tensor, wanted, rtol=2**-7, atol=1e-4)
            assert (tensor - base[name]).abs().max() > 5e-3
        elif name.endswith(".experts.down_proj"):
            for expert, row in enumerate(tensor):
                key = name.replace("down_proj", f"{expert}.down_proj.weight")
                chosen = expert in config[int(name.split(".")[2])]
                assert torch.equal(row, adapter[key] if chosen else base[name][expert])
                assert torch.equal(row, base[name][expert]) != chosen
        elif ".experts." not in name:
            assert torch.equal(tensor, base[name]), name
    assert not products


def test_merge_and_save_gives_a_plain_model_with_the_adapter_s_weights(experts, tmp_path):
    load_example("train_with_a_plain_loop").main(TINY, LAW, experts, str(tmp_path / "adapter"), num_steps=2)
    load_example("merge_and_save").main(TINY, str(tmp_path / "adapter"), str(tmp_path / "merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32").state_dict()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").state_dict()
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert changed and all(".experts." in name for name in changed)
