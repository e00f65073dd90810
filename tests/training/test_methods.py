"""What each method trains, and that all else stays as it was."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

import esft
from deepseek.experts import moe_layers
from deepseek.loading import empty_model
from tests.helpers import (
    EXPERTS,
    ROOT,
    arguments,
    at_step,
    config_of,
    fails,
    losses,
    make_model,
    tensors_of,
    trainer_of,
)
from tests.rank_helpers import log_worse
from training.frozen_proof import frozen_hashes
from training.methods import budget_of, count_trained, prepare_model, rank_of
from training.trainer import ESFTTrainer


def test_bf16_follows_fp32_through_masters(files, start, whole):
    start("b", base_model_path=files / "m16")
    a, b = losses(whole), losses(start.folder / "b")
    assert all(abs(a[key] - b[key]) < 0.03 * abs(a[key]) for key in a if key[0] != "grad_norm")
    base = make_model(dtype=torch.bfloat16)
    start("c", learning_rate=1e-6, base_model_path=files / "m16", save_opt_states=True)
    states = load_file(start.folder / "c" / "checkpoint-6" / "states" / "rank-0.safetensors")
    master = states["model.layers.1.mlp.experts.5.down_proj.master"]
    before = base.model.layers[1].mlp.experts.down_proj[5].float()
    assert (master != before).float().mean() > 0.9  # which bf16 weights could not follow
    assert (master.bfloat16() != before.bfloat16()).float().mean() < 0.1


@pytest.mark.parametrize("method", ["esft", "lora"])
def test_frozen_tensors_are_verified(files, start, monkeypatch, capsys, method):
    assert start("a", method=method, max_steps=2, verify_frozen=True)["frozen_verified"]
    assert "kept their bits" in capsys.readouterr().out
    assert not start("b", method=method, max_steps=1)["frozen_verified"]

    def tamper(trainer):
        param = next(p for name, p in trainer.model.named_parameters() if name.endswith("layers.2.mlp.gate.weight"))
        param.data[0, 0] += 1

    at_step(monkeypatch, 3, tamper)
    message = fails(arguments(files, start.folder / "c", method=method, verify_frozen=True), capsys)
    assert "layers.2.mlp.gate.weight" in message and "1 of" in message
    assert not list((start.folder / "c").glob("*.safetensors"))


def test_frozen_rows_of_trained_experts_are_verified(files, start, monkeypatch):
    trainer = trainer_of(config_of(files, start.folder / "out"), monkeypatch)
    before = frozen_hashes(trainer.model)
    experts = trainer.model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.trained.down_proj += 1
    assert frozen_hashes(trainer.model) == before
    experts.down_proj.data[experts.trained.row_of_e[4]] += 1
    after = frozen_hashes(trainer.model)
    assert {key for key in before if before[key] != after[key]} == {"model.layers.1.mlp.experts.4"}


@pytest.mark.parametrize("frozen_dtype", [None, "int8"])
def test_experts_under_lora_are_verified_themselves(files, start, monkeypatch, frozen_dtype):
    keys = {"method": "lora", "lora_experts": "selected", "frozen_dtype": frozen_dtype}
    trainer = trainer_of(config_of(files, start.folder / "out", **keys), monkeypatch)
    before = frozen_hashes(trainer.model)
    for expert in EXPERTS["experts"]["1"]:
        layer = moe_layers(trainer.model)[1]
        layer.expert_views(expert)["down_proj.weight"].add_(1)
        after = frozen_hashes(trainer.model)
        assert {key for key in before if before[key] != after[key]} == {f"model.layers.1.mlp.experts.{expert}"}
        before = after


@pytest.mark.parametrize("method", ["esft", "lora"])
def test_a_block_that_was_replaced_is_refused_before_the_first_step(files, start, monkeypatch, capsys, method):
    """Kernels of a hub can replace a whole block, experts and all, and then nothing of them would learn."""
    selected = {"method": "lora", "lora_experts": "selected"} if method == "lora" else {}
    start("a", max_steps=1, **selected)
    monkeypatch.setattr(DeepseekV2Moe, "forward", lambda self, hidden_states: self.shared_experts(hidden_states))
    message = fails(arguments(files, start.folder / "b", **selected), capsys)
    assert "did not reach model.layers.1.mlp.experts" in message and not (start.folder / "b").exists()
    monkeypatch.undo()
    start("b", max_steps=1, **selected)


def test_random_takes_as_many_other_experts(files, start):
    start(method="random", max_steps=1)
    chosen = esft.ExpertConfig.load(start.folder / "out").experts
    assert {layer: len(ids) for layer, ids in chosen.items()} == {1: 2, 2: 3}
    assert any(set(ids) != set(EXPERTS["experts"][str(layer)]) for layer, ids in chosen.items())


def test_lora_adapts_all_but_head_and_routers_and_loads_in_peft(files, start, monkeypatch):
    peft = pytest.importorskip("peft")
    trainer = trainer_of(config_of(files, start.folder / "a", method="lora"), monkeypatch)
    trained = [name for name, param in trainer.model.named_parameters() if param.requires_grad]
    for part in ("self_attn.q_proj", "layers.0.mlp.gate_proj", "shared_experts.down_proj", "mlp.experts."):
        assert any(part in name for name in trained), part
    assert not [name for name in trained if ".gate." in name or "lm_head" in name or "lora" not in name]
    adapted = [module for module in trainer.model.modules() if hasattr(module, "lora_A")]
    assert {scaling for module in adapted for scaling in module.scaling.values()} == {2.0}

    result = start("b", method="lora", learning_rate=1e-2)
    model = AutoModelForCausalLM.from_pretrained(files / "m32")
    note = json.loads((start.folder / "b" / "base.json").read_text())
    assert note == {"base": esft.base_note(model)} and note["base"]["router"]
    ids = torch.arange(20)[None]
    base = model(ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(model, start.folder / "b")
    assert (model(ids).logits - base).abs().max() > 1e-2
    state = {key: tensor for key, tensor in model.state_dict().items() if "lora" in key}
    assert len(state) == len(trained) == len(tensors_of(start.folder / "b"))
    assert sum(tensor.numel() for tensor in state.values()) == result["trained_parameters"]
    experts = [name for name in state if "layers.1.mlp.experts" in name and "lora_B" in name]
    assert experts and all(state[name].abs().max() > 0 for name in experts)


@pytest.mark.parametrize("share", [0.025, 0.07, 0.25])
def test_experts_and_lora_of_an_equal_share_train_as_many_parameters(share):
    tiny = ROOT / "results" / "models" / "tiny"
    total = sum(param.numel() for param in empty_model(tiny).parameters())
    rank = rank_of(empty_model(tiny), share)
    trained = [
        count_trained(prepare_model(empty_model(tiny), "lora", lora_rank=r))["trained_parameters"]
        for r in (rank - 1, rank, rank + 1)
        if r
    ]
    assert min(trained, key=lambda count: abs(count - share * total)) == trained[-2]
    for shared in (False, True):
        count = round(4 * 64 * budget_of(empty_model(tiny), share, shared))  # experts of four layers
        experts = {layer: tuple(range(count // 4 + (layer <= count % 4))) for layer in range(1, 5)}
        model = prepare_model(empty_model(tiny), "esft", esft.ExpertConfig(experts, shared))
        assert abs(count_trained(model)["trained_parameters"] - share * total) <= 3 * 128 * 48 / 2  # of one expert


@pytest.mark.parametrize("method", ["esft", "random", "full", "lora"])
def test_the_best_model_is_what_stays(start, monkeypatch, method):
    monkeypatch.setattr(ESFTTrainer, "log", log_worse)
    result = start(method=method, load_best_model_at_end=True, save_total_limit=1, max_steps=4)
    rows = json.loads((start.folder / "out" / "trainer_state.json").read_text())["log_history"]
    second, last, restored = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert second - 2 == pytest.approx(restored - 4) == pytest.approx(result["eval_loss"]) != pytest.approx(last - 4)
    assert result["best_step"] == 2
    left, right = tensors_of(start.folder / "out"), tensors_of(start.folder / "out" / "checkpoint-2")
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
