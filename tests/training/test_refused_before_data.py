"""What a model, its experts or a missing library makes impossible is told before data are read and experts scored."""

import shutil
import sys

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import train
from deepseek.files import write_json
from tests.helpers import SMALL, arguments, fails, make_model


@pytest.fixture
def nothing_is_read(monkeypatch):
    for name in ("load_data", "score_and_select", "load_model"):
        monkeypatch.setattr(train, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def dense(folder, files):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, intermediate_size=64)).save_pretrained(
        folder
    )


def cut(folder, files):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def without_a_shard(folder, files):
    (folder / "model.safetensors").unlink()
    make_model().save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()


@pytest.mark.parametrize("selected", [True, False])
@pytest.mark.parametrize(
    ("spoil", "why"), [(dense, "dense model"), (cut, "damaged or truncated"), (without_a_shard, "missing, damaged")]
)
def test_a_model_that_cannot_be_trained(selected, spoil, why, files, tmp_path, capsys, nothing_is_read):
    base = shutil.copytree(files / "m32", tmp_path / "base")
    spoil(base, files)
    keys = {"base_model_path": base} | ({} if selected else {"expert_config": None})
    assert why in fails(arguments(files, tmp_path / "out", **keys), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "missing", "why"),
    [
        ({"attn_implementation": "nonsense"}, None, "attn_implementation"),
        ({"attn_implementation": "nonsense", "expert_config": None}, None, "attn_implementation"),
        ({"method": "lora"}, "peft", "cannot import peft"),
        ({"frozen_dtype": "nf4"}, "bitsandbytes", "frozen_dtype=nf4: cannot import bitsandbytes"),
        ({"frozen_dtype": "nf4", "base_model_path": "narrow"}, None, "matrices of a multiple of 64"),
        (
            {"frozen_dtype": "nf4", "expert_config": None},
            "bitsandbytes",
            "frozen_dtype=nf4: cannot import bitsandbytes",
        ),
        ({"ep_size": 2}, None, "it does not divide the 1 processes"),
        ({"ep_size": 2, "expert_config": None}, None, "it does not divide the 1 processes"),
        ({"expert_config": "expert8.json"}, None, "names expert 8 of layer 1"),
        (
            {"expert_config": None, "strategy": "topk", "top_k": 9},
            None,
            "top_k is 9. Give a number above 0 and up to 8",
        ),
        ({"expert_config": None, "strategy": "layers", "upper_layers": 3}, None, "upper_layers is 3. Give a number"),
        ({"expert_config": "expert8.json", "method": "random"}, None, "names expert 8 of layer 1"),
        (
            {"expert_config": None, "train_shared_experts": True, "base_model_path": "olmoe"},
            None,
            "cannot train shared experts: this model has none",
        ),
    ],
)
def test_settings_that_do_not_fit(keys, missing, why, files, tmp_path, capsys, monkeypatch, nothing_is_read):
    shutil.copytree(files / "m32", tmp_path / "narrow")
    make_model(moe_intermediate_size=5, hidden_size=20, num_attention_heads=5).save_pretrained(tmp_path / "narrow")
    make_model("olmoe").save_pretrained(shutil.copytree(files / "m32", tmp_path / "olmoe"))
    write_json(tmp_path / "expert8.json", {"experts": {"1": [8]}})
    for key in keys.keys() & {"base_model_path", "expert_config"}:
        keys = {**keys, key: keys[key] and tmp_path / keys[key]}
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    assert why in fails(arguments(files, tmp_path / "out", **keys), capsys)
    assert not (tmp_path / "out").exists()
