"""The programs of docs/examples run, and give what they promise."""

import ast
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

import esft
from deepseek.files import write_json
from tests.client_helpers import chosen, moved, state_of
from tests.helpers import ROOT, assert_near, assert_same_tensors, make_model, run_ranks

pytestmark = pytest.mark.long

EXAMPLES = ROOT / "docs" / "examples"
TINY = str(ROOT / "results" / "models" / "tiny")
EVAL = str(ROOT / "datasets" / "eval" / "law.jsonl")
LAW = str(ROOT / "datasets" / "train" / "law.jsonl")


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(name: str, *args, **options) -> tuple[list, torch.nn.Module, set]:
    """Run an example that trains. Return what it returns, its model, and what it moved."""
    example, held = load_example(name), []

    def to_esft(model, config):
        held.extend([model, state_of(model)])
        return esft.to_esft(model, config)

    example.to_esft = to_esft
    result = example.main(*args, **options)
    model, before = held
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))  # of all ranks
    return result, model, moved(before, after)


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


@pytest.mark.clients
@pytest.mark.slow
def test_grpo_with_trl_earns_more_and_a_seed_is_a_run(experts, tmp_path):
    pytest.importorskip("trl")
    output = tmp_path / "a"
    logs, model, changed = run_example("grpo_with_trl", TINY, LAW, experts, str(output), num_steps=8, batch_size=24)
    assert changed == chosen(json.loads(Path(experts).read_text()))
    assert_same_tensors(esft.adapter_tensors(model), load_file(output / "adapter.safetensors"))
    rewards = [entry["reward"] for entry in logs]
    assert sum(rewards[-4:]) > 2 * sum(rewards[:4]) > 0
    again, *_ = run_example("grpo_with_trl", TINY, LAW, experts, str(tmp_path / "b"), num_steps=3, batch_size=24)
    assert [(one["loss"], one["reward"]) for one in again] == [(one["loss"], one["reward"]) for one in logs[:3]]


@pytest.mark.clients
@pytest.mark.parametrize("name", ["sft_with_trl", "dpo_with_trl"])
def test_the_balance_of_routers_is_no_part_of_the_loss(name, tmp_path, tiny_tokenizer):
    """With or without a (huge) coefficient in the model's config the losses are the same."""
    pytest.importorskip("trl")
    write_json(tmp_path / "experts.json", {"experts": {"0": [1, 4], "2": [3]}})
    data, found = tmp_path / "data.jsonl", []
    data.write_text("\n".join(Path(LAW).read_text().splitlines()[:20]))
    for coefficient in (0.0, 5.0):
        base = tmp_path / str(coefficient)
        make_model("qwen3_moe", router_aux_loss_coef=coefficient).save_pretrained(base)
        tiny_tokenizer.save_pretrained(base)
        sizes = {"num_steps": 3 if name == "dpo_with_trl" else 10, "batch_size": 2}
        args = (str(base), str(data), str(tmp_path / "experts.json"), str(base / "out"))
        found.append(run_example(name, *args, **sizes)[::2])
    assert found[0] == found[1] and found[0][1]


def in_ranks(rank: int, name: str, args: tuple, output: str, options: dict) -> tuple:
    """Run an example on this rank, which writes to a folder of its own."""
    losses, model, changed = run_example(name, *args, f"{output}/{rank}", **options)
    return losses, changed, esft.adapter_tensors(model)


@pytest.mark.clients
@pytest.mark.parametrize("name", ["train_with_accelerate", "train_with_fsdp"])
def test_two_processes_train_as_one(name, experts, tmp_path):
    sizes = {"num_steps": 5, "batch_size": 4}
    args = (TINY, LAW, experts)
    wanted, model, changed = run_example("train_with_a_plain_loop", *args, str(tmp_path / "one"), **sizes)
    assert changed == chosen(json.loads(Path(experts).read_text()))
    (losses, found, adapter), other = run_ranks(2, in_ranks, name, args, str(tmp_path), sizes)
    assert losses == pytest.approx(wanted, rel=1e-5) and losses == other[0] and losses[-1] < losses[0]
    assert found == other[1] == changed
    assert_same_tensors(adapter, other[2])
    assert_same_tensors(adapter, load_file(tmp_path / "0" / "adapter.safetensors"))
    for key, tensor in esft.adapter_tensors(model).items():
        assert_near(key, adapter[key], tensor, 1e-3)


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_with_accelerate", "train_with_fsdp"])
def test_torchrun_starts_the_examples(name, experts, tmp_path):
    sizes, data = {"num_steps": 3, "batch_size": 4}, (TINY, LAW, experts)
    wanted, model, _ = run_example("train_with_a_plain_loop", *data, str(tmp_path / "one"), **sizes)
    script = (
        f"import os, json, {name} as example\nlosses = example.main(*{(*data, str(tmp_path / 'two'))!r}, **{sizes})\n"
    )
    script += "if os.environ['RANK'] == '0':\n    json.dump(losses, open('losses.json', 'w'))\n"
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{ROOT}"}
    torchrun = "torch.distributed.run --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=localhost:0"
    command = [sys.executable, "-m", *torchrun.split(), str(tmp_path / "script.py")]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(wanted, rel=1e-5)
    saved = load_file(tmp_path / "two" / "adapter.safetensors")
    for key, tensor in esft.adapter_tensors(model).items():
        assert_near(key, saved[key], tensor, 1e-3)


@pytest.fixture(scope="module")
def merged(experts, tmp_path_factory) -> Path:
    """A folder with an adapter, and its merge into the base."""
    folder = tmp_path_factory.mktemp("merged")
    load_example("train_with_a_plain_loop").main(TINY, LAW, experts, str(folder / "adapter"), num_steps=20)
    load_example("merge_and_save").main(TINY, str(folder / "adapter"), str(folder / "merged"))
    return folder


def test_merge_and_save_gives_a_plain_model_with_the_adapter_s_weights(merged):
    found = AutoModelForCausalLM.from_pretrained(merged / "merged", dtype="float32").state_dict()
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").state_dict()
    assert moved(base, found) == chosen(json.loads((merged / "adapter" / "expert_cfg.json").read_text()))


@pytest.mark.slow
@pytest.mark.clients
def test_lm_eval_has_the_same_numbers_for_an_adapter_and_its_merge(merged, monkeypatch):
    pytest.importorskip("lm_eval")
    example = load_example("evaluate_with_lm_eval")
    found = example.main(TINY, str(merged / "adapter"), EVAL, limit=20)
    assert found["adapter"]["perplexity,none"] < 0.2 * found["base"]["perplexity,none"]
    monkeypatch.setattr(example, "add_adapter", lambda *_: None)
    again = example.main(str(merged / "merged"), "", EVAL, limit=20)
    for name in ("perplexity,none", "acc,none"):
        assert again["base"][name] == pytest.approx(found["adapter"][name], rel=1e-6)


@pytest.mark.clients
@pytest.mark.slow
def test_lm_eval_s_command_line_has_them_too(merged, tmp_path):
    pytest.importorskip("lm_eval")
    example = load_example("evaluate_with_lm_eval")
    wanted = example.main(TINY, str(merged / "adapter"), EVAL, limit=20)["adapter"]
    write_json(tmp_path / "last_word.yaml", example.make_task(EVAL))  # JSON is YAML
    model = f"--model hf --model_args pretrained={merged / 'merged'},dtype=float32,softmax_dtype=float32 --device cpu"
    what = f"--tasks {tmp_path / 'last_word.yaml'} --limit 20 --batch_size 8 --apply_chat_template"
    command = [sys.executable, "-m", "lm_eval", "run", *model.split(), *what.split(), "--output_path", str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["last_word"]
    for name in ("perplexity,none", "acc,none"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-6)
