"""Test the places of an adapter's tensors in a checkpoint.

A merge on disk equals one in memory for every family, and an unmerge undoes it.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from deepseek.experts import moe_layers
from deepseek.loading import empty_model
from esft import ExpertConfig, merge
from scripts import merge_adapter as script
from scripts.experiments import check_families
from tests.helpers import (
    BOTH,
    FAMILIES,
    SHARD,
    assert_same_tensors,
    files_of,
    hashes,
    make_model,
    noisy_adapter,
    tensors_of,
)
from utils import ROOT


@pytest.mark.parametrize("flags", [{}, BOTH], ids=["experts", "all"])
@pytest.mark.parametrize("original", [True, False], ids=["split", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_merging_in_memory(family, original, flags, tmp_path):
    """Compare every tensor, the names of the shards, and the logits of the result; then unmerge and compare bytes."""
    save = {"max_shard_size": SHARD, "save_original_format": original}
    dtype = torch.bfloat16 if flags else torch.float32
    make_model(family, dtype, tie_word_embeddings=bool(flags)).save_pretrained(tmp_path / "raw")
    AutoModelForCausalLM.from_pretrained(tmp_path / "raw").save_pretrained(tmp_path / "base", **save)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    first, *_, last = moe_layers(model)
    noisy_adapter(model, ExpertConfig({first: (5, 2), last: (0,)}, **flags), tmp_path / "adapter")
    merge(model).save_pretrained(tmp_path / "wanted", **save)
    script.merge_adapter(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    found, base = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    assert_same_tensors(found, tensors_of(tmp_path / "wanted"))
    with pytest.raises(AssertionError):
        assert_same_tensors(found, base)
    assert len(files_of(tmp_path / "base")) > 2 and files_of(tmp_path / "out") == files_of(tmp_path / "base")
    assert script.unmerge(tmp_path / "out", tmp_path / "again") > 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "base") != hashes(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_tied_tensor_stored_twice_is_written_twice(tmp_path):
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    noisy_adapter(model, ExpertConfig({}, non_expert_modules=True), tmp_path / "adapter")
    script.merge_adapter(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], model.lm_head.weight)
    script.unmerge(tmp_path / "out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "base")


def test_copies_that_differ_are_two_parameters_whatever_the_config_says(tmp_path):
    """transformers trains them as two."""
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, path, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert_merge_is_the_trained_model(tmp_path / "base", model, AutoModelForCausalLM, tmp_path)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(found["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)


def assert_merge_is_the_trained_model(base, model, auto, folder):
    """Merge and unmerge an adapter of `model` with all switches. `auto` loaded the model from `base`."""
    first, *_, last = moe_layers(model)
    noisy_adapter(model, ExpertConfig({first: (1, 0), last: (3,)}, **BOTH), folder / "adapter")
    wanted = check_families.logits(model)
    script.merge_adapter(base, [folder / "adapter"], folder / "out")
    assert torch.equal(check_families.logits(auto.from_pretrained(folder / "out")), wanted)
    script.unmerge(folder / "out", folder / "again")
    assert hashes(folder / "again") == hashes(base) != hashes(folder / "out")


def can_be_merged():
    """Return the families that pass check_families.py and load as a language model."""
    rows = json.loads((ROOT / "results" / "tables" / "families.json").read_text())["families"]
    return [name for name, row in rows.items() if row["result"] == "passes" and name != "openai_privacy_filter"]


@pytest.mark.slow
@pytest.mark.parametrize("family", can_be_merged())
def test_every_family(family, tmp_path):
    _, model = check_families.make_model(family)
    model.save_pretrained(tmp_path / "base")
    layers = list(moe_layers(model))
    noisy_adapter(model, ExpertConfig({layers[0]: (1, 0), layers[-1]: (3,)}), tmp_path / "adapter")
    merge(model).save_pretrained(tmp_path / "wanted")
    script.merge_adapter(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "wanted"))
    script.unmerge(tmp_path / "out", tmp_path / "again")
    assert hashes(tmp_path / "again") == hashes(tmp_path / "base") != hashes(tmp_path / "out")


@pytest.mark.parametrize("layout", ["as the model's", "transposed"])
def test_fused_tensors_that_are_stored_either_way(layout, tmp_path):
    """Qwen3-VL-MoE is published transposed, and transformers saves it as it is in memory. The shapes tell which."""
    auto, model = check_families.make_model("qwen3_vl_moe", text_config={"moe_intermediate_size": 8})
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    if layout == "transposed":
        tensors = load_file(path)
        turned = {
            key: t.transpose(1, 2).contiguous() for key, t in tensors.items() if key.endswith("_proj") and t.ndim == 3
        }
        assert len(turned) == 8
        save_file(tensors | turned, path, {"format": "pt"})
    wanted = check_families.logits(model)
    model = auto.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(check_families.logits(model), wanted)
    assert_merge_is_the_trained_model(tmp_path / "base", model, auto, tmp_path)


def test_gate_and_up_that_are_interleaved_on_disk_only(tmp_path):
    """Inkling 2 is such a family."""
    auto, model = check_families.make_model("inkling2")
    model.save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base").eval()
    assert_merge_is_the_trained_model(tmp_path / "base", model, auto, tmp_path)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen4_exp"])
def test_the_language_model_of_a_model_of_images_and_text(family, tmp_path):
    """AutoModelForCausalLM takes the text part of such a checkpoint. A merge changes that part alone."""
    cls = CONFIG_MAPPING[family]
    config = check_families.small_config(cls, {"text_config": check_families.EXCEPTIONS.get(family, {})})
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert type(model) is type(empty_model(tmp_path / "base"))
    assert_merge_is_the_trained_model(tmp_path / "base", model, AutoModelForCausalLM, tmp_path)
    found, base = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "base")
    visual = [name for name in base if ".visual." in name]
    assert visual and all(torch.equal(found[name], base[name]) for name in visual)
